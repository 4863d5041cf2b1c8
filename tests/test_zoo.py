"""Every causal architecture that transformers knows and that can be built small: replayed exactly and accounted for to
the last weight, or refused by name. docs/architectures.md says which is which."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zoo
from torch import Tensor

import prunella
from prunella import stream as stream_module
from prunella.errors import DefectError
from prunella.stream import Stream
from prunella.tasks.text import wrap_model

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"


def listed() -> dict[str, list[str]]:
    """{heading: the architectures below it}, as the page has them."""
    sections = re.split(r"^## (.*)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    text = dict(zip(sections[::2], sections[1::2], strict=True))
    return {
        heading: [name for name in re.findall(r"`([^`]+)`", body) if name in zoo.KINDS]
        for heading, body in text.items()
        if heading in ("Pruned", "Refused", "Not tried")  # of causal language models
    }


LISTED = listed()


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Six windows that make three batches of one shape."""
    monkeypatch.setattr(stream_module, "TOKENS", 48)
    return tiny.token_windows(6, 24)


def test_the_page_lists_every_architecture_once() -> None:
    names = [name for section in LISTED.values() for name in section]
    assert sorted(names) == sorted(zoo.KINDS)
    assert set(LISTED) == {"Pruned", "Refused", "Not tried"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", LISTED["Pruned"])
def test_blocks_are_replayed_exactly_and_every_weight_is_accounted_for(kind: str, windows: Tensor) -> None:
    network = zoo.build(kind)
    model = wrap_model(network)
    orders: list[Any] = ["block", "layer"]
    for order in orders:
        stream = Stream(model, windows, order=order)
        for _, block in model.walk():
            stream.advance(block)
        for number, batch in enumerate(stream.batches):
            with torch.no_grad():
                whole = network(**batch, use_cache=False).logits
            assert torch.equal(stream.outputs(number).logits, whole)
    report = prunella.prune(model, {"steps": ["wanda"]}, calibration=windows)
    matrices = {id(p): p for name in model.blocks for p in model.module(name).parameters() if p.ndim > 1}.values()
    assert report.weights >= sum(p.numel() for p in matrices)  # what blocks share counts in each
    if report.weights == sum(p.numel() for p in matrices):
        zeros = sum(int((p == 0).sum()) for p in matrices)
        assert report.sparsity == pytest.approx(zeros / report.weights, abs=1e-9)
    for layer in report.layers:
        assert layer.sparsity == pytest.approx(0.5, abs=0.5 / layer.shape[1] + 1e-9), layer.name


@pytest.mark.slow
@pytest.mark.parametrize("kind", LISTED["Refused"])
def test_what_cannot_be_is_refused_by_name(kind: str, windows: Tensor) -> None:
    network = zoo.build(kind)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises((prunella.ModelError, DefectError)) as caught:
        prunella.prune(wrap_model(network), {"steps": ["wanda"]}, calibration=windows)
    said = str(caught.value)
    assert type(network).__name__ in said or network.config.model_type in said or "was not seen at work" in said
    assert "\n" not in str(caught.value)
    if isinstance(caught.value, prunella.ModelError):  # before any work
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
