"""Every architecture, from the files of a pruned model to the files of a healed one, both ways."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from healing import settings, zeros_of
from transformers import AutoModelForCausalLM

import prunella

SETTINGS = {"retrain": {"tokens": 256, "held_out": 2}, "reconstruct": {"rate": 3e-3}}


@pytest.mark.parametrize("way", SETTINGS)
@pytest.mark.parametrize("architecture", tiny.at_length(tiny.ARCHITECTURES))
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


SHARDED = """
import sys
from pathlib import Path

import tiny, torch
from torch import distributed as dist

import prunella
from healing import SETTINGS
from prunella.heal import make_group
from prunella.heal.masks import masks_of
from prunella.train.parts import attach, choose, parts_of, trained
from prunella.train.shard import gather, is_sharded, shard, whole
from prunella.tasks.loss import next_token_loss

where, names, ids = sys.argv[1], sys.argv[2:], tiny.token_windows(2, 24)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def made(directory, sharded):
    model = prunella.load_model(directory, device="cpu")
    masks, groups = masks_of(model, Path(directory)), [make_group("all")]
    torch.manual_seed(0)
    if sharded:
        chosen = shard(model, groups, masks)
    else:
        model.load(lambda name: True)
        chosen = choose(parts_of(model, masks), groups)
        attach(chosen)
    assert is_sharded(model.network) == sharded
    before = gather(trained(chosen))
    loss = next_token_loss(model.network(input_ids=ids, use_cache=False).logits, ids)
    loss.backward()
    slopes = {
        f"{item.part.name}.{key}": whole(parameter.grad)
        for item in chosen
        for key, parameter in item.change.named_parameters()
        if parameter.grad is not None
    }
    return loss.item(), before, slopes


for architecture in names:
    tiny.build(architecture).save_pretrained(f"{where}/{architecture}/dense")
    recipe = {**SETTINGS, "steps": ["magnitude"], "calibration": {"samples": 1, "length": 32}, "heal": {}}
    tiny.write_tokenizer(Path(where) / architecture / "dense")
    prunella.prune(f"{where}/{architecture}/dense", recipe, output=f"{where}/{architecture}/pruned")
    one, two = (made(f"{where}/{architecture}/pruned", sharded) for sharded in (False, True))
    assert one[0] == two[0], (architecture, one[0], two[0])
    for first, second in zip(one[1:], two[1:], strict=True):
        assert first.keys() == second.keys(), (architecture, first.keys() ^ second.keys())
        for name in first:
            assert torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-7), (architecture, name)
    print(architecture)
"""


@pytest.mark.parametrize("which", tiny.at_length(["some", "others"], ["some"]))
def test_shares_of_it_train_as_the_whole(which: str, python: Callable[..., Any], tmp_path: Path) -> None:
    """Every weight has its place in a share, with the slope it has without: experts, transposed and tied ones too."""
    names = [name for name in tiny.ARCHITECTURES if (name in tiny.QUICK) == (which == "some")]
    done = python(f"import sys; sys.path.insert(0, {str(Path(tiny.__file__).parent)!r})\n{SHARDED}", tmp_path, *names)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == names
