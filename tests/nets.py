"""Tiny random networks of other kinds than language models, and what they are run on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

from prunella import Task
from prunella.model.network import Model
from prunella.samples import Batch, Samples

_SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_SIDES: dict[str, Any] = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"layers": 3, "attention_heads": 4, "ffn_dim": 64}.items()
}


class Sum(Task):
    """A task for any network: the loss of a sample is the mean square of what is put out for it."""

    name = "sum"

    def __init__(self, batch: Batch):
        self.batch = batch

    def samples(self, model: Model, source: str, count: int, **options: Any) -> Samples:
        return Samples.of(self.batch)

    def example(self, network: nn.Module) -> Batch:
        return {key: tensor[:1] for key, tensor in self.batch.items()}

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        out: Tensor = outputs if isinstance(outputs, Tensor) else outputs.logits
        return out.float().square().flatten(1).mean(1)


def pixels(samples: int, size: int = 32) -> Batch:
    return {"pixel_values": torch.randn(samples, 3, size, size)}


def tokens(samples: int, length: int = 12, name: str = "input_ids") -> Batch:
    return {name: torch.randint(2, 100, (samples, length))}


def _resnet() -> nn.Module:
    config = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16, 32], depths=[2, 2, 2], layer_type="basic")
    return t.ResNetForImageClassification(config)


def _efficientnet() -> nn.Module:
    config = t.EfficientNetConfig(
        width_coefficient=0.25,
        depth_coefficient=0.25,
        image_size=32,
        hidden_dim=320,
        in_channels=[32, 16, 24],
        out_channels=[16, 24, 40],
        kernel_sizes=[3, 3, 5],
        strides=[1, 2, 2],
        num_block_repeats=[1, 2, 2],
        expand_ratios=[1, 6, 6],
        depthwise_padding=[],
    )
    return t.EfficientNetForImageClassification(config)


def _swin() -> nn.Module:
    config = t.SwinConfig(image_size=32, patch_size=4, window_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4])
    return t.SwinForImageClassification(config)


def _convnext() -> nn.Module:
    config = t.ConvNextConfig(hidden_sizes=[8, 16, 32], depths=[1, 2, 1], num_stages=3)
    return t.ConvNextForImageClassification(config)


def _whisper() -> nn.Module:
    config = t.WhisperConfig(
        vocab_size=100,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        d_model=32,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
        **_SIDES,
    )
    return t.WhisperForConditionalGeneration(config)


def _t5() -> nn.Module:
    config = t.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4)
    return t.T5ForConditionalGeneration(config)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], list[Batch]]]] = {
    "resnet": (_resnet, lambda n: [pixels(n), pixels(n, 48)]),
    "efficientnet": (_efficientnet, lambda n: [pixels(n), pixels(n, 48)]),
    "convnext": (_convnext, lambda n: [pixels(n), pixels(n, 64)]),
    "vit": (
        lambda: t.ViTForImageClassification(t.ViTConfig(image_size=32, patch_size=8, **_SMALL)),
        lambda n: [pixels(n)],
    ),
    "swin": (_swin, lambda n: [pixels(n), pixels(n, 64)]),
    "bert": (
        lambda: t.BertForSequenceClassification(t.BertConfig(vocab_size=100, **_SMALL)),
        lambda n: [tokens(n), tokens(n, 7)],
    ),
    "t5": (_t5, lambda n: [tokens(n, k) | tokens(n, 5, "decoder_input_ids") for k in (12, 7)]),
    "whisper": (
        _whisper,
        lambda n: [{"input_features": torch.randn(n, 8, 32)} | tokens(n, k, "decoder_input_ids") for k in (5, 3)],
    ),
}


def shaken(network: nn.Module) -> nn.Module:
    """What is zero, one or tiny at first would hide mistakes."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor += 0.05 * torch.rand(tensor.shape, generator=generator)
    return network.eval()


def build(kind: str) -> nn.Module:
    """A random network, the same every time."""
    torch.manual_seed(0)
    return shaken(KINDS[kind][0]())


def samples_of(kind: str, count: int = 3) -> Samples:
    """Samples for it, in groups of different shapes where it takes them."""
    torch.manual_seed(1)
    return Samples.of(KINDS[kind][1](count))


def wrapped(network: nn.Module, samples: Samples) -> Model:
    """Any module as a model."""
    return Model(network, None, None, torch.device("cpu"), "test", Sum(samples.groups[0]))
