from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prunella import Block, InputError, Pattern, Stats, make
from prunella.steps import besa


def block(sparsity: float = 0.5, dtype: torch.dtype = torch.float32, windows: int = 8) -> Block:
    """Two layers; the rows of the first are of very different size, so that they should lose different shares."""
    from prunella import Layer

    generator = torch.Generator().manual_seed(0)
    up_OI = torch.randn(48, 32, generator=generator) / 6 * torch.rand(48, 1, generator=generator).square() * 3
    down_OI = torch.randn(32, 48, generator=generator) / 7
    dense = {"up": up_OI.to(dtype), "down": down_OI.to(dtype)}
    x_NLD = torch.randn(windows, 24, 32, generator=generator).to(dtype)

    def run(weights: Mapping[str, Tensor], n: int) -> Tensor:
        used = dense | dict(weights)
        return x_NLD[n : n + 1] + (x_NLD[n : n + 1] @ used["up"].T).relu() @ used["down"].T

    seen = {"up": x_NLD.flatten(0, 1), "down": (x_NLD @ dense["up"].T).relu().flatten(0, 1)}
    layers = [Layer(n, w, w, Stats.of(seen[n], frozenset({"norm"})), sparsity) for n, w in dense.items()]
    return Block(0, "block", tuple(layers), run, windows, lambda n: run({}, n))


def error(block: Block) -> float:
    assert block.run is not None
    assert block.targets is not None
    weights = {la.name: la.weight_OI for la in block.layers}
    errors = [besa.relative_error(block.run(weights, n), block.targets(n)) for n in range(block.windows)]
    return float(sum(errors) / len(errors))


def zeros(block: Block) -> int:
    return sum(int((~la.mask_OI).sum()) for la in block.layers if la.mask_OI is not None)


@pytest.mark.parametrize(
    ("per", "sparsity"), [("row", 0.125), ("row", 0.5), ("row", 0.75), ("row", 0.875), ("layer", 0.5), ("layer", 0.75)]
)
def test_the_budget_is_met_exactly_and_the_error_is_below_wandas(per: str, sparsity: float) -> None:
    given = block(sparsity)
    after = make("besa", {"per": per, "epochs": 4}).apply(given)
    wanda = make("wanda").apply(given)
    assert zeros(after) == zeros(wanda) == sum(la.weight_OI.numel() for la in given.layers) * sparsity
    assert error(after) < error(wanda)
    for la in after.layers:
        assert la.mask_OI is not None
        assert torch.equal(la.weight_OI, la.dense_OI * la.mask_OI)
        assert la.mask_OI.any(1).all()


def test_a_row_loses_its_lowest_wanda_scores() -> None:
    given = block()
    for before, after in zip(given.layers, make("besa").apply(given).layers, strict=True):
        score_OI = before.weight_OI.abs() * before.stats.norm_I
        assert after.mask_OI is not None
        for score_I, mask_I in zip(score_OI, after.mask_OI, strict=True):
            if not mask_I.all():
                assert score_I[~mask_I].max() <= score_I[mask_I].min()


def test_the_straight_through_gradient_is_that_of_the_soft_relaxation() -> None:
    """For a loss linear in the mask, sum_k g_k M_k, the gradient in alpha is that of sum_k g_k P_k(alpha)."""
    generator = torch.Generator().manual_seed(0)
    rank_OI = torch.stack([torch.randperm(40, generator=generator) for _ in range(5)])
    grad_OI = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    alpha_O1 = 0.2 + 0.6 * torch.rand(5, 1, generator=generator, dtype=torch.float64)
    got_O = besa.rate_gradient(grad_OI, rank_OI, alpha_O1, 0.05)
    step = 1e-6
    high, low = (besa.keep_probability(rank_OI, alpha_O1 + e, 0.05) for e in (step, -step))
    torch.testing.assert_close(got_O, ((grad_OI * (high - low)).sum(1) / (2 * step)), rtol=1e-6, atol=1e-6)


def test_the_pull_on_the_rates_is_the_block_gradient_at_the_hard_mask() -> None:
    """Finite differences of the loss along dP / dalpha, from the hard mask."""
    given = block()
    layers = list(given.layers)
    ranks = [besa._ranks(la.weight_OI.abs() * la.stats.norm_I) for la in layers]
    alphas = [torch.full((len(r), 1), 0.45) for r in ranks]
    pulls = besa._pulls(given, layers, ranks, alphas, 0, 0.05)

    def loss(move_OI: Tensor, which: int) -> float:
        masks = [(r + 0.5 > r.shape[1] * a).double() for r, a in zip(ranks, alphas, strict=True)]
        masks[which] = masks[which] + move_OI
        weights = {la.name: (la.weight_OI.double() * m).float() for la, m in zip(layers, masks, strict=True)}
        assert given.run is not None
        assert given.targets is not None
        return float(besa.relative_error(given.run(weights, 0).double(), given.targets(0).double()))

    for which, row in ((0, 3), (0, 17), (1, 5)):
        p_I = besa.keep_probability(ranks[which], alphas[which], 0.05)[row]
        direction_OI = torch.zeros(ranks[which].shape, dtype=torch.float64)
        direction_OI[row] = (p_I * (p_I - 1) / 0.05).double()
        step = 1e-2
        slope = (loss(step * direction_OI, which) - loss(-step * direction_OI, which)) / (2 * step)
        assert pulls[which][row].item() == pytest.approx(slope, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("total", [0, 1, 57, 160, 219, 237])
def test_the_budget_is_shared_to_the_last_weight(total: int) -> None:
    spend = besa.spend
    theta_O = torch.linspace(-3, 3, 20)
    inputs_O = torch.tensor([8, 16] * 10)[:20]
    count_O = spend(theta_O, inputs_O, total)
    assert count_O.sum() == min(total, int((inputs_O - 1).sum()))
    assert (count_O >= 0).all()
    assert (count_O < inputs_O).all()
    assert (count_O[0::2].diff() >= 0).all()  # rows of one width, in the order of their rates


def test_every_rate_is_in_reach() -> None:
    """The reference code's rates end at 0.62: a row that should lose nearly everything does."""
    given = block(0.7, windows=4)
    up, down = given.layers
    up.weight_OI[:8] *= 1e-4
    after = make("besa", {"epochs": 40, "rate": 0.3}).apply(given)
    assert after.layers[0].mask_OI is not None
    lost_O = 1 - after.layers[0].mask_OI.float().mean(1)
    assert lost_O[:8].min() > 0.9
    assert lost_O.min() < 0.4
    assert down.name == "down"


def test_dense_layers_and_other_patterns() -> None:
    given = block()
    partly = replace(given, layers=(replace(given.layers[0], sparsity=0.0), given.layers[1]))
    after = make("besa").apply(partly)
    assert after.layers[0].mask_OI is None
    assert zeros(after) == given.layers[1].weight_OI.numel() // 2
    grouped = replace(given, layers=tuple(replace(la, pattern=Pattern.parse("2:4")) for la in given.layers))
    with pytest.raises(InputError, match="pattern 2:4"):
        make("besa").apply(grouped)


def test_half_precision_learns_too() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        given = block(dtype=dtype)
        after = make("besa", {"epochs": 4}).apply(given)
        assert error(after) < error(make("wanda").apply(given))
