"""One contract that every registered step meets, and what is particular to each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import prunella
from prunella import Block, InputError, Layer, Pattern, StatisticError, Stats, Step, keep, make, register
from prunella.registry import find, steps

PATTERNS = ["unstructured", "2:4", "4:8", "1:4", "4x1"]
NAMES = sorted(name for name, step in steps.items() if step.prunes)
EVERYTHING = frozenset({"norm", "moments", "gram"})


# ---------------------------------------------------------------------------------------------------------
# A block small enough to check by hand: D -> 2 D -> D, with a residual around it


def toy_block(
    step: Step,
    pattern: str = "unstructured",
    sparsity: float = 0.5,
    dtype: torch.dtype = torch.float32,
    windows: int = 4,
    device: str | torch.device = "cpu",
) -> Block:
    """A block of two layers, with the statistics that the step declares and no others."""
    torch.manual_seed(0)
    dense = {"toy.up": torch.randn(64, 32).to(dtype) / 6, "toy.down": torch.randn(32, 64).to(dtype) / 8}
    dense = {name: weight_OI.to(device) for name, weight_OI in dense.items()}
    inputs_NLD = (torch.randn(windows, 40, 32) * (0.2 + torch.rand(32))).to(device, dtype)

    def run(weights: Mapping[str, Tensor], n: int) -> Tensor:
        used = dense | dict(weights)
        return inputs_NLD[n : n + 1] + (inputs_NLD[n : n + 1] @ used["toy.up"].T).relu() @ used["toy.down"].T

    seen = {"toy.up": inputs_NLD.flatten(0, 1), "toy.down": (inputs_NLD @ dense["toy.up"].T).relu().flatten(0, 1)}
    layers = tuple(
        Layer(name, w_OI, w_OI, Stats.of(seen[name], step.needs, 64), sparsity, Pattern.parse(pattern))
        for name, w_OI in dense.items()
    )
    if step.per_layer:
        return Block(0, "toy", layers)
    targets = (lambda n: run({}, n)) if "targets" in step.needs else None
    beside = (lambda n: run({}, n)) if "dense" in step.needs else None
    return Block(0, "toy", layers, run=run, windows=windows, targets=targets, dense=beside)


def tensors(block: Block) -> dict[str, Tensor]:
    """All tensors of a block's layers, cloned."""
    found = {}
    for layer in block.layers:
        for part in (layer, layer.stats):
            for field in fields(part):
                value = getattr(part, field.name)
                if isinstance(value, Tensor):
                    found[f"{layer.name}.{field.name}"] = value.clone()
    return found


def check_zeros(block: Block, sparsity: float) -> None:
    pruned = total = 0
    for layer in block.layers:
        mask_OI, pattern = layer.mask_OI, layer.pattern
        assert mask_OI is not None
        assert mask_OI.dtype == torch.bool
        assert mask_OI.shape == layer.weight_OI.shape
        assert (layer.weight_OI[~mask_OI] == 0).all()
        pruned, total = pruned + int((~mask_OI).sum()), total + mask_OI.numel()
        if pattern.kind == "nm":
            assert (mask_OI.reshape(-1, pattern.second).sum(1) == pattern.first).all()
        if pattern.kind == "block":
            cells = mask_OI.view(len(mask_OI) // pattern.first, pattern.first, -1, pattern.second)
            assert torch.equal(cells.all(3).all(1), cells.any(3).any(1))
    fixed = block.layers[0].pattern.sparsity
    assert pruned == round(total * (sparsity if fixed is None else fixed))


def apply_or_refuse(step: Step, block: Block) -> Block | None:
    """A step may refuse a pattern, but never the unstructured one, and it has to say which."""
    try:
        return step.apply(block)
    except InputError as error:
        pattern, message = str(block.layers[0].pattern), str(error)
    assert pattern != "unstructured"
    assert f"step '{step.name}'" in message
    assert f"pattern {pattern}" in message
    return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_contract(name: str, pattern: str, dtype: torch.dtype) -> None:
    """Exact sparsity and pattern, zeros as the mask says, dtype, shape and device kept, inputs left alone, the
    same seed the same result; and all of it with the declared statistics only."""
    step = make(name)
    for sparsity in (0.5,) if ":" in pattern else (0.25, 0.5, 0.75):
        block = toy_block(step, pattern, sparsity, dtype)
        before = tensors(block)
        torch.manual_seed(3)
        after = apply_or_refuse(step, block)
        if after is None:
            return
        assert {k: v.tolist() for k, v in tensors(block).items()} == {k: v.tolist() for k, v in before.items()}
        check_zeros(after, sparsity)
        assert [la.name for la in after.layers] == [la.name for la in block.layers]
        for old, new in zip(block.layers, after.layers, strict=True):
            assert new.weight_OI.dtype == dtype
            assert new.weight_OI.shape == old.weight_OI.shape
            assert new.weight_OI.device == old.weight_OI.device
            assert torch.isfinite(new.weight_OI).all()
            assert torch.equal(new.dense_OI, old.dense_OI)
            assert (new.pattern, new.stats) == (old.pattern, old.stats)
        torch.manual_seed(3)
        again = step.apply(toy_block(step, pattern, sparsity, dtype))
        for one, other in zip(after.layers, again.layers, strict=True):
            assert torch.equal(one.weight_OI, other.weight_OI)
            assert one.mask_OI is not None
            assert other.mask_OI is not None
            assert torch.equal(one.mask_OI, other.mask_OI)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", NAMES)
def test_contract_holds_after_another_step(name: str, pattern: str) -> None:
    step = make(name)
    chosen = make("magnitude").apply(toy_block(step, pattern))
    before = tensors(chosen)
    after = apply_or_refuse(step, chosen)
    if after is None:
        return
    assert {k: v.tolist() for k, v in tensors(chosen).items()} == {k: v.tolist() for k, v in before.items()}
    check_zeros(after, 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_sparsity_zero_leaves_a_layer_as_it_is(name: str) -> None:
    step = make(name)
    block = toy_block(step, sparsity=0.5)
    block = replace(block, layers=(replace(block.layers[0], sparsity=0.0), block.layers[1]))
    after = step.apply(block)
    assert torch.equal(after.layers[0].weight_OI, block.layers[0].weight_OI)
    assert after.layers[0].mask_OI is None or after.layers[0].mask_OI.all()
    assert after.layers[1].mask_OI is not None
    assert not after.layers[1].mask_OI.all()


@pytest.mark.parametrize("name", NAMES)
def test_every_step_says_what_it_does_in_one_line(name: str) -> None:
    assert 10 < len(find(name).summary) < 100
    assert find(name).summary.endswith((".", ";"))


@pytest.mark.parametrize("order", ["layer", "block"])
def test_a_step_that_reads_what_it_did_not_declare_is_stopped(
    order: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(steps, "greedy", raising=False)

    @register("greedy", needs={"norm"})
    def greedy(layer: Layer) -> Layer:
        assert layer.stats.norm_I.numel()
        return layer.pruned(layer.weight_OI, keep(layer.stats.hessian_II.diagonal() * layer.weight_OI, 0.5))

    try:
        recipe = {"steps": ["sparsegpt", "greedy"], "order": order}  # collected for the first step, but not for it
        with pytest.raises(StatisticError, match="declare 'gram'"):
            prunella.prune(tiny.build(), recipe, calibration=ids)
    finally:
        del steps["greedy"]


def test_a_block_step_gets_a_differentiable_block_and_its_dense_outputs(ids: Tensor) -> None:
    seen: list[float] = []

    @register("whole", needs={"targets"})
    def whole(block: Block) -> Block:
        """A step on whole blocks."""
        assert block.run is not None
        assert block.targets is not None
        assert block.windows == len(ids)
        weights = {la.name: la.weight_OI.clone().requires_grad_() for la in block.layers}
        for n in range(block.windows):
            # Targets were made in a batch and without gradients: other products, the same up to rounding.
            torch.testing.assert_close(block.run(weights, n), block.targets(n))
        masks = {la.name: keep(la.weight_OI.abs(), la.sparsity) for la in block.layers}
        with torch.enable_grad():
            out = block.run({name: w * masks[name] for name, w in weights.items()}, 1)
            loss = (out - block.targets(1)).square().mean()
            loss.backward()
        assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in weights.values())
        seen.append(loss.item())
        return replace(block, layers=tuple(la.pruned(la.weight_OI, masks[la.name]) for la in block.layers))

    try:
        for architecture in ("llama", "gpt2", "mixtral", "bloom"):
            seen.clear()
            report = prunella.prune(tiny.build(architecture), {"steps": ["whole"]}, calibration=ids)
            assert report.recipe["order"] == "block"
            assert {layer.sparsity for layer in report.layers} == {0.5}
            assert len(seen) == 2
            assert min(seen) > 0
        with pytest.raises(InputError, match="step 'whole' works on whole blocks: use --order block"):
            prunella.prune(tiny.build(), {"steps": ["whole"], "order": "layer"}, calibration=ids)
    finally:
        del steps["whole"]


# ---------------------------------------------------------------------------------------------------------
# The registry


def test_register_refuses_a_function_it_cannot_call() -> None:
    with pytest.raises(ValueError, match=r"unknown statistic 'norms'\. Did you mean 'norm'"):
        register("bad", needs={"norms"})
    with pytest.raises(TypeError, match="must be annotated as Layer or Block"):
        register("bad")(lambda layer: layer)

    def layered(layer: Layer) -> Layer:
        return layer

    with pytest.raises(TypeError, match="`targets` belong to blocks"):
        register("bad", needs={"targets"})(layered)
    assert "bad" not in steps


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("wandda", {}, "unknown step 'wandda'. Did you mean 'wanda'?"),
        ("sparsegpt", {"dampin": 1}, "unknown option of step sparsegpt 'dampin'. Did you mean 'damping'?"),
        ("sparsegpt", {"damping": "much"}, "sparsegpt.damping=much: "),
        ("sparsegpt", {"tile": 0}, "sparsegpt.tile=0: "),
        ("sparsegpt", {"damping": -1}, "sparsegpt.damping=-1: "),
        ("wanda", {"group": "column"}, "wanda.group=column: "),
        ("missing.py:mine", {}, "step file 'missing.py' does not exist."),
    ],
)
def test_a_step_that_cannot_be_made_says_why(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        make(name, options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_options_take_the_type_of_the_signature() -> None:
    step = make("sparsegpt", {"damping": "1e-3", "tile": "64"})
    assert step.options == {"damping": 1e-3, "tile": 64, "order": "natural"}


# ---------------------------------------------------------------------------------------------------------
# Magnitude and Wanda


def one_layer(
    rows: int = 24, columns: int = 32, *, tokens: int = 200, seed: int = 0, mix: bool = True, **changes: Any
) -> tuple[Layer, Tensor]:
    """A layer with every statistic, and the tokens that they were made from; correlated if `mix`."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(tokens, columns, generator=generator) * (0.2 + torch.rand(columns, generator=generator))
    if mix:
        x_TI = x_TI + 0.5 * x_TI @ torch.randn(columns, columns, generator=generator) / columns**0.5
    weight_OI = torch.randn(rows, columns, generator=generator)
    layer = Layer("mlp.up", weight_OI, weight_OI, Stats.of(x_TI, EVERYTHING, tokens), 0.5)
    return replace(layer, **changes), x_TI


def apply(name: str, layer: Layer, **options: Any) -> Layer:
    return make(name, options).apply(Block(0, "toy", (layer,))).layers[0]


def mask_of(name: str, layer: Layer, **options: Any) -> Tensor:
    mask_OI = apply(name, layer, **options).mask_OI
    assert mask_OI is not None
    return mask_OI


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.77])
def test_magnitude_keeps_the_front_of_a_sort(sparsity: float) -> None:
    layer, _ = one_layer(sparsity=sparsity)
    order = layer.weight_OI.abs().flatten().argsort()
    expected = torch.ones(24 * 32, dtype=torch.bool)
    expected[order[: round(24 * 32 * sparsity)]] = False
    assert torch.equal(mask_of("magnitude", layer), expected.view(24, 32))
    rows = mask_of("magnitude", layer, group="row")
    assert set((~rows).sum(1).tolist()) == {round(32 * sparsity)}


@pytest.mark.parametrize("name", ["magnitude", "wanda"])
def test_kept_weights_are_not_changed(name: str) -> None:
    layer, _ = one_layer()
    after = apply(name, layer)
    assert torch.equal(after.weight_OI, layer.weight_OI * after.mask_OI)


@pytest.mark.parametrize("columns", [30, 31, 32])
@pytest.mark.parametrize("sparsity", [0.05, 0.35, 0.5, 0.9])
def test_wanda_prunes_the_same_number_in_every_row(columns: int, sparsity: float) -> None:
    layer, _ = one_layer(columns=columns, sparsity=sparsity)
    zeros = (~mask_of("wanda", layer)).sum(1)
    assert set(zeros.tolist()) == {round(columns * sparsity)}


@pytest.mark.parametrize("options", [{}, {"group": "layer"}, {"variant": True}])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_wanda_does_not_feel_the_scale_of_the_activations(options: dict[str, Any], pattern: str) -> None:
    layer, x_TI = one_layer(pattern=Pattern.parse(pattern))
    scaled = replace(layer, stats=Stats.of(x_TI * 64, EVERYTHING))
    assert torch.equal(mask_of("wanda", layer, **options), mask_of("wanda", scaled, **options))


def test_wanda_scores_by_weight_times_the_norm_of_its_input() -> None:
    layer, x_TI = one_layer()
    score_OI = layer.weight_OI.abs() * torch.linalg.vector_norm(x_TI, dim=0)
    for o, kept in enumerate(mask_of("wanda", layer)):
        assert score_OI[o][~kept].max() < score_OI[o][kept].min()
    whole = mask_of("wanda", layer, group="layer")
    assert score_OI[~whole].max() < score_OI[whole].min()


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_wandas_variant_cuts_every_row_at_one_share_of_its_total(sparsity: float) -> None:
    layer, _ = one_layer(sparsity=sparsity)
    layer = replace(layer, weight_OI=layer.weight_OI.square() * layer.weight_OI.sign())  # rows of different shapes
    mask_OI = mask_of("wanda", layer, variant=True)
    assert int((~mask_OI).sum()) == round(mask_OI.numel() * sparsity)
    assert len(set((~mask_OI).sum(1).tolist())) > 1
    score_OI = layer.weight_OI.double().abs() * layer.stats.norm_I.double()
    lost_O = (score_OI * ~mask_OI).sum(1) / score_OI.sum(1)
    next_O = score_OI.masked_fill(~mask_OI, float("inf")).amin(1) / score_OI.sum(1)
    # One alpha separates what every row lost from what it would have lost with one weight more.
    assert lost_O.max() <= (lost_O + next_O).min()


# ---------------------------------------------------------------------------------------------------------
# SparseGPT


def damped(x_TI: Tensor, damping: float = 0.01) -> Tensor:
    hessian_II = x_TI.double().T @ x_TI.double() / len(x_TI)
    return hessian_II + damping * hessian_II.diagonal().mean() * torch.eye(len(hessian_II), dtype=torch.float64)


def plain_sweep(
    weight_OI: Tensor, hessian_II: Tensor, sparsity: float | None, tile: int, mask_OI: Tensor
) -> tuple[Tensor, Tensor]:
    """SparseGPT as the paper has it: column by column, with an explicit inverse of each trailing submatrix, in
    float64. Asserts that the mask is what it chooses for this sparsity, where there is one: up to scores that are the
    same but for rounding. Returns the weights and the summed loss of each row."""
    w_OI = weight_OI.double().clone()
    width = w_OI.shape[1]
    loss_O = torch.zeros(len(w_OI), dtype=torch.float64)
    inverses = [hessian_II[j:, j:].inverse() for j in range(width)]
    for start in range(0, width, tile):
        stop = min(start + tile, width)
        pivots = torch.stack([inverses[j][0, 0] for j in range(start, stop)])
        if sparsity is not None:
            score_OB, kept_OB = w_OI[:, start:stop].square() / pivots, mask_OI[:, start:stop]
            assert int((~kept_OB).sum()) == round(kept_OB.numel() * sparsity)
            assert score_OB[~kept_OB].max() <= score_OB[kept_OB].min() * (1 + 1e-4)
        for j in range(start, stop):
            error_O = w_OI[:, j] * ~mask_OI[:, j] / inverses[j][0, 0]
            loss_O += error_O.square() * inverses[j][0, 0]
            w_OI[:, j:] -= error_O[:, None] * inverses[j][0]
    return w_OI * mask_OI, loss_O


def loss_of(weight_OI: Tensor, dense_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """tr (W - W_dense) H (W - W_dense)^T, row by row."""
    change_OI = weight_OI.double() - dense_OI.double()
    return ((change_OI @ hessian_II) * change_OI).sum(1)


@pytest.mark.parametrize("tile", [5, 8, 32, 128])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_sparsegpt_is_the_plain_column_by_column_sweep(tile: int, sparsity: float) -> None:
    layer, x_TI = one_layer(sparsity=sparsity)
    after = apply("sparsegpt", layer, tile=tile)
    assert after.mask_OI is not None
    weight_OI, _ = plain_sweep(layer.weight_OI, damped(x_TI), sparsity, tile, after.mask_OI)
    torch.testing.assert_close(after.weight_OI.double(), weight_OI, rtol=1e-3, atol=1e-4)


def test_the_losses_of_the_sweep_add_up_to_the_quadratic_form() -> None:
    layer, x_TI = one_layer()
    after = apply("sparsegpt", layer, tile=8)
    assert after.mask_OI is not None
    _, loss_O = plain_sweep(layer.weight_OI, damped(x_TI), 0.5, 8, after.mask_OI)
    torch.testing.assert_close(loss_of(after.weight_OI, layer.dense_OI, damped(x_TI)), loss_O, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_lies_between_least_squares_and_no_update_for_its_mask(pattern: str) -> None:
    layer, x_TI = one_layer(pattern=Pattern.parse(pattern))
    hessian_II = damped(x_TI)
    after = apply("sparsegpt", layer)
    assert after.mask_OI is not None
    found_O = loss_of(after.weight_OI, layer.dense_OI, hessian_II)
    plain_O = loss_of(layer.dense_OI * after.mask_OI, layer.dense_OI, hessian_II)
    for row, (kept, dense) in enumerate(zip(after.mask_OI, layer.dense_OI.double(), strict=True)):
        best = torch.zeros_like(dense)
        best[kept] = torch.linalg.solve(hessian_II[kept][:, kept], hessian_II[kept] @ dense)
        optimum = loss_of(best[None], dense[None], hessian_II)[0]
        assert found_O[row] >= optimum * (1 - 1e-4)
    assert found_O.sum() < plain_O.sum()


@pytest.mark.parametrize("sparsity", [0.25, 0.5])
def test_with_orthonormal_inputs_sparsegpt_is_magnitude_tile_by_tile(sparsity: float) -> None:
    layer, _ = one_layer(sparsity=sparsity)
    x_TI, _ = torch.linalg.qr(torch.randn(200, 32))
    layer = replace(layer, stats=Stats.of(x_TI * 200**0.5, EVERYTHING))
    after = apply("sparsegpt", layer, tile=8)
    assert after.mask_OI is not None
    for start in range(0, 32, 8):
        tile_OI = layer.weight_OI[:, start : start + 8]
        assert torch.equal(after.mask_OI[:, start : start + 8], keep(tile_OI.abs(), sparsity))
    torch.testing.assert_close(after.weight_OI, layer.weight_OI * after.mask_OI, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_a_mask_that_was_given_is_kept_and_the_survivors_make_up_for_it(pattern: str, order: str) -> None:
    layer, x_TI = one_layer(pattern=Pattern.parse(pattern))
    chosen = apply("wanda", layer)
    after = apply("sparsegpt", chosen, order=order)
    assert chosen.mask_OI is not None
    assert after.mask_OI is not None
    assert torch.equal(after.mask_OI, chosen.mask_OI)
    hessian_II = damped(x_TI)
    lost = loss_of(after.weight_OI, layer.dense_OI, hessian_II).sum()
    assert lost < loss_of(chosen.weight_OI, layer.dense_OI, hessian_II).sum()
    if order == "natural":
        weight_OI, _ = plain_sweep(layer.dense_OI, hessian_II, None, 128, chosen.mask_OI)
        torch.testing.assert_close(after.weight_OI.double(), weight_OI, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_activation_order_is_the_natural_order_of_sorted_inputs(pattern: str) -> None:
    layer, x_TI = one_layer(pattern=Pattern.parse(pattern))
    span = layer.pattern.columns
    energy = x_TI.square().sum(0).view(-1, span).sum(1)
    order_I = (energy.argsort(descending=True)[:, None] * span + torch.arange(span)).flatten()
    back_I = order_I.argsort()
    sorted_layer = replace(
        layer,
        weight_OI=layer.weight_OI[:, order_I],
        dense_OI=layer.dense_OI[:, order_I],
        stats=Stats.of(x_TI[:, order_I], EVERYTHING),
    )
    after = apply("sparsegpt", layer, order="activation", tile=8)
    expected = apply("sparsegpt", sorted_layer, tile=8)
    torch.testing.assert_close(after.weight_OI, expected.weight_OI[:, back_I], rtol=1e-3, atol=1e-4)
    assert not torch.equal(after.weight_OI, apply("sparsegpt", layer, tile=8).weight_OI)


def test_a_rank_deficient_hessian_is_damped_further_and_the_layer_says_so() -> None:
    layer, _ = one_layer()
    layer = replace(layer, stats=Stats.of(torch.ones(8, 32), EVERYTHING))
    after = apply("sparsegpt", layer, damping=0.0)
    assert len(after.notes) == 1
    assert after.notes[0].startswith("Hessian damped to ")
    assert torch.isfinite(after.weight_OI).all()
    well, _ = one_layer()
    assert apply("sparsegpt", well).notes == ()


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    layer, x_TI = one_layer()
    x_TI = x_TI.clone()
    x_TI[:, [2, 19]] = 0
    layer = replace(layer, stats=Stats.of(x_TI, EVERYTHING))
    after = apply("sparsegpt", layer)
    assert (after.weight_OI[:, [2, 19]] == 0).all()
    assert int((~mask_of("sparsegpt", layer)).sum()) == 24 * 16
    assert torch.isfinite(after.weight_OI).all()
    live = [i for i in range(32) if i not in (2, 19)]
    alone = replace(
        layer,
        weight_OI=layer.weight_OI[:, live],
        dense_OI=layer.dense_OI[:, live],
        stats=Stats.of(x_TI[:, live], EVERYTHING),
        mask_OI=None if after.mask_OI is None else after.mask_OI[:, live],
    )
    torch.testing.assert_close(after.weight_OI[:, live], apply("sparsegpt", alone).weight_OI, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tile", [1, 3, 10, 128])
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "4x1", "1x4"])
def test_tiles_never_cut_a_group_of_the_pattern(tile: int, pattern: str) -> None:
    layer, _ = one_layer(pattern=Pattern.parse(pattern))
    check_zeros(Block(0, "toy", (apply("sparsegpt", layer, tile=tile),)), 0.5)
