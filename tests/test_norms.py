"""Statistics of batch norms, estimated anew after pruning."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_opening import Squares, net
from torch import Tensor, nn
from torch.nn import functional as F

import prunella
from prunella import InputError, ModelError, Recipe, Report, norms, register_task, stream
from prunella.model.open import open_plain
from prunella.norm_ways import AUTO, Moments, Norm, make_way
from prunella.norms import BatchNorms
from prunella.registry import steps
from prunella.samples import Samples


class Outside(nn.Module):
    """Norms before its blocks, in them, and behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3))
        )
        self.head_norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, input: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(input)) * 2)
        out: Tensor = self.head(self.head_norm(self.blocks(x).mean((2, 3))))
        return out


class Whole(nn.Module):
    """No chain: what comes first is used again at the end, and there are two ways from it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Conv2d(3 if n == 0 else 8, 8, 3, padding=1) for n in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))
        self.last = nn.Linear(8, 5)

    def forward(self, input: Tensor) -> Tensor:
        x = self.norms[0](self.first(input)).relu()
        y = self.norms[1](self.left(x)).relu() + self.norms[2](self.right(x * 2)).relu()
        out: Tensor = self.last((x + y).mean((2, 3)))
        return out


KINDS: dict[str, Callable[[], nn.Module]] = {
    "chain": net,
    "outside": Outside,
    "whole": Whole,
    "resnet": lambda: nets.build("resnet"),
}


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nets.shaken(KINDS[kind]())


def samples(count: int = 20, size: int = 8) -> Samples:
    size = 4 if count == 21 else size
    return Samples.of({"input": torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))})


def given(kind: str, count: int = 20) -> Samples:
    if kind == "resnet":
        return Samples.of({"pixel_values": torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))})
    return samples(count, 4 if kind == "chain" else 8)


def estimated(network: nn.Module, found: Samples, way: str = "reset", **options: Any) -> BatchNorms:
    model = nets.wrapped(network, found)
    done = BatchNorms(model, found, {way: make_way(way, options)}, choose=False)
    done.settle(None)
    return done


def statistics(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in network.state_dict().items() if "running" in name}


def inputs(network: nn.Module, found: Samples, outputs: bool = False) -> dict[str, Tensor]:
    """What enters each norm, or leaves it, by channel."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, out: Tensor) -> None:
            seen[name] = (out if outputs else args[0]).transpose(0, 1).flatten(1).double()

        return see

    handles = [module.register_forward_hook(hook(name)) for name, module in norms.batch_norms(network).items()]
    with torch.no_grad():
        network(**found.groups[0])
    for handle in handles:
        handle.remove()
    return seen


# ---------------------------------------------------------------------------------------------------------
# What is estimated


@pytest.mark.parametrize("kind", list(KINDS))
def test_reset_gives_what_torch_gathers_from_one_batch_of_all_samples(kind: str) -> None:
    network = made(kind)
    torchs = copy.deepcopy(network)
    done = estimated(network, given(kind))
    assert (len(done.samples), len(done.held_out)) == (16, 4)
    for module in torchs.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        torchs.train()(**done.samples.groups[0])
    for name, value in statistics(torchs).items():
        first = next(norm for part in done.order for norm in part)
        # Behind the first norm torch's inputs are divided by n, ours by the n - 1 that running_var is kept with.
        near = {"rtol": 1e-5, "atol": 1e-6} if name.startswith(f"{first}.") else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(statistics(network)[name], value, **near)
    for name, x_CT in inputs(network, done.samples).items():  # each norm sees what those before it make now
        torch.testing.assert_close(
            statistics(network)[f"{name}.running_mean"], x_CT.mean(1).float(), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            statistics(network)[f"{name}.running_var"], x_CT.var(1).float(), rtol=1e-4, atol=1e-5
        )
    others = {name: value for name, value in torchs.state_dict().items() if "running" not in name}
    assert all(torch.equal(network.state_dict()[n], v) for n, v in others.items() if "num_batches" not in n)
    assert not any(module.training for module in network.modules())
    assert all(value == 0 for name, value in network.state_dict().items() if "num_batches" in name)
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.parametrize("kind", ["outside", "resnet"])
def test_it_does_not_matter_how_samples_are_cut_into_batches(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = made(kind), made(kind)
    estimated(one, given(kind))
    monkeypatch.setattr(stream, "TOKENS", 1)
    estimated(other, given(kind))
    for name, value in statistics(one).items():
        torch.testing.assert_close(statistics(other)[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["outside", "whole", "resnet"])
def test_correct_gives_outputs_the_mean_and_deviation_of_the_dense_network(kind: str) -> None:
    network, found = made(kind), given(kind)
    model = nets.wrapped(network, found)
    done = BatchNorms(model, found, {"correct": make_way("correct")}, choose=False)
    dense = inputs(network, done.samples, outputs=True)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 4:
                parameter *= (torch.rand(parameter.shape) > 0.3) if "stem" not in name else 1
    before = inputs(network, done.samples, outputs=True)
    done.settle(None)
    after = inputs(network, done.samples, outputs=True)
    for name, value in dense.items():
        torch.testing.assert_close(after[name].mean(1), value.mean(1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(after[name].std(1), value.std(1), rtol=1e-3, atol=1e-4)
    assert any(not torch.allclose(before[name].mean(1), value.mean(1), rtol=1e-2) for name, value in dense.items())


def test_correct_changes_nothing_where_pruning_changed_nothing() -> None:
    network = made("outside")
    before = {name: value.clone() for name, value in statistics(network).items()}
    estimated(network, given("outside"), "correct")
    for name, value in statistics(network).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)


def test_momentum_goes_a_share_of_the_way_to_reset() -> None:
    new = Moments(4, torch.tensor([4.0, 8.0]).double(), torch.tensor([7.0, 28.0]).double())
    norm = Norm("n", torch.zeros(2).double(), torch.ones(2).double(), 1e-5, new, new)
    assert [value.tolist() for value in make_way("reset")(norm)] == [[1, 2], [1, 4]]
    assert [value.tolist() for value in make_way("momentum", {"share": 0.25})(norm)] == [[0.25, 0.5], [1, 1.75]]
    still = Norm(
        "n", torch.zeros(1).double(), torch.ones(1).double(), 0.0, *[Moments(2, *[torch.zeros(1).double()] * 2)] * 2
    )
    assert [value.tolist() for value in make_way("correct")(still)] == [[0], [1]]  # a channel that does not vary


# ---------------------------------------------------------------------------------------------------------
# What is decided


def fitted(kind: str = "outside") -> nn.Module:
    """A network whose statistics are those of its samples."""
    network = made(kind)
    estimated(network, given(kind, 60))
    return network


def pruned(network: nn.Module, sparsity: float, count: int = 60, **recipe: Any) -> Report:
    """Prune it; its loss is how far its outputs are from the dense network's."""
    whole = {"steps": ["magnitude"], "sparsity": sparsity, "evaluate": {"source": None}, **recipe}
    return prunella.prune(network, whole, calibration=[batch["input"] for batch in given("outside", count).batches(10)])


def divergence(report: Report) -> dict[str, float]:
    return {name: scores["divergence"] for name, scores in report.batch_norm["tried"].items()}


def test_a_broken_network_takes_new_statistics_and_an_intact_one_keeps_its_own() -> None:
    broken = pruned(fitted(), 0.8)
    found = divergence(broken)
    assert list(found) == ["keep", *AUTO]
    assert broken.batch_norm["taken"] == min(found, key=lambda name: found[name]) != "keep"
    network = fitted()
    before = {name: value.clone() for name, value in statistics(network).items()}
    intact = pruned(network, 0.005, count=30)
    found = divergence(intact)
    assert intact.batch_norm["taken"] == min(found, key=lambda name: found[name]) != "reset"
    assert found["keep"] < found["reset"]
    if intact.batch_norm["taken"] == "keep":
        assert all(torch.equal(value, before[name]) for name, value in statistics(network).items())
    for report in (broken, intact):
        told = {what: after for what, _, after in report.rows() if what.startswith("batch norm")}
        assert len(told) == len(AUTO) + 1
        assert [what for what, after in told.items() if after.endswith("; taken")]
        assert report.plain()["batch_norm"]["norms"] == 5


@pytest.mark.parametrize("way", ["keep", "reset", "momentum", "correct"])
def test_a_way_that_is_asked_for_is_taken_whatever_it_does(way: str) -> None:
    network = fitted()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    report = pruned(network, 0.005, batch_norm=way)
    after = network.state_dict()
    assert report.recipe["batch_norm"] == {way: {}}
    if way == "keep":
        assert report.batch_norm == {}
    else:
        assert list(report.batch_norm["tried"]) == ["keep", way]
        assert report.batch_norm["taken"] == way
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name for name in moved if "running" in name} == (
        {name for name in statistics(network) if "stem" not in name} if way != "keep" else set()
    )  # what enters the stem's is what it was
    assert all(name.endswith("weight") and after[name].ndim > 1 for name in moved if "running" not in name)


def test_too_few_samples_decide_nothing() -> None:
    network = fitted()
    before = statistics(copy.deepcopy(network))
    report = pruned(network, 0.8, count=4)
    assert report.batch_norm["taken"] == "keep"
    assert report.batch_norm["held_out"] == 0
    assert all(torch.equal(value, before[name]) for name, value in statistics(network).items())


def test_held_out_samples_are_drawn_and_not_every_fifth() -> None:
    """Of samples that stand class after class, every fifth would be of one class."""
    numbers = Samples.of({"input": torch.arange(100.0).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)})
    done = estimated(made("outside"), numbers)
    found = done.held_out.groups[0]["input"][:, 0, 0, 0].int()
    assert len({int(number) % 5 for number in found}) == 5
    every = torch.cat([found, done.samples.groups[0]["input"][:, 0, 0, 0].int()])
    assert every.sort().values.tolist() == list(range(100))


@pytest.mark.parametrize("way", ["auto", "reset"])
def test_blocks_are_pruned_by_what_norms_are_going_to_make(way: str) -> None:
    """In each block a layer's statistics are those of the pruned network with norms that fit it."""
    network = fitted()
    seen: dict[str, Tensor] = {}

    @prunella.register("look", needs={"norm"})
    def look(layer: prunella.Layer) -> prunella.Layer:
        """Magnitude; its inputs are looked at."""
        seen[layer.name] = layer.stats.norm_I.clone()
        kept = prunella.keep(layer.weight_OI.abs(), layer.sparsity, layer.pattern)
        return layer.pruned(layer.weight_OI, kept)

    pruned(network, 0.8, steps=["look"], batch_norm={way: {}} if way == "reset" else "auto")
    network.load_state_dict(
        fitted().state_dict() | {k: v for k, v in network.state_dict().items() if "running" not in k}
    )
    found = given("outside", 60)
    before = inputs(fitted(), found)
    with torch.no_grad():
        for name, module in norms.batch_norms(network).items():
            x_CT = inputs(network, found)[name]
            moments = [Moments(len(x[0]), x.sum(1), x.square().sum(1)) for x in (before[name], x_CT)]
            mean, variance = module._buffers["running_mean"], module._buffers["running_var"]
            assert mean is not None
            assert variance is not None
            norm = Norm(name, mean.double(), variance.double(), 1e-5, *moments)
            for old, new in zip((mean, variance), make_way("correct" if way == "auto" else way)(norm), strict=True):
                if "stem" not in name:
                    old.copy_(new)
    rows = inputs_of_convolutions(network, found)
    for name in seen.keys() & rows.keys():
        torch.testing.assert_close(seen[name] / seen[name].norm(), rows[name] / rows[name].norm(), rtol=1e-3, atol=1e-4)
    assert len(seen) >= 3


def inputs_of_convolutions(network: nn.Module, found: Samples) -> dict[str, Tensor]:
    """The norm of each input of the blocks' convolutions."""
    rows: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any) -> None:
            rows[name] = F.unfold(args[0], 3).square().sum((0, 2)).sqrt().view(-1, 9).T.flatten()  # channels last

        return see

    convolutions = [(n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d) and "blocks" in n]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in convolutions]
    with torch.no_grad():
        network(**found.groups[0])
    for handle in handles:
        handle.remove()
    return rows


# ---------------------------------------------------------------------------------------------------------
# On disk


@pytest.fixture
def stored(tmp_path: Path, registries: None) -> Path:
    register_task("squares")(Squares)
    folder = tmp_path / "squares"
    folder.mkdir()
    (folder / "config.json").write_text('{"squares": 1}', encoding="utf-8")
    save_file(made("chain").state_dict(), folder / "model.safetensors")
    return folder


RECIPE: dict[str, Any] = {"steps": ["wanda"], "calibration": {"samples": 20, "min_tokens": 1}}


def test_files_hold_what_the_network_in_memory_has_and_nothing_else_changes(stored: Path, tmp_path: Path) -> None:
    for way in ("keep", "reset"):  # by a step that looks at no inputs
        prunella.prune(str(stored), {**RECIPE, "steps": ["magnitude"], "batch_norm": way}, output=tmp_path / way)
    kept, new = (load_file(tmp_path / way / "model.safetensors") for way in ("keep", "reset"))
    original = load_file(stored / "model.safetensors")
    assert kept.keys() == new.keys() == original.keys()
    assert {name for name in kept if not torch.equal(kept[name], new[name])} == {n for n in kept if "running" in n}
    assert all(torch.equal(kept[name], original[name]) for name in kept if "running" in name)
    network = made("chain")
    prunella.prune(network, {**RECIPE, "steps": ["magnitude"], "task": "squares", "batch_norm": "reset"})
    for name, value in network.state_dict().items():
        torch.testing.assert_close(new[name], value, rtol=1e-5, atol=1e-6)
    report = Report.read(tmp_path / "reset")
    assert report.batch_norm["tried"].keys() == {"keep", "reset"}
    net().load_state_dict(new)


@pytest.mark.parametrize("after", [1, 3, 6])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(
    stored: Path, tmp_path: Path, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {**RECIPE, "batch_norm": "auto", "sparsity": 0.8}
    whole = prunella.prune(str(stored), recipe, output=tmp_path / "whole")
    count = 0
    original = BatchNorms._estimated

    def killed(self: BatchNorms, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(BatchNorms, "_estimated", killed)
        with pytest.raises(KeyboardInterrupt):
            prunella.prune(str(stored), recipe, output=tmp_path / "out")
    again = prunella.prune(str(stored), recipe, output=tmp_path / "out", resume=True)
    assert again.batch_norm == whole.batch_norm
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_what_was_decided_is_not_done_again(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("prunella.pruning.Report", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            prunella.prune(str(stored), RECIPE, output=tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(BatchNorms, "_estimate", _interrupted)
        done = prunella.prune(str(stored), RECIPE, output=tmp_path / "out", resume=True)
    assert done.batch_norm["taken"] in ("keep", *AUTO)


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_norms_outside_of_the_blocks_survive_a_kill(
    tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch, registries: None
) -> None:
    class Stemmed(Squares):
        def open(self, name: str, **options: Any) -> prunella.Model:
            return open_plain(Outside, Path(name), self, name=name)

        def samples(self, model: prunella.Model, source: str, count: int | None, **options: Any) -> Samples:
            return given("outside")

        def example(self, network: nn.Module) -> Any:
            return given("outside", 1).groups[0]

    register_task("squares")(Stemmed)
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "config.json").write_text('{"squares": 1}', encoding="utf-8")
    save_file(made("outside").state_dict(), folder / "model.safetensors")
    recipe = {**RECIPE, "batch_norm": "reset", "format": format}
    prunella.prune(str(folder), recipe, output=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("prunella.pruning.Report", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            prunella.prune(str(folder), recipe, output=tmp_path / "out")
    prunella.prune(str(folder), recipe, output=tmp_path / "out", resume=True)
    files = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert files == sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "out" / file).read_bytes(), file
    if format == "dense":
        tensors = load_file(tmp_path / "out/model.safetensors")
        assert not torch.equal(
            tensors["stem_norm.running_mean"], load_file(folder / "model.safetensors")["stem_norm.running_mean"]
        )


def _interrupted(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


# ---------------------------------------------------------------------------------------------------------
# What is refused, and what is left as it is


def test_a_norm_without_statistics_is_named() -> None:
    network = made("outside")
    network.blocks[1][1] = nn.BatchNorm2d(8, track_running_stats=False)  # type: ignore[index]
    with pytest.raises(ModelError, match=r"batch norm 'blocks.1.1' keeps no statistics .* track_running_stats=True"):
        pruned(network, 0.5)


def test_what_cannot_be_estimated_stays_as_it_is_and_is_named() -> None:
    class Odd(Outside):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.BatchNorm2d(8)
            self.same = nn.InstanceNorm2d(8, track_running_stats=True)

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(self.stem_norm(self.same(self.stem_norm(self.stem(input))))[:, :3])

    torch.manual_seed(0)
    network = nets.shaken(Odd())
    before = statistics(copy.deepcopy(network))
    report = pruned(network, 0.5, batch_norm="reset")
    assert report.batch_norm["kept"] == {"stem_norm": "is called several times", "idle": "is not called"}
    assert "batch norm idle: is not called; stays as it is" in report.notes()
    same = {name for name, value in statistics(network).items() if torch.equal(value, before[name])}
    assert {name.rpartition(".")[0] for name in same} == {"stem_norm", "idle", "same"}


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("rest", "unknown way to estimate batch norms 'rest'.*reset"),
        ({"momentum": {"share": 2}}, "momentum.share=2: "),
        ({"reset": {"share": 1}}, "unknown option of way to estimate batch norms reset 'share'"),
        ({"auto": {"share": 1}}, "auto has no options"),
    ],
)
def test_a_wrong_way_is_refused(way: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Recipe.of({"batch_norm": way})


def test_a_network_without_batch_norms_is_as_it_was() -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    report = prunella.prune(plain, {"steps": ["wanda"], "evaluate": {"source": None}}, calibration=torch.randn(40, 8))
    assert "batch_norm" not in report.plain()
    assert "batch_norm" not in report.recipe
    with pytest.raises(InputError, match="has no batch norms: leave it out"):
        prunella.prune(plain, {"steps": ["wanda"], "batch_norm": "reset"}, calibration=torch.randn(40, 8))


def test_a_way_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    lines = (
        "from prunella.norm_ways import Norm, Statistics, estimates",
        "@estimates('zero')",
        "def zero(norm: Norm, *, to: float = 0.0) -> Statistics:",
        "    return norm.mean_C * 0 + to, norm.variance_C",
    )
    path.write_text("\n".join(lines))
    network = made("outside")
    report = pruned(network, 0.5, batch_norm={f"{path}:zero": {"to": 2}})
    assert report.batch_norm["taken"] == f"{path}:zero"
    assert all((value == 2).all() for name, value in statistics(network).items() if name.endswith("mean"))
    path.write_text("\n".join((*lines[:3], "    return norm.mean_C / 0, norm.variance_C")).replace("zero", "worse"))
    (tmp_path / "worse.py").write_text(path.read_text())
    with pytest.raises(prunella.PrunellaError, match=r"which torch\.float32 or a norm cannot hold"):
        pruned(made("outside"), 0.5, batch_norm=f"{tmp_path / 'worse.py'}:worse")


# ---------------------------------------------------------------------------------------------------------
# Steps


@pytest.mark.parametrize("order", ["layer", "block"])
@pytest.mark.parametrize("name", sorted(steps))
def test_no_step_trains_a_norm_or_moves_its_statistics(name: str, order: str) -> None:
    method = steps[name]
    if order == "layer" and not method.per_layer:
        pytest.skip("works on whole blocks")
    network = fitted()
    before = {key: value.clone() for key, value in network.named_buffers()}
    modes: list[bool] = []

    def see(module: nn.Module, args: Any) -> None:
        modes.append(module.training)

    for module in norms.batch_norms(network).values():
        module.register_forward_pre_hook(see)
    chosen = [name] if method.prunes else ["wanda", name]
    report = pruned(network, 0.5, count=20, steps=chosen, order=order, batch_norm="keep")
    assert report.sparsity > 0.3
    assert modes
    assert not any(modes)
    assert all(torch.equal(value, before[key]) for key, value in network.named_buffers())
