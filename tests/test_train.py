"""The training loop on networks that are no language models, and what a schedule may say."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunella import InputError, NumericalError
from prunella.samples import Batch, Samples
from prunella.train.loop import Training
from prunella.train.parts import Chosen, Part, attach, make_group
from prunella.train.schedule import Schedule, make_schedule, rise_and_fall


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def samples(count: int = 24) -> Samples:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator)
    return Samples.of({"input": x, "label": (x[:, 0] > 0).long() + (x[:, 1] > 0).long()})


def loss(outputs: Tensor, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch["label"])


def training(net: nn.Module, schedule: Schedule, folder: Path, chosen: Any = 1e-2, **options: Any) -> Training:
    options = {"batch": 6, "micro": 6, "every": 4, **options}
    run = lambda module, batch: module(batch["input"])  # noqa: E731
    return Training(net, chosen, options.pop("samples", samples()), loss, schedule, folder, run=run, **options)


def test_any_network_trains_and_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Running means of its norms are part of it, and what dropout draws."""
    ends: list[tuple[Mapping[str, Tensor], list[float]]] = []
    for folder, killed in ((tmp_path / "whole", None), (tmp_path / "cut", 6)):
        net = network()
        with training(net, make_schedule("constant", 12), folder, held_out=samples(9)) as first:
            first.advance(killed)
            if killed is None:
                first.finish()
        if killed is not None:
            net = network()
            with training(net, make_schedule("constant", 12), folder, held_out=samples(9), resume=True) as first:
                assert first.state.step == 4
                assert not first.advance()
                did = first.finish()
                assert (did.steps, len(did.losses), list(did.held_out)) == (12, 12, [0, 4, 8, 12])
        ends.append((net.state_dict(), first.state.losses))
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-12"]
    assert ends[0][1] == ends[1][1]
    assert ends[0][0].keys() == ends[1][0].keys()
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    assert sum(ends[0][1][-3:]) < sum(ends[0][1][:3])


def test_micro_batches_and_samples_of_several_shapes_change_nothing_but_rounding(tmp_path: Path) -> None:
    def sums(groups: Samples, micro: int) -> Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 1))
        run = lambda module, batch: module(batch["x"].sum(1, keepdim=True))  # noqa: E731
        folder = tmp_path / f"{len(groups.groups)}-{micro}"
        square = lambda outputs, batch: outputs.square().mean()  # noqa: E731
        with Training(
            net, 1e-2, groups, square, Schedule(3), folder, run=run, batch=5, micro=micro, every=9
        ) as training:
            training.advance()
        return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])

    x = torch.arange(7.0)[:, None]
    one, other = Samples.of({"x": x}), Samples.of([{"x": x[:3]}, {"x": torch.cat([x[3:], 0 * x[3:]], 1)}])
    expected = sums(one, 5)
    for groups, micro in ((one, 2), (one, 1), (other, 5), (other, 2)):
        torch.testing.assert_close(sums(groups, micro), expected)


def test_a_method_of_two_passes_sees_both(tmp_path: Path) -> None:
    """Gradients at weights that are moved by nothing are the same again: twice as large, they make the same steps."""

    class Twice(Schedule):
        def gradient(self, run: Callable[[], Tensor], weights: Mapping[str, nn.Parameter]) -> Tensor:
            first = run()
            assert all(weight.grad is not None for weight in weights.values())
            assert run() == first
            return first

    ends = []
    for schedule in (Schedule(4), Twice(4)):
        net = nn.Sequential(nn.Linear(6, 3))
        nn.init.ones_(net[0].weight)
        nn.init.zeros_(net[0].bias)
        with training(net, schedule, tmp_path / type(schedule).__name__, clip=1e9) as run:
            run.advance()
        ends.append(net[0].weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-5, atol=1e-6)


def test_checkpoints_win_by_name_and_training_stops_early(tmp_path: Path) -> None:
    class Named(Schedule):
        def rate(self, t: int) -> float:
            return 1.0 if t < 8 else -5.0  # uphill

        def final(self, t: int) -> str | None:
            return "dense" if t <= 2 else "final" if t >= 6 else None

    net = network()
    with training(net, Named(40), tmp_path, every=2, held_out=samples(9), patience=3) as run:
        assert not run.advance()
        best = run.state.best
        assert best["dense"] == 2
        assert best["final"] in (6, 8)
        assert run.state.step < 40
        assert run.finish().best_step == best["final"]
        assert math.isclose(run.evaluate(), run.state.held_out[best["final"]])
        run.finish("dense")
        assert math.isclose(run.evaluate(), run.state.held_out[2])
    kept = {f"checkpoint-{step}" for step in (*best.values(), run.state.step)}
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_masks_of_any_module_are_held_and_moments_forgotten(tmp_path: Path) -> None:
    """And they come back with the checkpoint that wins."""
    net = nn.Sequential(nn.Linear(6, 3))
    part = Part("0.weight", frozenset({"linear"}), net[0].weight.data, places=((net[0], "weight"),))
    group = make_group("all", {"rate": 1e-2})
    change = group.change(part)
    assert change is not None
    chosen = [Chosen(part, change, group)]
    attach(chosen)

    class Moving(Schedule):
        def sparsity(self, t: int) -> float | None:
            return {2: 0.5, 4: 1.0}.get(t)

        def final(self, t: int) -> str | None:
            return "half" if t == 4 else "final"

    def update(share: float) -> dict[str, Tensor]:
        mask = torch.ones(3, 6, dtype=torch.bool)
        mask[:, : round(4 * share)] = False
        return {"0.weight": mask}

    zeros = lambda: int((net[0].weight == 0).sum())  # noqa: E731
    with training(net, Moving(6), tmp_path, chosen, every=2, update=update) as run:
        run.advance(2)
        moments = run.optimizer.state[change.master]
        assert moments["exp_avg"].all()
        run.advance(1)
        assert zeros() == 6
        assert not moments["exp_avg"][:, :2].any()
        assert not moments["exp_avg_sq"][:, :2].any()
        assert moments["exp_avg"][:, 2:].all()
        run.advance()
        assert zeros() == 12
        run.finish("half")
        assert zeros() == 6


def test_the_rate_rises_and_falls_in_every_round() -> None:
    one = make_schedule("constant", 10, {"warmup": 0.2})
    assert [round(one.rate(t), 3) for t in (0, 1, 2, 6, 9)] == [0, 0.5, 1, 0.5, 0.125]
    assert [rise_and_fall(t, 4, 0) for t in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    three = make_schedule("imp", 12, {"rounds": 3, "warmup": 0.25})
    assert [three.rate(t) for t in range(4)] == [three.rate(t) for t in range(4, 8)] == [0, 1, 2 / 3, 1 / 3]
    assert [t for t in range(12) if three.sparsity(t) is not None] == [0, 4, 8]
    assert three.sparsity(8) == 1
    assert [three.final(t) for t in (4, 8, 9, 12)] == [None, None, "final", "final"]


def test_what_cannot_be_trained_is_said(tmp_path: Path) -> None:
    other = training(network(), Schedule(1), tmp_path, recompute=True)
    with pytest.raises(InputError, match="cannot recompute"), other:
        pass
    bad = Samples.of({"input": torch.full((6, 6), math.nan), "label": torch.zeros(6, dtype=torch.long)})
    run = training(network(), Schedule(2), tmp_path, samples=bad)
    with pytest.raises(NumericalError, match="step 1 is"), run:
        run.advance()
