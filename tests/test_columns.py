"""The column pass: C and torch do the same, and what it loses is what it says."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from prunella import Pattern, Stats, columns
from prunella.columns import plain_tile, tile_pass
from prunella.grid import Grid, fit, limit
from prunella.linalg import InverseFactor, inverse_factor
from prunella.machine import threaded
from prunella.native import library

NONE = Pattern()


def problem(rows: int, columns: int) -> tuple[Tensor, InverseFactor, Tensor]:
    """A weight, the factor of correlated inputs, and their damped Hessian in float64."""
    generator = torch.Generator().manual_seed(rows + columns)
    mix_II = torch.eye(columns) + torch.randn(columns, columns, generator=generator) / columns**0.5
    x_TI = torch.randn(4 * columns, columns, generator=generator) @ mix_II
    hessian_II = x_TI.double().T @ x_TI.double() / len(x_TI)
    hessian_II += 0.01 * hessian_II.diagonal().mean() * torch.eye(columns)
    factor = inverse_factor(Stats.of(x_TI, frozenset({"gram"})), 0.01)
    return torch.randn(rows, columns, generator=generator), factor, hessian_II


def check_tile(
    before_OB: Tensor,
    given_OB: Tensor,
    upper_BB: Tensor,
    pattern: Pattern | None,
    scale_O: Tensor | None,
    bits: int | None,
    w_OB: Tensor,
    mask_OB: Tensor,
    errors_BO: Tensor,
) -> None:
    """Every value follows, by the pass's definition in float64, from the errors that the tile itself made before it.

    Two passes need not agree: where a value lies in the middle between two of the grid, or two scores are the same up
    to rounding, either choice is right, and all that follows in its row is then another.
    """
    before_OB, upper_BB, w_OB, errors_BO = (t.double() for t in (before_OB, upper_BB, w_OB, errors_BO))
    diagonal_B, near = upper_BB.diagonal(), 1e-5 + 1e-5 * float(before_OB.abs().max())
    reached_OB = before_OB - errors_BO.T @ upper_BB.triu(1)
    if pattern is None:
        assert torch.equal(mask_OB, given_OB)
    else:
        for start in range(0, len(upper_BB), pattern.second):
            group = slice(start, start + pattern.second)
            then_OM = before_OB[:, group] - errors_BO[:start].T @ upper_BB[:start, group]
            score_OM, kept_OM = (then_OM / diagonal_B[group]).abs(), mask_OB[:, group]
            assert (kept_OM.sum(1) == pattern.first).all()
            least_O = score_OM.masked_fill(~kept_OM, torch.inf).amin(1)
            assert (score_OM.masked_fill(kept_OM, 0).amax(1) <= least_O + near / diagonal_B.min()).all()
    assert not w_OB[~mask_OB].any()
    if scale_O is None or bits is None:
        torch.testing.assert_close(w_OB, reached_OB * mask_OB, rtol=0, atol=near)
    else:
        scale_O1 = scale_O.double()[:, None].clamp(min=1e-38)  # of a row of zeros
        code_OB = (w_OB / scale_O1).round()
        torch.testing.assert_close(w_OB, code_OB * scale_O1, rtol=1e-6, atol=0)
        assert code_OB.abs().max() <= limit(bits)
        inside_OB = reached_OB.clamp(-limit(bits) * scale_O1, limit(bits) * scale_O1)
        assert ((w_OB - inside_OB).abs() <= scale_O1 / 2 + near)[mask_OB].all()
    torch.testing.assert_close(errors_BO.T * diagonal_B, reached_OB - w_OB, rtol=0, atol=near)


@pytest.fixture(params=[0, 1, 2], ids=["any", "avx2", "avx512"])
def compiled(request: pytest.FixtureRequest) -> Iterator[None]:
    kernels = library()
    if kernels is None:
        pytest.skip("no kernels were compiled")
    if kernels.prunella_sweep_use(request.param) < 0:
        pytest.skip("this processor lacks the instructions")
    yield
    kernels.prunella_sweep_use(-1)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("bits", [None, 8, 4, 3])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4", "2:3", "7:12"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 12), (16, 24), (37, 60), (64, 132)])
def test_tiles_in_c_and_in_torch_are_what_their_definition_says(
    rows: int, columns: int, pattern: str, bits: int | None
) -> None:
    chosen = None if pattern == "unstructured" else Pattern.parse(pattern)
    if chosen is not None and columns % chosen.columns:
        return
    whole_OI, factor, _ = problem(rows, columns + 5)  # tiles are parts of larger tensors
    scale_O = None if bits is None else whole_OI.abs().amax(1) * 0.8 / limit(bits)
    if scale_O is not None:
        scale_O[0] = 0  # a row whose kept weights were all zero
    mask_OI = torch.rand(rows, columns + 5) > 0.5
    for tile in (plain_tile, tile_pass):
        w_OI, m_OI = whole_OI.clone(), mask_OI.clone()
        at = slice(3, 3 + columns)
        upper_BB = factor.upper_II[at, at]
        errors_BO = tile(w_OI[:, at], upper_BB, m_OI[:, at], chosen, scale_O, bits)
        check_tile(
            whole_OI[:, at], mask_OI[:, at], upper_BB, chosen, scale_O, bits, w_OI[:, at], m_OI[:, at], errors_BO
        )
        for after_OI, before_OI in ((w_OI, whole_OI), (m_OI, mask_OI)):
            assert torch.equal(after_OI[:, :3], before_OI[:, :3])
            assert torch.equal(after_OI[:, 3 + columns :], before_OI[:, 3 + columns :])


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_every_tile_of_a_pass_is_what_its_definition_says_whatever_the_threads(
    pattern: str, bits: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_OI, factor, _ = problem(96, 200)
    widths: list[int] = []

    def tile(w_OB: Tensor, upper_BB: Tensor, mask_OB: Tensor, *rest: Any) -> Tensor:
        one_OB, chosen_OB = w_OB.clone(), mask_OB.clone()
        with threaded(1):
            alone_BO = tile_pass(one_OB, upper_BB, chosen_OB, *rest)
        before_OB, given_OB = w_OB.clone(), mask_OB.clone()
        with threaded(2):
            errors_BO = tile_pass(w_OB, upper_BB, mask_OB, *rest)
        check_tile(before_OB, given_OB, upper_BB, *rest, w_OB, mask_OB, errors_BO)
        for two, one in ((w_OB, one_OB), (mask_OB, chosen_OB), (errors_BO, alone_BO)):
            assert torch.equal(two, one)  # rows are dealt out whole
        widths.append(w_OB.shape[1])
        return errors_BO

    with monkeypatch.context() as patch:
        patch.setattr(columns, "tile_pass", tile)
        found_OI, mask_OI, grid = columns.column_pass(
            weight_OI, factor, None, 0.6, Pattern.parse(pattern), tile=48, bits=bits, group=128
        )
    assert widths == ([48, 48, 48, 48, 8] if bits is None else [48, 48, 32, 48, 24])
    assert not found_OI[~mask_OI].any()
    assert (grid is None) == (bits is None)


@pytest.mark.parametrize("bits", [None, 8, 3])
def test_the_squared_errors_add_up_to_the_loss(bits: int | None) -> None:
    weight_OI, factor, hessian_II = problem(20, 96)
    w_OI, mask_OI = weight_OI.clone(), torch.rand(20, 96) > 0.4
    scale_O = None if bits is None else weight_OI.abs().amax(1) * 0.7 / limit(bits)
    errors_IO = tile_pass(w_OI, factor.upper_II, mask_OI, None, scale_O, bits)
    change_OI = w_OI.double() - weight_OI.double()
    loss_O = ((change_OI @ hessian_II) * change_OI).sum(1)
    torch.testing.assert_close(errors_IO.double().square().sum(0), loss_O, rtol=1e-3, atol=0)


def test_a_fine_grid_is_no_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, factor, _ = problem(24, 160)

    def roomy(w_OI: Tensor, bits: int, group: int) -> Grid:
        """Updated weights may outgrow the largest of the first: leave them room."""
        return Grid(bits, group, fit(w_OI, bits, group).scale_OG * 8)

    monkeypatch.setattr(columns, "fit", roomy)
    plain_OI, mask_OI, none = columns.column_pass(weight_OI, factor, None, 0.5, NONE, tile=32)
    assert none is None
    found_OI, found_mask_OI, _ = columns.column_pass(weight_OI, factor, None, 0.5, NONE, tile=32, bits=20, group=0)
    assert torch.equal(found_mask_OI, mask_OI)
    torch.testing.assert_close(found_OI, plain_OI, rtol=1e-3, atol=2e-4)


def test_what_it_starts_from_is_not_changed() -> None:
    weight_OI, factor, _ = problem(8, 40)
    before_OI, mask_OI = weight_OI.clone(), torch.rand(8, 40) > 0.5
    given_OI = mask_OI.clone()
    _, after_OI, _ = columns.column_pass(weight_OI, factor, mask_OI, 0.0, NONE, bits=4)
    assert torch.equal(weight_OI, before_OI)
    assert torch.equal(mask_OI, given_OI)
    assert torch.equal(after_OI, mask_OI)
