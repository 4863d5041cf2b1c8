"""The column sweep: C and torch do the same, and what it loses is what it says."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from prunella import Pattern, Stats, sweep
from prunella.grid import Grid, fit, limit
from prunella.linalg import InverseFactor, inverse_factor
from prunella.native import library
from prunella.sweep import plain_tile, sweep_tile

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
def test_compiled_tiles_are_those_of_torch(rows: int, columns: int, pattern: str, bits: int | None) -> None:
    chosen = None if pattern == "unstructured" else Pattern.parse(pattern)
    if chosen is not None and columns % chosen.columns:
        return
    whole_OI, factor, _ = problem(rows, columns + 5)  # tiles are parts of larger tensors
    scale_O = None if bits is None else whole_OI.abs().amax(1) * 0.8 / limit(bits)
    if scale_O is not None:
        scale_O[0] = 0  # a row whose kept weights were all zero
    mask_OI = torch.rand(rows, columns + 5) > 0.5
    results = []
    for tile in (plain_tile, sweep_tile):
        w_OI, m_OI = whole_OI.clone(), mask_OI.clone()
        at = slice(3, 3 + columns)
        errors_BO = tile(w_OI[:, at], factor.upper_II[at, at], m_OI[:, at], chosen, scale_O, bits)
        results.append((w_OI, m_OI, errors_BO))
    (plain_OI, plain_mask_OI, plain_errors_BO), (found_OI, found_mask_OI, errors_BO) = results
    assert torch.equal(found_mask_OI, plain_mask_OI)
    torch.testing.assert_close(found_OI, plain_OI, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(errors_BO, plain_errors_BO, rtol=1e-3, atol=1e-4)
    assert torch.equal(found_OI[:, :3], whole_OI[:, :3])
    assert torch.equal(found_OI[:, 3 + columns :], whole_OI[:, 3 + columns :])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_compiled_sweeps_choose_the_masks_of_torch(
    pattern: str, bits: int | None, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight_OI, factor, _ = problem(96, 200)
    shape, before = Pattern.parse(pattern), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found_OI, mask_OI, grid = sweep.sweep(weight_OI, factor, None, 0.6, shape, tile=48, bits=bits, group=128)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(sweep, "tiles", {})
    plain_OI, plain_mask_OI, plain_grid = sweep.sweep(
        weight_OI, factor, None, 0.6, shape, tile=48, bits=bits, group=128
    )
    assert torch.equal(mask_OI, plain_mask_OI)
    torch.testing.assert_close(found_OI, plain_OI, rtol=1e-3, atol=1e-4)
    if grid is not None and plain_grid is not None:
        assert torch.equal(grid.scale_OG, plain_grid.scale_OG)


@pytest.mark.parametrize("bits", [None, 8, 3])
def test_the_squared_errors_add_up_to_the_loss(bits: int | None) -> None:
    weight_OI, factor, hessian_II = problem(20, 96)
    w_OI, mask_OI = weight_OI.clone(), torch.rand(20, 96) > 0.4
    scale_O = None if bits is None else weight_OI.abs().amax(1) * 0.7 / limit(bits)
    errors_IO = sweep_tile(w_OI, factor.upper_II, mask_OI, None, scale_O, bits)
    change_OI = w_OI.double() - weight_OI.double()
    loss_O = ((change_OI @ hessian_II) * change_OI).sum(1)
    torch.testing.assert_close(errors_IO.double().square().sum(0), loss_O, rtol=1e-3, atol=0)


def test_a_fine_grid_is_no_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_OI, factor, _ = problem(24, 160)

    def roomy(w_OI: Tensor, bits: int, group: int) -> Grid:
        """Updated weights may outgrow the largest of the first: leave them room."""
        return Grid(bits, group, fit(w_OI, bits, group).scale_OG * 8)

    monkeypatch.setattr(sweep, "fit", roomy)
    plain_OI, mask_OI, none = sweep.sweep(weight_OI, factor, None, 0.5, NONE, tile=32)
    assert none is None
    found_OI, found_mask_OI, _ = sweep.sweep(weight_OI, factor, None, 0.5, NONE, tile=32, bits=20, group=0)
    assert torch.equal(found_mask_OI, mask_OI)
    torch.testing.assert_close(found_OI, plain_OI, rtol=1e-3, atol=2e-4)


def test_what_it_starts_from_is_not_changed() -> None:
    weight_OI, factor, _ = problem(8, 40)
    before_OI, mask_OI = weight_OI.clone(), torch.rand(8, 40) > 0.5
    given_OI = mask_OI.clone()
    _, after_OI, _ = sweep.sweep(weight_OI, factor, mask_OI, 0.0, NONE, bits=4)
    assert torch.equal(weight_OI, before_OI)
    assert torch.equal(mask_OI, given_OI)
    assert torch.equal(after_OI, mask_OI)
