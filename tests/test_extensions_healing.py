"""A healing method from a file of a third party's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from prunella import read_masks

TOY = f"{Path(__file__).parent / 'extensions' / 'toy_healing.py'}:toy"


def test_a_healing_method_from_a_file_trains_and_holds_the_masks(
    llama: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    pruned, healed = tmp_path / "pruned", tmp_path / "healed"
    quick = ("--evaluate", "none")
    assert run("prune", llama, "-o", pruned, "--step", "magnitude", *quick).code == 0
    words = ("--train", TOY, "--text", "pydoc", "--tokens", 512, "--length", 32, *quick)
    result = run("heal", pruned, "-o", healed, *words)
    assert result.code == 0, result.err
    before, after = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (pruned, healed))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    masks = read_masks(pruned)
    assert changed == {f"{name}.weight" for name in masks}
    for name, mask_OI in masks.items():
        assert (after[f"{name}.weight"][~mask_OI] == 0).all()
