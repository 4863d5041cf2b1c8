"""Networks for pictures, and encoders of texts: replayed exactly, accounted for to the last weight, pruned by every
step and loaded again where they came from."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from torch import nn

import prunella
from prunella import register_task
from prunella.errors import DefectError
from prunella.layers import survey
from prunella.model.network import Model
from prunella.registry import steps
from prunella.samples import Samples
from prunella.stream import Stream
from prunella.trees import tensors

ALL = [pytest.param(kind, marks=() if kind in families.QUICK else pytest.mark.slow) for kind in families.KINDS]


def test_the_page_lists_every_family_once() -> None:
    page = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    text = page[page.index("## Networks for pictures") :]
    pruned, refused = (
        re.subn(r"Refused: .*?\n(?=\n|$)", "", text, flags=re.DOTALL)[0],
        re.findall(r"Refused: ([^,]*),", text),
    )
    assert set(re.findall(r"`((?:timm )?[a-z][\w-]+)`", pruned)) - {"outside", "model"} == set(families.KINDS)
    assert {name for line in refused for name in re.findall(r"`([^`]+)`", line)} == set(families.REFUSED)


def wrapped(kind: str, network: nn.Module | None = None) -> tuple[Model, Samples]:
    samples = Samples.of(families.groups_of(kind))
    net = families.build(kind) if network is None else network
    register_task("first")(families.First)
    task = families.First()
    task.batch = samples.groups[0]
    return Model(net, None, None, next(net.parameters()).device, "test", task), samples


def assert_walked(model: Model, samples: Samples) -> None:
    stream = Stream(model, samples)
    for _, block in model.walk():
        stream.advance(block)
    for number, batch in enumerate(stream.batches):
        with torch.no_grad():
            whole = tensors(model.task.run(model.network, batch))
        found = tensors(stream.outputs(number))
        assert len(found) == len(whole) > 0
        assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("kind", ALL)
def test_blocks_are_replayed_exactly(kind: str) -> None:
    model, samples = wrapped(kind)
    assert model.undivided == (kind in families.WHOLE)
    assert_walked(model, samples)


@pytest.mark.parametrize("kind", ALL)
def test_every_weight_is_a_layer_or_named(kind: str) -> None:
    """Of each matrix it is said whether it is a layer, left out and why, or outside of the blocks; of each one once."""
    model, samples = wrapped(kind)
    report = prunella.prune(model, {"steps": ["magnitude"], "evaluate": {"source": None}}, calibration=samples)
    matrices = {name: p.numel() for name, p in model.network.named_parameters() if p.ndim > 1}
    found = [survey(model.module(block), block) for block in model.blocks]
    parameters = {slot.key for slots, _ in found for slot in slots}
    left = {item.name for _, some in found for item in some}
    outside = set(report.model["outside"])
    assert parameters | left | outside == set(matrices)
    assert len(parameters) + len(left) + len(outside) == len(matrices)
    assert {item.name for item in report.left_out} == left
    assert report.weights == sum(size for name, size in matrices.items() if name not in outside)
    assert sum(report.model["outside"].values()) == sum(matrices[name] for name in outside)
    assert sum(report.model["outside"].values()) < 0.6 * sum(matrices.values())
    zeros = sum(int((p == 0).sum()) for n, p in model.network.named_parameters() if n in matrices and n not in outside)
    assert report.sparsity == pytest.approx(zeros / report.weights, abs=1e-9)


@pytest.mark.parametrize("kind", ALL)
def test_half_of_each_layer_goes_by_products_and_back_comes_the_same_network(kind: str, tmp_path: Path) -> None:
    model, samples = wrapped(kind)
    report = prunella.prune(
        model,
        {"steps": ["sparsegpt"], "evaluate": {"source": None}, "calibration": {"min_tokens": 1}},
        calibration=samples,
        output=tmp_path / "out",
    )
    for layer in report.layers:
        assert layer.sparsity == pytest.approx(0.5, abs=0.5 / layer.shape[1] + 1e-9), layer.name
        assert layer.tokens, layer.name
    network: Any = model.network
    if hasattr(network, "save_pretrained"):
        loaded: Any = type(network).from_pretrained(tmp_path / "out").eval()
        with torch.no_grad():
            for group in samples.groups:
                ours, theirs = (tensors(model.task.run(net, group)) for net in (network, loaded))
                for one, other in zip(ours, theirs, strict=True):  # tensors of a file lie otherwise in memory
                    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        found = loaded.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())


@pytest.mark.parametrize("kind", ALL)
def test_two_of_four_where_the_inputs_allow_it(kind: str) -> None:
    model, samples = wrapped(kind)
    slots = [slot for block in model.blocks for slot in survey(model.module(block), block)[0]]
    skip = [slot.name for slot in slots if slot.channels % 4]
    recipe = {"steps": ["wanda"], "pattern": "2:4", "skip": skip, "calibration": {"min_tokens": 1}}
    report = prunella.prune(model, {**recipe, "evaluate": {"source": None}}, calibration=samples)
    pruned = {layer.name for layer in report.layers if layer.target}
    assert pruned
    for slot in slots:
        if slot.name in pruned:
            assert ((slot.read().reshape(-1, 4) != 0).sum(1) <= 2).all(), slot.name


STEPS = [
    pytest.param(kind, name, marks=() if kind == "swin" else pytest.mark.slow)
    for kind, name in itertools.product(("swin", "mobilenet_v2", "albert", "deberta", "timm densenet"), sorted(steps))
]


@pytest.mark.parametrize(("kind", "name"), STEPS)
def test_every_step(kind: str, name: str) -> None:
    model, samples = wrapped(kind)
    before = [] if steps[name].prunes else ["wanda"]
    recipe = {"steps": [*before, name], "evaluate": {"source": None}, "calibration": {"min_tokens": 1}}
    report = prunella.prune(model, recipe, calibration=samples)
    active = [layer for layer in report.layers if layer.target]
    share = sum(layer.sparsity * layer.size for layer in active) / sum(layer.size for layer in active)
    assert share == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("kind", families.REFUSED)
def test_what_cannot_be_is_refused_by_name_before_any_work(kind: str) -> None:
    network = families.build(kind)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    model, samples = wrapped(kind, network)
    with pytest.raises((prunella.ModelError, DefectError), match=families.REFUSED[kind][1]) as caught:
        prunella.prune(model, {"steps": ["wanda"], "evaluate": {"source": None}}, calibration=samples)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
