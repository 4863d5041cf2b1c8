from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.mark.parametrize(
    ("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5), ("4x4", 0.5)]
)
def test_it_beats_sparsegpt_and_the_best_weights_on_wandas_mask(
    case: Callable[..., Any], pattern: str, sparsity: float
) -> None:
    given = case(rows=32, columns=64, pattern=pattern, sparsity=sparsity)
    after = given.apply("alps")
    assert after.loss < given.apply("sparsegpt").loss
    assert after.loss < given.apply("wanda").apply("update", iterations=100).loss


def test_on_a_mask_that_stands_it_is_conjugate_gradients(case: Callable[..., Any]) -> None:
    start = case().apply("wanda")
    after = start.apply("alps", solve=20)
    assert torch.equal(after.layer.mask_OI, start.layer.mask_OI)
    torch.testing.assert_close(after.layer.weight_OI, start.apply("update", tolerance=1e-4).layer.weight_OI)


def test_the_scale_of_the_inputs_does_not_matter(case: Callable[..., Any]) -> None:
    from dataclasses import replace

    from prunella import Stats

    given = case()
    stats = Stats.of(given.x_TI * 64, frozenset({"gram", "norm", "moments"}))
    scaled = type(given)(replace(given.layer, stats=stats), given.x_TI)
    assert torch.equal(scaled.apply("alps").layer.mask_OI, given.apply("alps").layer.mask_OI)


def test_dead_inputs_are_no_trouble(case: Callable[..., Any]) -> None:
    after = case(changes={3: 0.0, 9: 0.0}).apply("alps")
    assert torch.isfinite(after.layer.weight_OI).all()
    assert after.zeros_O.sum() == after.layer.mask_OI.numel() // 2
