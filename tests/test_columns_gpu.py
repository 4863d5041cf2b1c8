"""The Triton versions of SparseGPT's and DSnoT's loops: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from test_columns import check_tile

from prunella.pattern import keep
from prunella.steps import dsnot
from prunella.types import Pattern

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="there is no Triton for this machine")

from prunella import columns_gpu  # noqa: E402


@pytest.mark.parametrize("text", ["unstructured", "2:4", "1:4", "4:8"])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_tile_is_what_its_definition_says(text: str, bits: int | None) -> None:
    pattern = None if text == "unstructured" else Pattern.parse(text)
    generator = torch.Generator().manual_seed(3)
    rows, columns, start, stop = 21, 64, 16, 40  # a tile inside of a larger weight
    weight_OI = torch.randn(rows, columns, generator=generator)
    upper_II = (torch.randn(columns, columns, generator=generator) * 0.2).triu(1) + torch.diag(
        0.5 + torch.rand(columns, generator=generator)
    )
    mask_OI = torch.rand(rows, columns, generator=generator) < 0.5
    mask_OI[0], mask_OI[1] = True, False
    scale_O = None if bits is None else 0.1 + torch.rand(rows, generator=generator)
    tile = slice(start, stop)
    weight, mask, upper = weight_OI.clone().to(DEVICE), mask_OI.clone().to(DEVICE), upper_II.to(DEVICE)
    scale = None if scale_O is None else scale_O.to(DEVICE)
    found = columns_gpu.tile_pass(weight[:, tile], upper[tile, tile], mask[:, tile], pattern, scale, bits)
    start_OB, given_OB, upper_BB = weight_OI[:, tile], mask_OI[:, tile], upper_II[tile, tile]
    after = weight[:, tile].cpu(), mask[:, tile].cpu(), found.cpu()
    check_tile(start_OB, given_OB, upper_BB, pattern, scale_O, bits, *after)
    outside = torch.ones(columns, dtype=torch.bool)
    outside[tile] = False
    assert torch.equal(weight.cpu()[:, outside], weight_OI[:, outside])
    assert torch.equal(mask.cpu()[:, outside], mask_OI[:, outside])


def test_equal_scores_are_pruned_from_the_left() -> None:
    weight = torch.ones(3, 8, device=DEVICE)
    mask = torch.empty(3, 8, dtype=torch.bool, device=DEVICE)
    columns_gpu.tile_pass(weight, torch.eye(8, device=DEVICE), mask, Pattern.parse("2:4"), None, None)
    assert mask.tolist() == [[False, False, True, True] * 2] * 3


@pytest.mark.parametrize(("span", "same_sign"), [(0, False), (0, True), (4, True), (8, False)])
def test_the_same_weights_are_swapped_as_in_torch(span: int, same_sign: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    rows, columns = 37, 64
    d_OI = torch.randn(rows, columns, generator=generator) + 0.4
    wanda_OI = torch.rand(rows, columns, generator=generator)
    g_OI = d_OI * (0.5 + torch.rand(columns, generator=generator))
    pattern = Pattern("nm", span // 2, span) if span else Pattern()
    mask_OI = keep(wanda_OI, 0.5, pattern, group="row")
    mask_OI[0], mask_OI[1] = True, False  # nothing to grow, nothing to prune
    e_O = (d_OI * ~mask_OI).sum(1)
    e_O[2] = 0
    arguments = (mask_OI, d_OI, g_OI, wanda_OI, e_O)
    wanted = dsnot.plain_swap(*arguments, 20, 1e-3, same_sign, span)
    found = columns_gpu.swap(*(a.to(DEVICE) for a in arguments), 20, 1e-3, same_sign, span)
    assert (wanted != mask_OI).sum() > 50
    assert torch.equal(found.cpu(), wanted)
