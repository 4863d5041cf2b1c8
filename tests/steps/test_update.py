from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x4"])
def test_many_iterations_reach_the_closed_form(case: Callable[..., Any], pattern: str) -> None:
    before = case(pattern=pattern).apply("wanda")
    after = before.apply("update", iterations=200, damping=0.01).layer
    h_II = before.x_TI.double().T @ before.x_TI.double() / len(before.x_TI)
    h_II += 0.01 * h_II.diagonal().mean() * torch.eye(len(h_II))
    for o, mask_I in enumerate(after.mask_OI):
        goal = (h_II @ after.dense_OI[o].double())[mask_I]
        exact = torch.linalg.solve(h_II[mask_I][:, mask_I], goal)
        torch.testing.assert_close(after.weight_OI[o, mask_I].double(), exact, rtol=1e-3, atol=1e-4)


def test_more_iterations_are_never_worse(case: Callable[..., Any]) -> None:
    before = case(rows=24, columns=64).apply("magnitude")
    losses = [before.apply("update", iterations=n, damping=0.0).loss for n in (0, 1, 2, 4, 8, 16, 64)]
    assert losses[0] == before.loss
    assert losses == sorted(losses, reverse=True)
    assert losses[4] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_row_gets_worse_however_often_it_is_updated(case: Callable[..., Any], dtype: torch.dtype) -> None:
    given = case(dtype=dtype).apply("sparsegpt")
    for _ in range(3):
        after = given.apply("update", damping=0.0)
        assert (after.loss_O <= given.loss_O * (1 + 1e-5)).all()
        assert torch.equal(after.layer.mask_OI, given.layer.mask_OI)
        assert (after.layer.weight_OI[~after.layer.mask_OI] == 0).all()
        given = after


def test_a_full_mask_gives_the_dense_weight_back(case: Callable[..., Any]) -> None:
    given = case()
    full_OI = torch.ones_like(given.layer.weight_OI, dtype=torch.bool)
    spoilt = type(given)(given.layer.pruned(given.layer.weight_OI * 0.5, full_OI), given.x_TI)
    after = spoilt.apply("update", iterations=100).layer
    torch.testing.assert_close(after.weight_OI, given.layer.weight_OI, rtol=1e-3, atol=1e-3)


def test_dead_inputs_are_no_trouble(case: Callable[..., Any]) -> None:
    for damping in (0.0, 0.01):
        after = case(changes={3: 0.0, 9: 0.0}).apply("wanda").apply("update", damping=damping)
        assert torch.isfinite(after.layer.weight_OI).all()
