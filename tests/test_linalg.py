from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from prunella import NumericalError, Stats
from prunella.linalg import inverse_factor


def stats_of(x_TI: Tensor) -> Stats:
    return Stats.of(x_TI, frozenset({"gram"}))


def damped(x_TI: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) * I, the plain way, in float64."""
    x = x_TI.double()
    hessian_II = x.T @ x / len(x)
    return hessian_II + damping * hessian_II.diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)


@pytest.fixture
def x_TI() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(200, 24) @ torch.randn(24, 24) * 0.3


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_the_factor_is_upper_triangular_and_squares_to_the_inverse(x_TI: Tensor, damping: float) -> None:
    factor = inverse_factor(stats_of(x_TI), damping)
    upper_II = factor.upper_II.double()
    assert torch.equal(upper_II, upper_II.triu())
    torch.testing.assert_close(upper_II.T @ upper_II, damped(x_TI, damping).inverse(), rtol=1e-3, atol=1e-3)
    assert factor.damping == damping


def test_the_squared_diagonal_is_the_pivot_of_each_trailing_submatrix(x_TI: Tensor) -> None:
    upper_II = inverse_factor(stats_of(x_TI), 0.01).upper_II
    hessian_II = damped(x_TI, 0.01)
    expected = [hessian_II[j:, j:].inverse()[0, 0] for j in range(24)]
    torch.testing.assert_close(upper_II.diagonal().double().square(), torch.stack(expected), rtol=1e-3, atol=0)


def test_an_order_permutes_the_columns_first(x_TI: Tensor) -> None:
    order_I = torch.randperm(24)
    factor = inverse_factor(stats_of(x_TI), 0.01, order_I)
    plain = inverse_factor(stats_of(x_TI[:, order_I]), 0.01)
    torch.testing.assert_close(factor.upper_II, plain.upper_II, rtol=1e-3, atol=1e-3)


def test_damping_grows_tenfold_until_a_rank_deficient_hessian_factors() -> None:
    x_TI = torch.ones(8, 16)  # rank one, and its Cholesky fails exactly
    assert torch.linalg.cholesky_ex(x_TI.T @ x_TI).info > 0
    factor = inverse_factor(stats_of(x_TI), 0.0)
    assert torch.isfinite(factor.upper_II).all()
    assert factor.damping >= 1e-6
    power = torch.log10(torch.tensor(factor.damping)).item()
    assert power == pytest.approx(round(power), abs=1e-3)


def test_dead_inputs_are_found_and_do_not_spoil_the_rest(x_TI: Tensor) -> None:
    x_TI = x_TI.clone()
    x_TI[:, [3, 17]] = 0
    live = [i for i in range(24) if i not in (3, 17)]
    factor = inverse_factor(stats_of(x_TI), 0.01)
    assert factor.dead_I.nonzero().flatten().tolist() == [3, 17]
    alone = inverse_factor(stats_of(x_TI[:, live]), 0.01)
    torch.testing.assert_close(factor.upper_II[live][:, live], alone.upper_II, rtol=1e-4, atol=1e-4)


def test_a_hessian_that_is_all_zero_still_factors() -> None:
    factor = inverse_factor(stats_of(torch.zeros(5, 8)), 0.01)
    assert factor.dead_I.all()
    assert torch.isfinite(factor.upper_II).all()


@pytest.mark.parametrize("dead", [(), (5,)])
def test_scaling_the_activations_scales_the_factor_and_nothing_else(x_TI: Tensor, dead: tuple[int, ...]) -> None:
    x_TI = x_TI.clone()
    x_TI[:, list(dead)] = 0
    one, small = inverse_factor(stats_of(x_TI), 0.01), inverse_factor(stats_of(x_TI / 1024), 0.01)
    torch.testing.assert_close(small.upper_II / 1024, one.upper_II, rtol=1e-3, atol=1e-5)


def test_the_factor_is_made_once_for_all_layers_with_this_input(x_TI: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a, **k: calls.append(1) or cholesky(*a, **k))
    stats = stats_of(x_TI)
    assert inverse_factor(stats, 0.01) is inverse_factor(stats, 0.01)
    assert len(calls) == 1
    assert inverse_factor(stats, 0.02) is not inverse_factor(stats, 0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_an_error(x_TI: Tensor, bad: float) -> None:
    x_TI = x_TI.clone()
    x_TI[0, 0] = bad
    with pytest.raises(NumericalError, match="finite"):
        inverse_factor(stats_of(x_TI), 0.01)
