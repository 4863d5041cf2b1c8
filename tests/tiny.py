"""Tiny random models of every architecture, and a tokenizer small enough for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 320

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

# What each architecture wants beside the common part; None takes a key away.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": _BOTH,
    "gemma3_text": _BOTH,
    "mistral": {"sliding_window": 8},
    "phi3": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {"head_dim": None},
    "stablelm": {},
    "olmo2": {},
    "cohere2": _BOTH,
    "smollm3": {"no_rope_layers": [1, 0]},
    "granite": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1]},
    "mamba": {"state_size": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        **_BOTH,
    },
    "qwen3_next": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_next", "deepseek_v3", "granitemoe")
# One of each kind: plain, transposed weights, fused projections, sliding windows and norms of its own, a recurrence,
# experts.
QUICK = ("llama", "gpt2", "phi3", "gemma3_text", "mamba", "qwen3_moe")


def at_length(names: Iterable[str], quick: Iterable[str] = QUICK) -> list[Any]:
    """Names as a test's parameters; those that are not quick are slow."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


def build(architecture: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """A random network of one architecture, the same for the same seed."""
    settings = {**_COMMON, **ARCHITECTURES[architecture], **overrides}
    config = AutoConfig.for_model(architecture, **{k: v for k, v in settings.items() if v is not None})
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    # Biases and gains that are all zero or all one would hide mistakes.
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.05 * torch.randn(parameter.shape).to(dtype)
    return network


def token_windows(count: int = 5, length: int = 32, seed: int = 1) -> Tensor:
    """Windows of random token ids, (N, L)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (count, length), generator=generator)


def write_tokenizer(directory: Path, *, bos: bool = False, eos: bool = False) -> None:
    """Train a byte-level tokenizer on Python's own documentation and save it, chat template and all. It knows a BOS
    and an EOS, and puts the one before a text if `bos`, or the other behind it if `eos`."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([topics[key] for key in sorted(topics)[:20]], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    if eos:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:",
    )
    fast.save_pretrained(directory)


def write_gguf(path: Path, source: Path, dtype: str = "float32", more: Callable[[Any], object] | None = None) -> None:
    """A tiny LLaMA as a GGUF file, as llama.cpp's converter writes it; `more` adds to what the writer holds."""
    from gguf import GGUFWriter

    network = AutoModelForCausalLM.from_pretrained(source)
    config, weights = network.config, network.state_dict()
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokenizer = json.loads((source / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(sorted(tokenizer["vocab"], key=tokenizer["vocab"].get))
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokenizer["vocab"]))])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    short = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, tensor in weights.items():
        name = name.removesuffix(".weight")
        if name.startswith("model.layers."):
            _, _, number, rest = name.split(".", 3)
            heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
            if rest in heads:  # llama.cpp stores rotary pairs side by side
                tensor = tensor.view(heads[rest], 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
            name = f"blk.{number}.{short[rest]}"
        else:
            name = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}[name]
        kind = torch.float32 if tensor.ndim == 1 else getattr(torch, dtype)
        writer.add_tensor(f"{name}.weight", tensor.to(kind).numpy())
    if more is not None:
        more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
