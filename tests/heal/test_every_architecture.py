"""Every architecture, from the files of a pruned model to the files of a healed one, both ways."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from healing import settings, zeros_of
from transformers import AutoModelForCausalLM

import prunella

SETTINGS = {"retrain": {"tokens": 256, "held_out": 2}, "reconstruct": {"rate": 3e-3}}


@pytest.mark.parametrize("way", SETTINGS)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_all_of_it_heals_and_no_zero_is_lost(architecture: str, way: str, tmp_path: Path) -> None:
    tiny.build(architecture).save_pretrained(tmp_path / "dense", max_shard_size="24KB")
    tiny.write_tokenizer(tmp_path / "dense")
    recipe = settings(train=["all"], way=way, **SETTINGS[way]) | {"steps": ["magnitude"]}
    prunella.prune(str(tmp_path / "dense"), recipe | {"heal": {}}, output=tmp_path / "pruned")
    report = prunella.heal(tmp_path / "pruned", recipe, output=tmp_path / "healed")
    kept, zeros = zeros_of(tmp_path / "pruned"), zeros_of(tmp_path / "healed")
    assert all(torch.equal(zeros[name], kept[name]) for name in kept)
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("pruned", "healed")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {layer.name for layer in report.layers if layer.sparsity} <= {
        name.removesuffix(".weight") for name in changed
    } | {f"{name}.{expert}" for name in changed for expert in range(8)}
