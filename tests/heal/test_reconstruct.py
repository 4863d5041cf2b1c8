"""Reconstruction block by block."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import nets
import pytest
import tiny
import torch
from healing import settings, zeros_of
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import prunella
from prunella import InputError, Recipe, registry
from prunella.heal import reconstruct
from prunella.pruning import prune_once
from prunella.registry import make, register
from prunella.types import Block


def output_error(directory: Path, dense: Path, ids: Tensor) -> float:
    """Mean squared distance of the last hidden states to the dense model's."""
    hidden = [AutoModelForCausalLM.from_pretrained(path).model(ids)[0].detach() for path in (directory, dense)]
    return float((hidden[0] - hidden[1]).square().mean())


@pytest.mark.parametrize(
    ("train", "part"),
    [("all", "block"), ("all", "sub-block"), ("mask-lora", "block"), ("norms", "block"), ("new-biases", "block")],
)
def test_the_outputs_come_nearer_to_the_dense_ones_and_no_zero_is_lost(
    train: str, part: str, dense: Path, pruned: Path, tmp_path: Path
) -> None:
    recipe = settings(train=[train], way="reconstruct", part=part, epochs=8, rate=2e-3)
    report = prunella.heal(pruned, recipe, output=tmp_path / "out")
    model = prunella.load_model(str(dense))
    ids = prunella.calibrate.windows(model, "pydoc", 4, 32)  # type: ignore[attr-defined]
    assert output_error(tmp_path / "out", dense, ids) < output_error(pruned, dense, ids)
    kept, zeros = zeros_of(pruned), zeros_of(tmp_path / "out")
    assert all(torch.equal(zeros[name], kept[name]) for name in kept)
    assert 0 < report.healing["trained"] < 1
    for losses in report.healing["losses"].values():
        assert sum(losses[-4:]) < sum(losses[:4])  # the last pass over the windows, the first


def test_as_a_step_it_lowers_the_error_of_what_was_pruned_before() -> None:
    ids = tiny.token_windows(6, 24)
    errors = {}
    for steps in (["magnitude"], ["magnitude", {"reconstruct": {"epochs": 8, "rate": 3e-3}}]):
        network, dense = tiny.build("llama"), tiny.build("llama")
        prunella.prune(network, {"steps": steps, "order": "block"}, calibration=ids)
        with torch.no_grad():
            errors[len(steps)] = float((network.model(ids)[0] - dense.model(ids)[0]).square().mean())
    assert errors[2] < 0.9 * errors[1]


@pytest.mark.parametrize("kind", ["resnet", "bert", "whisper"])
def test_samples_of_one_shape_run_together_as_they_do_alone(kind: str) -> None:
    samples = nets.samples_of(kind, 5)
    found: list[tuple[float, int]] = []

    @register("together", needs={"dense", "targets"})
    def together(block: Block) -> Block:
        """Compare."""
        assert block.run is not None
        assert block.dense is not None
        assert block.pieces is not None
        weights = {layer.name: layer.weight_OI * 0.9 for layer in block.layers}
        pieces = block.pieces(2)
        assert sorted(n for some in pieces for n in ((some,) if isinstance(some, int) else some)) == list(
            range(len(samples))
        )
        assert block.pieces(1) == list(range(len(samples)))
        for some in pieces:
            assert isinstance(some, tuple)
            for at in (partial(block.run, weights), block.dense):
                alone = torch.cat([at(n) for n in some])
                found.append((float((at(some) - alone).abs().max() / alone.abs().max()), len(some)))
        return make("magnitude").apply(block)

    try:
        recipe = Recipe.of({"task": "module", "steps": ["together"], "order": "block", "evaluate": {"source": None}})
        network = nets.build(kind)
        prune_once(network, recipe, calibration=samples, task=nets.Sum(samples.groups[0]))
    finally:
        del registry.steps["together"]
    assert max(apart for apart, _ in found) < 1e-5
    assert {size for _, size in found} == {1, 2}


def test_steps_of_several_samples_come_nearer_too() -> None:
    ids_NL = tiny.token_windows(7, 24)
    errors = {}
    for batch in (0, 3):
        network, dense = tiny.build("llama"), tiny.build("llama")
        more = [{"reconstruct": {"epochs": 20, "batch": batch, "rate": 3e-3}}] if batch else []
        prunella.prune(network, {"steps": ["magnitude", *more], "order": "block"}, calibration=ids_NL)
        with torch.no_grad():
            errors[batch] = float((network.model(ids_NL)[0] - dense.model(ids_NL)[0]).square().mean())
    assert errors[3] < 0.9 * errors[0]


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_what_it_aims_at_is_what_the_dense_model_puts_out_there(architecture: str) -> None:
    ids_NL = tiny.token_windows(40, 64)
    seen: dict[int, list[Tensor]] = {}

    @register("looking", needs={"dense", "targets"})
    def looking(block: Block) -> Block:
        """Remember where it should go."""
        assert block.dense is not None
        assert block.targets is not None
        seen[block.index] = [torch.cat([at(n) for n in range(block.windows)]) for at in (block.dense, block.targets)]
        return make("magnitude").apply(block)

    try:
        prunella.prune(tiny.build(architecture), {"steps": ["looking"]}, calibration=ids_NL)
    finally:
        del registry.steps["looking"]
    with torch.no_grad():
        states = tiny.build(architecture)(ids_NL, output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(seen[0][0], states[1])
    torch.testing.assert_close(seen[0][1], states[1])  # the first block gets what the dense one gets
    last = [tiny.build(architecture).base_model.norm(state) for state in seen[1]]
    torch.testing.assert_close(last[0], states[2])
    assert (last[1] - states[2]).abs().max() > 1e-3


def test_both_aims_are_the_same_in_the_first_block_and_not_in_the_second() -> None:
    ids_NL = tiny.token_windows(6, 24)
    found = {}
    for aim in ("model", "block"):
        network = tiny.build("llama")
        prunella.prune(network, {"steps": ["magnitude", {"reconstruct": {"aim": aim}}]}, calibration=ids_NL)
        found[aim] = [block.mlp.down_proj.weight.detach() for block in network.model.layers]
    one, two = found.values()
    torch.testing.assert_close(one[0], two[0])
    assert not torch.allclose(one[1], two[1])


def test_a_step_on_blocks_may_replace_any_of_their_tensors() -> None:
    ids = tiny.token_windows(4, 24)
    network = tiny.build("llama")
    before = {name: p.clone() for name, p in network.named_parameters()}
    steps: list[Any] = ["magnitude", {"reconstruct": {"train": ["norms"], "rate": 0.01}}]
    prunella.prune(network, {"steps": steps, "order": "block"}, calibration=ids)
    changed = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in changed if "norm" in name} == {n for n in before if "layernorm" in n}


def test_sub_blocks_leave_the_tensors_between_them_alone(pruned: Path, tmp_path: Path) -> None:
    recipe = settings(train=["all"], way="reconstruct", part="sub-block")
    prunella.heal(pruned, recipe, output=tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (pruned, tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}


def test_sub_blocks_take_the_default_methods_of_which_some_find_nothing_in_them(pruned: Path, tmp_path: Path) -> None:
    report = prunella.heal(pruned, settings(way="reconstruct", part="sub-block"), output=tmp_path / "out")
    assert 0 < report.healing["trained"] < 1


def test_gradients_in_float16_do_not_vanish(ids: Tensor) -> None:
    """Of outputs as many as a large model's, a mean has gradients that float16 rounds to zero."""
    network = tiny.build("llama", dtype=torch.float16)
    before = {name: p.clone() for name, p in network.named_parameters() if "proj" in name}
    many = ids[:1].repeat(8, 40)
    steps: list[Any] = ["magnitude", {"reconstruct": {"rate": 0.01}}]
    prunella.prune(network, {"steps": steps, "order": "block"}, calibration=many)
    for name, parameter in network.named_parameters():
        if name in before:
            kept = parameter != 0
            assert (parameter[kept] != before[name][kept]).float().mean() > 0.9, name


def test_wrong_names_and_rates_are_found_before_anything_is_done() -> None:
    with pytest.raises(InputError, match="unknown healing method 'nonsense'"):
        prunella.Recipe.of({"steps": ["wanda", {"reconstruct": {"train": ["nonsense"]}}]})
    with pytest.raises(InputError, match=r"rate"):
        prunella.Recipe.of({"steps": ["wanda", {"reconstruct": {"rate": 5}}]})


def test_blocks_that_are_done_stay_when_a_later_one_fails(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = reconstruct.fit, []

    def fail_second(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise InputError("the disk is full")
        return real(*arguments, **options)

    recipe = settings(train=["all"], way="reconstruct")
    with monkeypatch.context() as patch:
        patch.setattr(reconstruct, "fit", fail_second)
        with pytest.raises(InputError):
            prunella.heal(pruned, recipe, output=tmp_path / "out")
    prunella.heal(pruned, recipe, output=tmp_path / "out", resume=True)
    prunella.heal(pruned, recipe, output=tmp_path / "whole")
    one, two = (tmp_path / name / "model.safetensors" for name in ("out", "whole"))
    assert one.read_bytes() == two.read_bytes()


def test_what_it_cannot_do_is_said(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="kept apart"):
        prunella.heal(pruned, settings(train=["lora"], way="reconstruct"), output=tmp_path / "out")
    with pytest.raises(InputError, match="'head' finds nothing"):
        prunella.heal(pruned, settings(train=["head"], way="reconstruct"), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
