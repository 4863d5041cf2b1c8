"""Every allocation meets its budget, and does what its formula says."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import nets
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import prunella
from prunella import InputError, Recipe
from prunella.allocate import Budget, allocations, make_allocation
from prunella.pattern import cut
from prunella.pruning import choose_slots, free_layers, prune_once
from prunella.samples import Samples
from prunella.tasks.text import wrap_model


@pytest.fixture
def windows() -> Tensor:
    return tiny.token_windows(6, 24)


def budget_of(network: Any, windows: Tensor, **recipe: Any) -> Budget:
    wanted = Recipe.of({"sparsity": 0.6, **recipe})
    model = wrap_model(network)
    slots = choose_slots(model, wanted)
    return Budget(model, Samples.of(windows), slots, free_layers(slots, wanted), wanted.default_sparsity)


def mean(budget: Budget, shares: dict[str, float]) -> float:
    sizes = budget.sizes
    return sum(shares[name] * sizes[name] for name in sizes) / sum(sizes.values())


@pytest.mark.parametrize("options", [{}, {"per": "layer"}], ids=["block", "layer"])
@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.6, 0.95])
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("name", sorted(allocations))
def test_the_budget_is_met_exactly(
    name: str, architecture: str, sparsity: float, options: dict[str, Any], windows: Tensor
) -> None:
    if not options.keys() <= allocations[name].options.keys():
        pytest.skip(f"{name} has no such option")
    budget = budget_of(tiny.build(architecture), windows, sparsity=sparsity)
    shares = make_allocation(name, options)(budget)
    assert shares.keys() == budget.sizes.keys()
    near = 0.5 / sum(budget.sizes.values()) if name == "global" else 1e-12  # it counts weights
    assert mean(budget, shares) == pytest.approx(sparsity, abs=near)
    assert min(shares.values()) >= 0.01
    assert max(shares.values()) <= 0.99


@pytest.mark.parametrize("name", sorted(allocations))
def test_the_model_is_left_as_it_was(name: str, windows: Tensor) -> None:
    network = tiny.build("llama")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    make_allocation(name)(budget_of(network, windows))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", sorted(allocations))
def test_layers_with_a_word_of_their_own_are_not_part_of_the_budget(name: str, windows: Tensor) -> None:
    recipe = {
        "steps": ["magnitude"],
        "sparsity": {"*": 0.6, "down_proj": 0.25},
        "skip": ["o_proj"],
        "allocate": name,
    }
    report = prunella.prune(tiny.build("llama", num_hidden_layers=3), recipe, calibration=windows)
    free = [la for la in report.layers if not la.name.endswith(("down_proj", "o_proj"))]
    assert {la.target for la in report.layers if la.name.endswith("down_proj")} == {0.25}
    assert {la.sparsity for la in report.layers if la.name.endswith("o_proj")} == {0.0}
    weights = [math.prod(la.shape) for la in free]
    assert sum(n * la.target for n, la in zip(weights, free, strict=True)) / sum(weights) == pytest.approx(
        0.6, abs=1 / sum(weights)
    )


@given(
    wishes=st.lists(st.floats(-3, 3), min_size=1, max_size=12),
    sizes=st.lists(st.integers(1, 10**6), min_size=12, max_size=12),
    sparsity=st.floats(0.001, 0.995),
)
def test_any_wish_is_filled_to_the_level(wishes: list[float], sizes: list[int], sparsity: float) -> None:
    names = [f"layer{i}" for i in range(len(wishes))]

    class Fixed(Budget):
        @property
        def sizes(self) -> dict[str, int]:
            return dict(zip(names, sizes, strict=False))

    budget = Fixed(None, torch.empty(0), [], frozenset(names), sparsity)  # type: ignore[arg-type]
    shares = budget.spend(dict(zip(names, wishes, strict=True)))
    assert mean(budget, shares) == pytest.approx(sparsity, abs=1e-9)
    # The order of the wishes stays, and what is not clipped keeps its distance.
    ordered = sorted(names, key=lambda name: wishes[names.index(name)])
    assert all(shares[a] <= shares[b] + 1e-12 for a, b in pairwise(ordered))
    inside = [n for n in names if 0.011 < shares[n] < 0.989]
    for a, b in pairwise(inside):
        wish = wishes[names.index(a)] - wishes[names.index(b)]
        assert shares[a] - shares[b] == pytest.approx(wish, abs=1e-9)


def scores(network: Any, windows: Tensor) -> dict[int, Tensor]:
    """Wanda's scores of each block of a llama, from hooks on the dense model."""
    found: dict[int, list[Tensor]] = {}

    def hook(module: Any, args: Any, _: Any) -> None:
        norm_I = args[0].flatten(0, -2).square().mean(0).sqrt()
        found.setdefault(module.block, []).append((module.weight.abs() * norm_I).flatten())

    for index, block in enumerate(network.model.layers):
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.block = index
                module.register_forward_hook(hook)
    with torch.no_grad():
        network(windows)
    return {index: torch.cat(parts) for index, parts in found.items()}


def test_owl_falls_linearly_in_the_share_of_outliers(windows: Tensor) -> None:
    network = tiny.build("llama", num_hidden_layers=4)
    budget = budget_of(network, windows)
    shares = make_allocation("owl", {"outliers": 3.0, "spread": 0.1})(budget)
    share = {b: (a > 3 * a.mean()).float().mean().item() for b, a in scores(network, windows).items()}
    by_block = [shares[names[0]] for names in budget.blocks]
    low, high = min(share.values()), max(share.values())
    for b, other in ((0, 1), (1, 2), (2, 3)):
        wanted = -0.2 * (share[b] - share[other]) / (high - low)
        assert by_block[b] - by_block[other] == pytest.approx(wanted, abs=1e-3)
    assert max(by_block) - min(by_block) == pytest.approx(0.2)


def test_dlp_rises_linearly_in_the_median(windows: Tensor) -> None:
    network = tiny.build("llama", num_hidden_layers=4)
    budget = budget_of(network, windows)
    shares = make_allocation("dlp", {"spread": 0.1})(budget)
    median = {b: a.median().item() for b, a in scores(network, windows).items()}
    by_block = [shares[names[0]] for names in budget.blocks]
    low, high = min(median.values()), max(median.values())
    for b in range(3):
        wanted = 0.2 * (median[b] - median[b + 1]) / (high - low)
        assert by_block[b] - by_block[b + 1] == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("name", ["owl", "dlp"])
def test_blocks_that_tie_get_the_same(name: str, windows: Tensor) -> None:
    network = tiny.build("llama", num_hidden_layers=1)
    assert set(make_allocation(name)(budget_of(network, windows)).values()) == {0.6}
    zero = tiny.build("llama")
    with torch.no_grad():
        for parameter in zero.model.layers.parameters():
            parameter.zero_()
    for share in make_allocation(name)(budget_of(zero, windows)).values():
        assert share == pytest.approx(0.6)


def test_ramp_is_an_arithmetic_progression(windows: Tensor) -> None:
    budget = budget_of(tiny.build("llama", num_hidden_layers=4), windows)
    shares = make_allocation("ramp", {"rise": 0.3})(budget)
    by_block = [{shares[name] for name in names} for names in budget.blocks]
    assert [block.pop() for block in by_block] == pytest.approx([0.45, 0.55, 0.65, 0.75])
    assert not any(by_block)


def test_ramp_takes_the_rise_with_the_least_held_out_loss(windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = budget_of(tiny.build("llama", num_hidden_layers=3), windows)
    seen: list[Any] = []

    def loss(budget: Budget, shares: dict[str, float], step: str, learn_NL: Tensor, held_NL: Tensor) -> float:
        rise = shares[budget.blocks[-1][0]] - shares[budget.blocks[0][0]]
        seen.append((rise, len(learn_NL), len(held_NL)))
        return (rise - best) ** 2

    monkeypatch.setattr("prunella.allocate.ramp.held_out_loss", loss)
    for best in (0.21, -0.13, 0.0):
        seen.clear()
        shares = make_allocation("ramp", {"stride": 0.05, "trials": 9})(budget)
        assert shares[budget.blocks[-1][0]] - shares[budget.blocks[0][0]] == pytest.approx(best, abs=0.005)
        assert len(seen) <= 9
        assert {(learn, held) for _, learn, held in seen} == {(5, 1)}
    assert torch.equal(budget.samples.groups[0]["input_ids"], windows)


def test_ramp_without_a_window_to_hold_out_says_so(windows: Tensor) -> None:
    budget = replace(budget_of(tiny.build("llama"), windows), samples=Samples.of(windows[:1]))
    with pytest.raises(InputError, match="use two or more windows"):
        make_allocation("ramp")(budget)


def test_an_nm_pattern_leaves_nothing_to_spread() -> None:
    with pytest.raises(InputError, match=r"pattern 2:4 prunes 0\.5 of every layer, so allocation 'owl'"):
        Recipe.of({"pattern": "2:4", "allocate": "owl"})
    Recipe.of({"pattern": "2:4", "allocate": "uniform"})


@pytest.mark.parametrize(
    ("allocate", "message"),
    [
        ("owll", "unknown allocation 'owll'. Did you mean 'owl'?"),
        ({"owl": {"outlier": 5}}, "unknown option of allocation owl 'outlier'. Did you mean 'outliers'?"),
        ({"owl": {"spread": -1}}, "owl.spread=-1: "),
        ({"owl": {}, "dlp": {}}, "allocate: "),
        (5, "allocate: 5 should be one name"),
    ],
)
def test_an_allocation_that_cannot_be_made_says_why(allocate: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        Recipe.of({"allocate": allocate})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_brings_its_own_allocation(tmp_path: Path, windows: Tensor) -> None:
    (tmp_path / "mine.py").write_text(
        "from prunella.allocate import Budget, register_allocation\n"
        "@register_allocation('last')\n"
        "def last(budget: Budget, *, more: float = 0.1) -> dict[str, float]:\n"
        "    '''The last block gets more.'''\n"
        "    names = budget.blocks[-1]\n"
        "    return budget.spend({name: more * (name in names) for name in budget.sizes})\n"
    )
    try:
        recipe = {"steps": ["wanda"], "allocate": {f"{tmp_path / 'mine.py'}:last": {"more": 0.2}}, "sparsity": 0.5}
        report = prunella.prune(tiny.build("llama"), recipe, calibration=windows)
        assert sorted({round(la.target, 6) for la in report.layers}) == [0.4, 0.6]
    finally:
        allocations.pop("last", None)


def test_probe_evens_out_what_pruning_one_block_alone_costs() -> None:
    ids_NL = tiny.token_windows(8, 64)

    def loss(network: Any) -> float:
        return math.log(prunella.perplexity(wrap_model(network), ids_NL[6:]).perplexity)

    rises = []
    for other in (1, 0):
        network = tiny.build(seed=3)
        dense = loss(network)
        recipe = {"steps": ["wanda"], "skip": [f"model.layers.{other}"], "order": "block", "sparsity": 0.6}
        prunella.prune(network, recipe, calibration=ids_NL[:6])
        rises.append(loss(network) - dense)
    assert min(rises) > 0
    shares = make_allocation("probe", {"growth": 10})(budget_of(tiny.build(seed=3), ids_NL))
    first, second = (shares[f"model.layers.{b}.mlp.up_proj"] for b in (0, 1))
    assert second - first == pytest.approx((math.log(rises[0]) - math.log(rises[1])) / 10, rel=1e-3)


def test_probe_keeps_more_of_blocks_that_are_small_and_do_as_much() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh()) for inputs, outputs in pairwise((8, 64, 8, 8, 8)))
    )
    x_NI = torch.randn(40, 8)

    def made(*skip: str, sparsity: float = 0.5) -> tuple[nn.Module, Any]:
        one = copy.deepcopy(network)
        task = nets.Sum({"input": x_NI})
        wanted = {"steps": ["wanda"], "sparsity": sparsity, "skip": skip, "order": "block"}
        recipe = Recipe.of({**wanted, "task": "module", "evaluate": {"source": None}})
        if skip:
            prune_once(one, recipe, calibration=Samples.of({"input": x_NI[:30]}), task=task)
        model = task.wrap(one)
        slots = choose_slots(model, recipe)
        return one, Budget(model, Samples.of({"input": x_NI}), slots, free_layers(slots, recipe), sparsity)

    budget = made()[1]
    names = [name for block in budget.blocks for name in block]
    with torch.no_grad():
        dense = network(x_NI[30:]).square().mean()
        rises = [
            float(made(*(other for other in names if other != name))[0](x_NI[30:]).square().mean() - dense)
            for name in names
        ]
    least = min(rise for rise in rises if rise > 0)
    costs = [math.log(max(r, least) / budget.sizes[n]) for r, n in zip(rises, names, strict=True)]
    shares = make_allocation("probe", {"growth": 100})(budget)
    assert mean(budget, shares) == pytest.approx(0.5)
    for (one, cost), (other, more) in pairwise(zip(names, costs, strict=True)):
        assert shares[other] - shares[one] == pytest.approx((cost - more) / 100, abs=1e-6)


def test_probe_counts_its_text_in_tokens() -> None:
    ids_NL = tiny.token_windows(8, 64)
    found = make_allocation("probe", {"tokens": 250})(budget_of(tiny.build(seed=3), ids_NL))
    assert found == make_allocation("probe")(budget_of(tiny.build(seed=3), ids_NL[:4]))
    assert found != make_allocation("probe")(budget_of(tiny.build(seed=3), ids_NL))


def test_probe_without_a_window_to_hold_out_says_so(windows: Tensor) -> None:
    with pytest.raises(InputError, match="use two or more windows"):
        make_allocation("probe")(budget_of(tiny.build(), windows[:1]))


@pytest.mark.parametrize("name", ["owl", "probe", "ramp"])
def test_a_streamed_model_is_allocated_like_one_in_memory_and_resumes(
    name: str, llama: Path, tmp_path: Path, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    windows = windows % 100
    recipe = {"steps": ["wanda"], "allocate": name, "evaluate": {"source": None}}
    report = prunella.prune(AutoModelForCausalLM.from_pretrained(llama), recipe, calibration=windows)
    whole = prunella.prune(str(llama), recipe, output=tmp_path / "whole", calibration=windows)
    assert [la.target for la in whole.layers] == pytest.approx([la.target for la in report.layers], abs=1e-6)

    from prunella import save

    real: Callable[..., None] = save.Output.write

    def stop(self: save.Output, result: Any) -> None:
        real(self, result)
        raise KeyboardInterrupt

    monkeypatch.setattr(save.Output, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        prunella.prune(str(llama), recipe, output=tmp_path / "cut", calibration=windows)

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the allocation was made again")

    monkeypatch.setattr(save.Output, "write", real)
    monkeypatch.setattr(Budget, "spend", never)
    again = prunella.prune(str(llama), recipe, output=tmp_path / "cut", calibration=windows, resume=True)
    assert [la.target for la in again.layers] == [la.target for la in whole.layers]
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


# ---------------------------------------------------------------------------------------------------------
# Global


@given(st.data())
def test_the_cut_over_layers_is_the_sort_of_all_their_scores(data: Any) -> None:
    """Brute force: sort everything, stably, and count where the lowest lie; few values, so that many are equal."""
    values = st.sampled_from([-1.5, -0.0, 0.0, 1e-30, 0.5, 0.5000001, 2.0, math.inf])
    layers = {str(n): torch.tensor(data.draw(st.lists(values, min_size=1, max_size=9))) for n in range(4)}
    total = sum(map(len, layers.values()))
    count = data.draw(st.integers(0, total))
    owner = torch.cat([torch.full((len(score),), int(name)) for name, score in layers.items()])
    lowest = owner[torch.cat(list(layers.values())).sort(stable=True).indices[:count]]
    found = cut(lambda see: [see(name, score) for name, score in layers.items()], count)
    assert found == {name: int((lowest == int(name)).sum()) for name in layers}


def test_the_cut_refuses_nan() -> None:
    with pytest.raises(prunella.NumericalError, match="layer 'b' hold NaN"):
        cut(lambda see: [see("a", torch.ones(2)), see("b", torch.tensor([math.nan]))], 1)


@pytest.mark.parametrize("step", ["magnitude", "wanda"])
def test_global_prunes_the_lowest_scores_of_the_whole_model(step: str, windows: Tensor) -> None:
    """With steps that rank whole layers the mask is that of one threshold for all of them."""
    dense, network = tiny.build("llama"), tiny.build("llama")
    options = {"group": "layer"}
    recipe = {"steps": [{step: options}], "sparsity": 0.6, "allocate": {"global": {"step": "magnitude"}}}
    report = prunella.prune(network, recipe, calibration=windows)
    layers = {la.name: la for la in report.layers}
    before = {name: dense.get_submodule(name).weight.detach().abs() for name in layers}
    flat = torch.cat([score.flatten() for score in before.values()])
    threshold = flat.kthvalue(round(0.6 * len(flat))).values
    for name, score in before.items():
        assert round(layers[name].sparsity * score.numel()) == int((score <= threshold).sum()), name
        if step == "magnitude":
            assert torch.equal(network.get_submodule(name).weight == 0, score <= threshold)
    assert sum(la.shape[0] * la.shape[1] * la.sparsity for la in report.layers) == pytest.approx(0.6 * len(flat), abs=1)


def test_global_empties_no_layer(windows: Tensor) -> None:
    network = tiny.build("llama")
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight *= 1e-6  # all of it is lowest
    budget = budget_of(network, windows, pattern="4x2")
    shares = make_allocation("global", {"most": 0.9})(budget)
    assert shares["model.layers.0.mlp.up_proj"] == pytest.approx(0.9, abs=0.01)
    assert max(shares.values()) <= 0.9
    assert mean(budget, shares) == pytest.approx(0.6, abs=1e-3)


def test_global_reads_no_text_for_magnitude(windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = budget_of(tiny.build("llama"), windows)
    monkeypatch.setattr("prunella.allocate.budget.Stream", None)
    make_allocation("global")(budget)


def test_global_says_which_steps_rank_nothing(windows: Tensor) -> None:
    with pytest.raises(InputError, match="step 'admm' does not rank the weights of a layer once, by one score"):
        make_allocation("global", {"step": "admm"})(budget_of(tiny.build("llama"), windows))
