from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5)])
def test_it_beats_the_best_weights_on_magnitudes_and_wandas_mask(
    case: Callable[..., Any], pattern: str, sparsity: float
) -> None:
    given = case(rows=32, columns=64, pattern=pattern, sparsity=sparsity)
    after = given.apply("admm").apply("update")
    for start in ("magnitude", "wanda"):
        assert after.loss < given.apply(start).apply("update", iterations=100).loss


def test_on_a_mask_that_stands_it_comes_close_to_least_squares(case: Callable[..., Any]) -> None:
    start = case(rows=32, columns=64).apply("wanda")
    after = start.apply("admm", iterations=300, damping=0.01)
    assert torch.equal(after.layer.mask_OI, start.layer.mask_OI)
    assert after.loss == pytest.approx(start.apply("update", iterations=100, damping=0.01).loss, rel=0.05)


def test_the_gradual_mask_is_better_than_the_first_one(case: Callable[..., Any]) -> None:
    given = case(rows=32, columns=64, sparsity=0.7)
    assert given.apply("admm").loss < given.apply("admm", gradual=1).loss


def test_group_row_prunes_the_same_number_in_every_row(case: Callable[..., Any]) -> None:
    assert set(case().apply("admm", group="row").zeros_O.tolist()) == {16}


def test_dead_inputs_are_no_trouble(case: Callable[..., Any]) -> None:
    after = case(changes={3: 0.0, 9: 0.0}).apply("admm")
    assert torch.isfinite(after.layer.weight_OI).all()
    assert after.zeros_O.sum() == after.layer.mask_OI.numel() // 2
