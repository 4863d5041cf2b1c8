from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def mean_error(case: Any) -> Tensor:
    """What each row has lost of its mean output, recomputed from the tokens."""
    lost_OI = case.layer.dense_OI.double() - case.layer.weight_OI.double()
    error_O: Tensor = lost_OI @ case.x_TI.double().mean(0)
    return error_O


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4"])
@pytest.mark.parametrize("start", ["magnitude", "wanda", "sparsegpt"])
def test_swaps_keep_the_zeros_of_a_row_and_bring_its_mean_back(
    case: Callable[..., Any], start: str, pattern: str
) -> None:
    before = case(pattern=pattern, sparsity=0.75 if pattern == "1:4" else 0.5).apply(start)
    after = before.apply("dsnot", cycles=50)
    assert torch.equal(after.zeros_O, before.zeros_O)
    if pattern != "unstructured":
        groups = after.layer.mask_OI.view(-1, 4).sum(1)
        assert (groups == int(pattern[0])).all()
    was_O, is_O = mean_error(before).abs(), mean_error(after).abs()
    moved_O = (after.layer.mask_OI != before.layer.mask_OI).any(1)
    assert moved_O.any()
    assert (is_O[moved_O] < was_O[moved_O]).all()
    assert torch.equal(is_O[~moved_O], was_O[~moved_O])


def test_kept_and_grown_weights_are_bit_for_bit_dense(case: Callable[..., Any]) -> None:
    after = case(dtype=torch.bfloat16).apply("wanda").apply("dsnot", cycles=50).layer
    assert torch.equal(after.weight_OI, after.dense_OI * after.mask_OI)


def test_the_tracked_error_is_the_recomputed_one(case: Callable[..., Any]) -> None:
    """With a threshold between the error before and after the first swap, exactly one swap is made."""
    before = case(rows=1, columns=64).apply("magnitude")
    once = before.apply("dsnot", cycles=1)
    assert (once.layer.mask_OI != before.layer.mask_OI).sum() == 2
    was, now = mean_error(before).abs().item(), mean_error(once).abs().item()
    assert now < was
    assert torch.equal(before.apply("dsnot", cycles=50, threshold=(was + now) / 2).layer.mask_OI, once.layer.mask_OI)
    assert torch.equal(before.apply("dsnot", cycles=50, threshold=was * 1.001).layer.mask_OI, before.layer.mask_OI)
    more = before.apply("dsnot", cycles=50, threshold=now * 0.999)
    assert more.layer.mask_OI.sum() == once.layer.mask_OI.sum()


def test_the_first_swap_is_the_one_of_the_paper(case: Callable[..., Any]) -> None:
    before = case(rows=6).apply("wanda")
    after = before.apply("dsnot", cycles=1)
    mask_OI, w_OI = before.layer.mask_OI, before.layer.dense_OI
    mean_I, variance_I = before.x_TI.mean(0), before.x_TI.var(0, correction=0)
    d_OI, wanda_OI = w_OI * mean_I, w_OI.abs() * before.x_TI.square().mean(0).sqrt()
    for o, error in enumerate(mean_error(before).tolist()):
        sign = 1 if error > 0 else -1
        grow = max((j for j in range(32) if not mask_OI[o, j]), key=lambda j: sign * d_OI[o, j] / variance_I[j])
        prune = min((j for j in range(32) if mask_OI[o, j] and sign * d_OI[o, j] < 0), key=lambda j: wanda_OI[o, j])
        swapped = (after.layer.mask_OI[o] != mask_OI[o]).nonzero().flatten().tolist()
        if abs(error + d_OI[o, prune] - d_OI[o, grow]) < abs(error):
            assert swapped == sorted([grow, prune])
        else:
            assert swapped == []


def test_same_sign_never_turns_the_sign_of_a_row(case: Callable[..., Any]) -> None:
    before = case(rows=32).apply("magnitude")
    after = before.apply("dsnot", cycles=50, same_sign=True)
    assert (after.layer.mask_OI != before.layer.mask_OI).any()
    assert (mean_error(before).sign() == mean_error(after).sign()).all()


def test_skipped_layers_keep_their_mask(case: Callable[..., Any]) -> None:
    before = case(name="model.layers.3.mlp.up_proj").apply("wanda")
    assert torch.equal(before.apply("dsnot", cycles=50, skip=["mlp.*"]).layer.mask_OI, before.layer.mask_OI)
    assert not torch.equal(before.apply("dsnot", cycles=50, skip=["self_attn.*"]).layer.mask_OI, before.layer.mask_OI)


def test_constant_and_dead_inputs_are_no_trouble(case: Callable[..., Any]) -> None:
    before = case(changes={3: 1.5, 7: 0.0}).apply("wanda")
    after = before.apply("dsnot", cycles=50)
    assert torch.isfinite(after.layer.weight_OI).all()
    assert torch.equal(after.zeros_O, before.zeros_O)


def test_blocks_stay_as_they_are_and_say_so(case: Callable[..., Any]) -> None:
    before = case(pattern="4x4").apply("wanda")
    after = before.apply("dsnot", cycles=50)
    assert torch.equal(after.layer.mask_OI, before.layer.mask_OI)
    assert after.layer.notes == ("dsnot leaves blocks of weights as they are",)


@pytest.mark.parametrize(("columns", "cycles"), [(64, 1), (330, 3)])
def test_a_row_may_swap_a_hundredth_of_its_inputs(case: Callable[..., Any], columns: int, cycles: int) -> None:
    before = case(columns=columns).apply("magnitude")
    after = before.apply("dsnot")
    assert torch.equal(after.layer.mask_OI, before.apply("dsnot", cycles=cycles).layer.mask_OI)
    assert (after.layer.mask_OI != before.layer.mask_OI).sum(1).max() == 2 * cycles
