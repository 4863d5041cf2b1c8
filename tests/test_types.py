from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunella import Layer, NumericalError, StatisticError, Stats

EVERYTHING = frozenset({"norm", "moments", "gram", "drift"})


def fields(stats: Stats) -> dict[str, Any]:
    return {"tokens": torch.tensor(stats.tokens), **stats.values}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.sets(st.sampled_from(sorted(EVERYTHING))))
@settings(max_examples=50, deadline=None)
def test_merged_statistics_are_those_of_the_concatenation(sizes: list[int], needs: set[str]) -> None:
    batches = [torch.randn(size, 12) for size in sizes]
    merged = sum((Stats.of(x_TI, frozenset(needs), dense_TI=x_TI.sin()) for x_TI in batches), Stats())
    x_TI = torch.cat(batches)
    whole = Stats.of(x_TI, frozenset(needs), dense_TI=x_TI.sin())
    torch.testing.assert_close(fields(merged), fields(whole), atol=1e-4, rtol=1e-5)


def test_derived_statistics_agree_with_torch() -> None:
    x_TI = torch.randn(400, 12) * torch.rand(12) + torch.randn(12)
    stats = Stats.of(x_TI, EVERYTHING)
    torch.testing.assert_close(stats.mean_I, x_TI.mean(0))
    torch.testing.assert_close(stats.variance_I, x_TI.var(0, correction=0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(stats.norm_I, torch.linalg.vector_norm(x_TI, dim=0) / 20)
    torch.testing.assert_close(stats.hessian_II, x_TI.T @ x_TI / 400, atol=1e-5, rtol=1e-5)
    assert not stats.mean_drift_II.any()
    drifted = Stats.of(x_TI, EVERYTHING, dense_TI=2 * x_TI)
    torch.testing.assert_close(drifted.mean_drift_II, stats.hessian_II, atol=1e-5, rtol=1e-5)


def test_variance_of_a_constant_is_not_negative() -> None:
    stats = Stats.of(torch.full((1000, 4), 3.3), EVERYTHING)
    assert (stats.variance_I >= 0).all()


def test_sums_of_half_precision_tokens_are_kept_in_single_precision() -> None:
    x_TI = torch.ones(4096, 3, dtype=torch.bfloat16)
    stats = Stats.of(x_TI, EVERYTHING)
    for value in (stats[name] for name in ("moments", "norm", "gram")):
        assert value.dtype == torch.float32
        assert (value == 4096).all()


@pytest.mark.parametrize(
    ("needs", "readable"),
    [
        ((), ()),
        (("norm",), ("norm_I",)),
        (("moments",), ("mean_I", "variance_I", "norm_I")),
        (("gram",), ("hessian_II", "norm_I")),
        (("drift",), ("mean_drift_II",)),
    ],
)
def test_reading_what_was_not_collected_raises(needs: tuple[str, ...], readable: tuple[str, ...]) -> None:
    stats = Stats.of(torch.randn(9, 4), frozenset(needs))
    for name in ("mean_I", "variance_I", "norm_I", "hessian_II", "mean_drift_II"):
        if name in readable:
            assert torch.isfinite(getattr(stats, name)).all()
        else:
            with pytest.raises(StatisticError, match=r"declare '\w+' in the step's needs"):
                getattr(stats, name)


def test_the_sample_is_spread_over_the_tokens() -> None:
    x_TI = torch.arange(100.0)[:, None]
    sample_TI = Stats.of(x_TI, frozenset(), 10).sample_TI
    assert sample_TI is not None
    assert sample_TI.flatten().tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    everything = Stats.of(x_TI, frozenset(), 1000).sample_TI
    assert everything is not None
    assert torch.equal(everything, x_TI)


def test_once_computes_a_shared_result_once() -> None:
    stats, calls = Stats(), []
    for _ in range(3):
        assert stats.once("key", lambda: calls.append(1) or "value") == "value"
    assert len(calls) == 1
    assert stats.once("other", lambda: "else") == "else"


def layer(**changes: Any) -> Layer:
    weight_OI = torch.randn(4, 6)
    given: dict[str, Any] = {"weight_OI": weight_OI, "dense_OI": weight_OI, "stats": Stats(), "sparsity": 0.5}
    return Layer("mlp.up", **(given | changes))


def test_pruned_puts_the_zeros_where_the_mask_says_and_casts_to_the_layers_dtype() -> None:
    before = layer(weight_OI=torch.randn(4, 6, dtype=torch.bfloat16), notes=("first",))
    mask_OI = torch.rand(4, 6) > 0.5
    weight_OI = torch.rand(4, 6) + 1
    after = before.pruned(weight_OI, mask_OI, "second")
    assert after.weight_OI.dtype == torch.bfloat16
    assert torch.equal(after.weight_OI != 0, mask_OI)
    assert after.mask_OI is mask_OI
    assert after.notes == ("first", "second")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_kept_weight_that_is_not_finite_is_an_error_that_names_the_layer(bad: float) -> None:
    weight_OI, mask_OI = torch.ones(4, 6), torch.ones(4, 6, dtype=torch.bool)
    weight_OI[2, 3] = bad
    with pytest.raises(NumericalError, match=r"'mlp\.up'"):
        layer().pruned(weight_OI, mask_OI)
    mask_OI[2, 3] = False
    assert layer().pruned(weight_OI, mask_OI).weight_OI[2, 3] == 0


def test_error_is_the_relative_squared_error_of_the_outputs() -> None:
    x_TI = torch.randn(50, 6)
    dense = layer(stats=Stats.of(x_TI, frozenset(), 50))
    assert dense.error() == 0
    half = dense.pruned(dense.dense_OI / 2, torch.ones(4, 6, dtype=torch.bool))
    assert half.error() == pytest.approx(0.25)
    nothing = dense.pruned(dense.dense_OI, torch.zeros(4, 6, dtype=torch.bool))
    assert nothing.error() == pytest.approx(1)


def test_error_is_none_where_it_cannot_be_measured() -> None:
    assert layer().error() is None
    assert layer(stats=Stats.of(torch.zeros(5, 6), frozenset(), 5)).error() is None
