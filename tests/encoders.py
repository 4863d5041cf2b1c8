"""Tiny random encoders and classifiers, and a tokenizer for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as t
from nets import shaken

VOCABULARY = 320
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_ENDS: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {}),
    "roberta": ("roberta", {"type_vocab_size": 1}),
    "distilbert": ("distilbert", {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}),
    "electra": ("electra", {"embedding_size": 16}),
    "deberta": ("deberta-v2", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}),
    "albert": ("albert", {"embedding_size": 16}),
    "mpnet": ("mpnet", {}),
    "modernbert": ("modernbert", {"global_attn_every_n_layers": 2, "local_attention": 8, **_ENDS}),
    "llama": ("llama", {"num_key_value_heads": 2, "pad_token_id": None}),
}


SENTENCES = {  # the files of a sentence transformer
    "modules.json": json.dumps(
        [
            {"path": path, "type": f"sentence_transformers.models.{path[2:] or 'Transformer'}"}
            for path in ("", "1_Pooling")
        ]
    ),
    "1_Pooling/config.json": json.dumps({"pooling_mode_mean_tokens": True}),
    "config_sentence_transformers.json": "{}",
}


def build(kind: str, head: str = "SequenceClassification", **overrides: Any) -> Any:
    """A random network with this head of transformers (`AutoModelFor…`), or with none; the same every time."""
    model_type, own = CONFIGS[kind]
    config = t.AutoConfig.for_model(model_type, **{**_COMMON, **own, **overrides})
    auto: Any = getattr(t, f"AutoModelFor{head}" if head else "AutoModel")
    torch.manual_seed(0)
    return shaken(auto.from_config(config, dtype=torch.float32, attn_implementation="eager"))


def write_tokenizer(directory: Path) -> None:
    """Words of Python's own documentation, with the special tokens of an encoder, pairs and all."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([topics[key] for key in sorted(topics)[:20]], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    fast = t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, model_input_names=inputs, **names)
    fast.save_pretrained(directory)


def write(directory: Path, network: Any, files: Mapping[str, str] | None = None) -> Path:
    """A directory with this network, the tokenizer, and files beside."""
    network.save_pretrained(directory)
    write_tokenizer(directory)
    for name, text in (files or {}).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text, encoding="utf-8")
    return directory
