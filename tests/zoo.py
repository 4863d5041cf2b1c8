"""Tiny random networks of every causal architecture that transformers knows and that can be built small."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 320
KINDS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# By the names that configs give their sizes.
_SIZES: dict[str, tuple[str, ...]] = {
    "vocabulary": ("vocab_size",),
    "width": ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "n_embed", "emb_dim"),
    "inner": (
        *("intermediate_size", "ffn_dim", "d_ff", "n_inner", "dim_ff", "dff", "d_inner"),
        *("decoder_ffn_dim", "encoder_ffn_dim"),
    ),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"),
    "heads": (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "linear_num_value_heads"),
        *("decoder_attention_heads", "encoder_attention_heads", "mamba_n_heads", "mamba_num_heads"),
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
        *("mamba_dt_rank", "time_step_rank"),
    ),
    "pairs": (
        *("num_key_value_heads", "encoder_layers", "num_experts_per_tok", "moe_topk", "moe_k", "mamba_expand"),
        *("linear_num_key_heads", "index_n_heads"),
    ),
    "head": (
        *("head_dim", "d_kv", "dim_head", "kv_channels", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
        *("sliding_window", "window_size", "mamba_d_state", "state_size", "ssm_state_size", "index_topk"),
        *("linear_key_head_dim", "linear_value_head_dim"),
    ),
    "rank": (
        *("q_lora_rank", "kv_lora_rank", "qk_head_dim", "mamba_d_head", "mamba_head_dim", "index_head_dim"),
        *("mamba_chunk_size", "chunk_size"),
    ),
    "expert": ("moe_intermediate_size", "shared_expert_intermediate_size"),
    "context": (
        *("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length", "context_length"),
    ),
    "one": (*("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups", "bos_token_id"),),
    "none": ("pad_token_id",),
}
_VALUES = {
    "vocabulary": VOCABULARY,
    "width": 32,
    "inner": 64,
    "layers": 3,
    "heads": 4,
    "pairs": 2,
    "head": 8,
    "rank": 16,
    "expert": 32,
    "context": 128,
    "one": 1,
    "none": 0,
}
_SIZE_OF = {name: _VALUES[size] for size, names in _SIZES.items() for name in names} | {"eos_token_id": 2}

_OMIT = object()  # the config works it out
_LATENT = {"head_dim": _OMIT}  # attention with latent keys
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _LATENT),
    **dict.fromkeys(("glm_moe_dsa", "minicpm3", "youtu"), _LATENT),
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "moe_num_experts": 4,
            "moe_top_k": 2,
            "ffn_act_fn": {"name": "silu"},
        },
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 3,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "global_head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    },
    "gpt2": {"n_inner": None},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "gptj": {"rotary_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "mlp"],
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 32,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh", "local"],
        "axial_pos_embds": False,
        "attention_head_size": 8,
        "feed_forward_size": 64,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 50,
        "shape_vocab_size": 50,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": _HYBRID,
        "num_mem_blocks": 1,
        "n_mamba_heads": 4,
        "num_key_value_heads": 4,
        "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def build(kind: str, **overrides: Any) -> Any:
    """A random network of one architecture, the same every time."""
    known: set[str] = set()
    for cls in type(AutoConfig.for_model(kind)).__mro__:
        known |= set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "__annotations__", {}))
    settings = {name: value for name, value in _SIZE_OF.items() if name in known}
    if "kv_lora_rank" in known:
        settings["num_key_value_heads"] = 4
    settings |= _SPECIAL.get(kind, {}) | overrides
    config = AutoConfig.for_model(kind, **{name: value for name, value in settings.items() if value is not _OMIT})
    if kind == "dbrx":
        config.attn_config.rope_theta = 10000.0
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # what is zero, one or tiny at first would hide mistakes
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return network
