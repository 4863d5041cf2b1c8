"""Causal language models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..model.network import Model
from ..samples import Batch, Samples
from .task import Task


class Text(Task):
    """Predict the next token of a text."""

    name = "text"

    def open(self, name: str, **options: Any) -> Model:
        from ..model.open import load_model

        return load_model(name, **options)

    def samples(self, model: Model, source: str, count: int, *, length: int = 2048, **options: Any) -> Samples:
        from ..calibrate import windows

        return Samples.of(windows(model, source, count, length, **options))

    def example(self, network: nn.Module) -> Batch:
        return {"input_ids": torch.arange(8)[None]}

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
        return network(**batch, use_cache=False, **options)

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        pairs = zip(outputs.logits, batch["input_ids"].to(outputs.logits.device), strict=True)
        return torch.stack([functional.cross_entropy(logits[:-1].float(), ids[1:]) for logits, ids in pairs])
