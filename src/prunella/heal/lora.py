"""LoRA, kept apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pydantic import PositiveFloat, PositiveInt
from safetensors.torch import save_file
from torch import Tensor

from ..errors import InputError
from ..lenses import Stored
from ..train.parts import Change, Chosen, LowRank, Part, trains


class Lora(LowRank):
    """W + c B A: not sparse, so it is never merged."""

    apart = True


@trains("lora")
def lora(
    part: Part, *, rank: PositiveInt = 16, alpha: PositiveFloat | None = None, rate: float = 4e-3
) -> Change | None:
    """Train W + c B A of the pruned layers and keep it apart: the model stays as it is, the adapter is saved beside
    it in PEFT's format.

    Args:
        rank: r, columns of B and rows of A.
        alpha: c = alpha / r; None: c = 2.
        rate: learning rate.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
    """
    if part.mask is None:
        return None
    if part.value.ndim != 2:
        what = "experts" if part.lens is None or isinstance(part.lens, Stored) else "a convolution"
        raise InputError(f"'{part.name}' holds {what}, which PEFT's format has no place for: use mask-lora.")
    return Lora(part, rank, alpha)


def undo(apart: Sequence[Chosen]) -> None:
    """Let these change nothing, as before the first step."""
    for item in apart:
        change = item.change
        assert isinstance(change, LowRank)
        (change.right if change.transposed else change.left).data.zero_()
        change.forget()


def save_adapter(folder: Path, apart: Sequence[Chosen], base: str, language: bool = True) -> None:
    """LoRA in PEFT's format: `adapter_model.safetensors` and `adapter_config.json`."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    transposed = False
    for item in apart:
        owner, _, _ = item.part.name.rpartition(".")
        change = item.change
        assert isinstance(change, LowRank)
        left, right = change.left.data, change.right.data
        a_RI, b_OR = (left.T, right.T) if change.transposed else (right, left)
        tensors[f"base_model.model.{owner}.lora_A.weight"] = a_RI.contiguous()
        tensors[f"base_model.model.{owner}.lora_B.weight"] = b_OR.contiguous()
        ranks[owner] = left.shape[1]  # less than what was asked for where a layer has fewer rows or columns
        alphas[owner] = change.scale * ranks[owner]
        transposed = change.transposed
    rank, alpha = max(ranks.values()), max(alphas.values())
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if language else None,
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {name: own for name, own in alphas.items() if own != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "target_modules": list(ranks),
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
