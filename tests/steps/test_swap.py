from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def brute_force(case: Any, o: int, span: int, fit: bool) -> tuple[float, Tensor]:
    """The best loss that one swap in row o can give, and the mask that it leads to."""
    dense_I, mask_I = case.layer.dense_OI[o].double(), case.layer.mask_OI[o]
    weight_I, x_TI = case.layer.weight_OI[o].double(), case.x_TI.double()
    best, found = case.loss_O[o].item(), mask_I
    for u in mask_I.nonzero().flatten().tolist():
        for p in (~mask_I).nonzero().flatten().tolist():
            if span and u // span != p // span:
                continue
            new_I = weight_I.clone()
            new_I[u], new_I[p] = 0, dense_I[p]
            if fit:
                new_I[p] = 0
                left_T = x_TI @ (dense_I - new_I)
                new_I[p] = (x_TI[:, p] @ left_T) / x_TI[:, p].square().sum()
            loss = (x_TI @ (new_I - dense_I)).square().mean().item()
            if loss < best - 1e-9:
                best, found = loss, mask_I.clone()
                found[u], found[p] = False, True
    return best, found


@pytest.mark.parametrize("restore", ["dense", "fit"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "1:4"])
@pytest.mark.parametrize("start", ["magnitude", "sparsegpt"])
def test_the_first_swap_is_the_best_of_all_pairs(
    case: Callable[..., Any], start: str, pattern: str, restore: str
) -> None:
    before = case(rows=6, columns=16, pattern=pattern, sparsity=0.75 if pattern == "1:4" else 0.5).apply(start)
    after = before.apply("swap", swaps=1, candidates=None, restore=restore)
    for o in range(6):
        loss, mask_I = brute_force(before, o, 0 if pattern == "unstructured" else 4, restore == "fit")
        assert after.loss_O[o].item() == pytest.approx(loss, rel=1e-4)
        assert torch.equal(after.layer.mask_OI[o], mask_I)


@pytest.mark.parametrize("candidates", [4, 16, None])
@pytest.mark.parametrize("restore", ["dense", "fit"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_swaps_never_raise_the_loss_of_a_row_and_keep_its_zeros(
    case: Callable[..., Any], pattern: str, restore: str, candidates: int | None
) -> None:
    given = case(rows=24, columns=64, pattern=pattern).apply("wanda").apply("update")
    for swaps in (1, 2, 5, 50):
        after = given.apply("swap", swaps=swaps, candidates=candidates, restore=restore)
        assert (after.loss_O <= given.loss_O * (1 + 1e-5)).all()
        assert torch.equal(after.zeros_O, given.zeros_O)
        if pattern == "2:4":
            assert (after.layer.mask_OI.view(-1, 4).sum(1) == 2).all()
    plain = case(rows=24, columns=64, pattern=pattern)
    assert plain.apply("swap").loss < plain.apply("wanda").loss


def test_it_ends_where_no_pair_helps(case: Callable[..., Any]) -> None:
    after = case(rows=6, columns=16).apply("swap", swaps=1000, candidates=None)
    for o in range(6):
        assert torch.equal(brute_force(after, o, 0, False)[1], after.layer.mask_OI[o])
    again = after.apply("swap")
    assert torch.equal(again.layer.weight_OI, after.layer.weight_OI)


def test_kept_and_restored_weights_are_bit_for_bit_dense(case: Callable[..., Any]) -> None:
    after = case(dtype=torch.bfloat16).apply("wanda").apply("swap").layer
    assert torch.equal(after.weight_OI, after.dense_OI * after.mask_OI)


def test_chunks_of_rows_change_nothing(case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from prunella.steps import swap as module

    for pattern in ("unstructured", "2:4"):
        whole = case(rows=24, pattern=pattern).apply("swap").layer
        with monkeypatch.context() as patch:
            patch.setattr(module, "CHUNK", 5 * 32 * 32)
            parts = case(rows=24, pattern=pattern).apply("swap").layer
        assert torch.equal(parts.mask_OI, whole.mask_OI)


def test_blocks_stay_as_they_are_and_say_so(case: Callable[..., Any]) -> None:
    before = case(pattern="4x4").apply("wanda")
    after = before.apply("swap")
    assert torch.equal(after.layer.mask_OI, before.layer.mask_OI)
    assert after.layer.notes == ("swap leaves blocks of weights as they are",)
