"""One packed weight: what goes in comes out, and what is damaged is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from prunella.errors import InputError, ModelError, NumericalError
from prunella.grid import fit
from prunella.sparse.format import Packed, check, mask_of, of_parts, pack, unpack

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def pruned(
    rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, sparsity: float = 0.5
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rows * columns)
    mask_OI = torch.rand(rows, columns) >= sparsity
    return torch.randn(rows, columns).to(dtype).masked_fill(~mask_OI, 0), mask_OI


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (5, 64), (4, 65), (7, 200)])
def test_without_bits_the_same_bytes_come_back(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight_OI, mask_OI = pruned(*shape, dtype)
    packed = pack(weight_OI, mask_OI)
    check("w", packed)
    assert torch.equal(mask_of(packed.mask, packed.columns), mask_OI)
    assert torch.equal(unpack(packed).view(torch.uint8), weight_OI.view(torch.uint8))


def test_a_kept_zero_stays_kept_and_negative_zero_stays_negative() -> None:
    weight_OI = torch.tensor([[0.0, -0.0, 1.0]])
    packed = pack(weight_OI, torch.tensor([[True, True, False]]))
    assert torch.equal(unpack(packed).view(torch.int32), (weight_OI * torch.tensor([1, 1, 0])).view(torch.int32))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [0, 128, 256])
@pytest.mark.parametrize("columns", [100, 128, 300, 513])
def test_rounded_values_are_within_half_a_step_and_zeros_stay_zeros(bits: int, group: int, columns: int) -> None:
    weight_OI, mask_OI = pruned(6, columns, torch.float32)
    packed = pack(weight_OI, mask_OI, bits, group)
    check("w", packed)
    back_OI = unpack(packed, torch.float32)
    assert (back_OI[~mask_OI] == 0).all()
    assert packed.scales is not None
    step_OI = packed.scales.float().repeat_interleave(packed.group or columns, 1)[:, :columns]
    near_OI = (back_OI - weight_OI).abs() <= step_OI / 2 * 1.001
    clipped_OI = back_OI.abs() >= step_OI * (2 ** (bits - 1) - 1) * 0.999
    assert (near_OI | clipped_OI).all()
    assert ((back_OI - weight_OI).norm() / weight_OI.norm()) < (0.01 if bits == 8 else 0.15)


def test_a_weight_on_the_grid_is_packed_without_loss() -> None:
    _, mask_OI = pruned(4, 256)
    integers = torch.randint(-127, 128, (4, 256)).float()
    integers[:, ::128] = 127
    mask_OI[:, ::128] = True
    weight_OI = integers * mask_OI * 2**-9
    assert torch.equal(unpack(pack(weight_OI, mask_OI, 8), torch.float32), weight_OI)


def test_clipping_a_few_large_weights_pays_with_four_bits() -> None:
    weight_OI = torch.randn(8, 128)
    scales = fit(weight_OI, 4, 128).scale_OG.float()
    assert (scales <= weight_OI.abs().amax(1, keepdim=True) / 7 * 1.01).all()
    assert (scales < weight_OI.abs().amax(1, keepdim=True) / 7 * 0.99).any()


@pytest.mark.parametrize(
    ("sparsity", "bits", "target"), [(0.5, None, 0.57), (0.5, 8, 0.33), (0.5, 4, 0.22), ("2:4", None, 0.57)]
)
@pytest.mark.parametrize("columns", [576, 2048])
def test_sizes_reach_their_targets(sparsity: Any, bits: int | None, target: float, columns: int) -> None:
    score_OI = torch.rand(64, columns)
    if sparsity == "2:4":
        mask_OI = (score_OI.view(64, -1, 4).argsort(-1).argsort(-1) < 2).view(64, columns)
    else:
        mask_OI = score_OI.argsort(-1).argsort(-1) < columns // 2
    packed = pack((score_OI * mask_OI).bfloat16(), mask_OI, bits)
    padding = 128 * 2  # of the values: nothing on a weight of a model's size
    assert packed.nbytes - padding <= target * 64 * columns * 2


def test_what_cannot_be_packed_says_so() -> None:
    weight_OI, mask_OI = pruned(2, 64)
    with pytest.raises(InputError, match="--bits 3"):
        pack(weight_OI, mask_OI, 3)
    with pytest.raises(InputError, match="--group 100"):
        pack(weight_OI, mask_OI, 8, 100)
    with pytest.raises(NumericalError, match="NaN or infinite"):
        pack(weight_OI.masked_fill(mask_OI, float("inf")), mask_OI, 8)


def damage(packed: Packed, part: str) -> Packed:
    mask, offsets, values = packed.mask.clone(), packed.offsets.clone(), packed.values.clone()
    match part:
        case "flipped bit":
            mask[1, 3] ^= 4
        case "bit beyond the last column":
            row = mask[0]
            kept = int(torch.nonzero(mask_of(mask[:1], packed.columns)[0])[0])
            row[kept // 8] ^= 1 << kept % 8  # the count stays right
            row[-1] |= 128
        case "falling offsets":
            offsets[1] = offsets[2] + 1
        case "first offset":
            offsets[0] = 1
        case "huge offset":
            offsets[-1] = 2**31 - 1
        case "negative offset":
            offsets[2] = -5
        case "too few values":
            values = values[:-1]
        case "trash at the end":
            values = torch.cat([values, values[:1]])
        case "trash in the padding":
            values[-3] = 1
        case "no values":
            values = values[:0]
        case "narrow mask":
            mask = mask[:, :-8].contiguous()
        case "other dtype":
            offsets = offsets.long()
    return replace(packed, mask=mask, offsets=offsets, values=values)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("flipped bit", "weight_mask"),
        ("bit beyond the last column", "weight_mask"),
        ("falling offsets", "weight_offsets"),
        ("first offset", "weight_offsets"),
        ("huge offset", "weight_offsets"),
        ("negative offset", "weight_offsets"),
        ("too few values", "weight_values"),
        ("trash at the end", "weight_values"),
        ("trash in the padding", "weight_values"),
        ("no values", "weight_values"),
        ("narrow mask", "weight_mask"),
        ("other dtype", "weight_offsets"),
    ],
)
def test_damage_is_refused_by_name(part: str, named: str, bits: int | None) -> None:
    weight_OI, mask_OI = pruned(4, 70)
    mask_OI[:, :2] = True
    packed = pack(weight_OI, mask_OI, bits)
    of_parts("model.layer", packed.parts(), 70, 128)
    broken = damage(packed, part)
    with pytest.raises(ModelError, match=rf"'model\.layer\.{named}'"):
        of_parts("model.layer", broken.parts(), 70, 128)


def test_missing_parts_and_bad_scales_are_refused() -> None:
    packed = pack(*pruned(4, 300), 8)
    parts = packed.parts()
    for part in ("weight_mask", "weight_offsets", "weight_values"):
        with pytest.raises(ModelError, match=part):
            of_parts("m", {k: v for k, v in parts.items() if k != part}, 300, 128)
    with pytest.raises(ModelError, match="scales"):
        of_parts("m", {k: v for k, v in parts.items() if k != "weight_scales"}, 300, 128)
    assert packed.scales is not None
    with pytest.raises(ModelError, match="weight_scales"):
        of_parts("m", {**parts, "weight_scales": packed.scales[:, :1].contiguous()}, 300, 128)
    with pytest.raises(ModelError, match="NaN"):
        of_parts("m", {**parts, "weight_scales": packed.scales * float("nan")}, 300, 128)
