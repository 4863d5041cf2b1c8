"""Iterative pruning: rounds, masks, what is kept, and what fine-tunes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella
from prunella import InputError, distil, prune_in_rounds
from prunella.errors import StepError
from prunella.iterative import SCHEDULES, Level

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
RECIPE: dict[str, Any] = {"steps": ["magnitude"], "allocate": "global", "sparsity": 0.8, "skip": ["stem", "heads"]}


class Detector(nn.Module):
    """Two scales, a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.down, self.up = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(20, 8, 1)
        self.heads = nn.ModuleList([nn.Conv2d(8, 6, 1), nn.Conv2d(12, 6, 1)])

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = torch.relu(self.norm(self.stem(x)))
        coarse = torch.relu(self.down(fine))
        joined = torch.relu(self.up(torch.cat([fine, nn.functional.interpolate(coarse, scale_factor=2.0)], 1)))
        return [self.heads[0](joined), self.heads[1](coarse)]


WEIGHTS = 12 * 8 * 9 + 8 * 20  # of what is pruned


def network() -> Detector:
    torch.manual_seed(0)
    return Detector().eval()


def closeness(dense: nn.Module) -> Any:
    """Minus the mean squared distance of raw maps from the dense network's."""
    with torch.no_grad():
        wanted = dense(X)

    def score(net: nn.Module) -> float:
        training, found = net.training, 0.0
        with torch.no_grad():
            found = -sum(float((a - b).square().mean()) for a, b in zip(net.eval()(X), wanted, strict=True))
        net.train(training)
        return found

    return score


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize("step", ["magnitude", {"wanda": {"group": "layer"}}])
def test_each_round_reaches_its_share_of_all_weights_and_masks_are_nested(schedule: Any, step: Any) -> None:
    net, seen = network(), list[Level]()
    levels = prune_in_rounds(
        net,
        {**RECIPE, "steps": [step]},
        5,
        distil(net, X, epochs=1, rate=1e-2),
        closeness(net),
        calibration=X,
        schedule=schedule,
        on_level=seen.append,
    )
    assert seen == levels
    shares = {"linear": [0.2, 0.4, 0.6, 0.8, 1.0], "cubic": [0.488, 0.784, 0.936, 0.992, 1.0]}[schedule]
    assert [level.share for level in levels] == pytest.approx(shares)
    for level, share in zip(levels, shares, strict=True):
        assert level.weights == WEIGHTS
        assert abs(level.zeros - 0.8 * share * WEIGHTS) <= 0.5
    for before, after in pairwise(levels):
        for name, mask in after.masks.items():
            assert not (mask & ~before.masks[name]).any()  # nothing comes back
    for name, mask in levels[-1].masks.items():
        assert torch.equal(net.get_parameter(name) == 0, ~mask)
    assert (net.stem.weight != 0).all()
    assert not net._forward_pre_hooks
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())
    assert all(type(parameter) is nn.Parameter for parameter in net.parameters())


def test_training_between_rounds_helps_and_statistics_of_batch_norm_follow_it() -> None:
    net, shot = network(), network()
    score = closeness(net)
    mean = net.norm.running_mean.clone()  # type: ignore[union-attr]
    prunella.prune(shot, RECIPE, calibration=X)
    fit = distil(net, X, epochs=8, rate=1e-2, batch_norm="follow")
    levels = prune_in_rounds(net, RECIPE, 3, fit, score, calibration=X)
    assert score(net) == pytest.approx(levels[-1].score, rel=1e-4)
    assert score(net) > score(shot) / 2  # both are below zero
    assert not torch.equal(net.norm.running_mean, mean)  # type: ignore[arg-type]


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_pruned_weights_are_zero_after_every_step_of_any_optimizer(optimizer: Any) -> None:
    net, zeros = network(), list[int]()
    more = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    trains = optimizer(net.parameters(), lr=0.05, weight_decay=0.1, **more)  # from before the first round

    def fit(net: nn.Module) -> Iterator[None]:
        for _ in range(4):
            net.train()
            sum(out.square().mean() for out in net(X)).backward()
            trains.step()
            trains.zero_grad()
            zeros.append(sum(int((p == 0).sum()) for name, p in net.named_parameters() if name in masked))
            yield

    masked = {"down.weight", "up.weight"}
    levels = prune_in_rounds(net, RECIPE, 3, fit, lambda net: 0.0, calibration=X)
    assert zeros == [level.zeros for level in levels for _ in range(4)]


def test_the_best_of_each_level_is_kept() -> None:
    net, calls = network(), list[float]()
    scores = iter([9.0, 5.0, 7.0, 6.0, 4.0, 3.0, 2.0])  # dense; pruned, then two looks; the same of the second round
    weights = []

    def score(net: nn.Module) -> float:
        calls.append(next(scores))
        weights.append(net.get_parameter("down.weight").detach().clone())
        return calls[-1]

    def fit(net: nn.Module) -> Iterator[None]:
        for _ in range(2):
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter.mul_(1.25)
            yield

    levels = prune_in_rounds(net, RECIPE, 2, fit, score, calibration=X)
    assert [level.scores for level in levels] == [(5.0, 7.0, 6.0), (4.0, 3.0, 2.0)]
    assert [level.score for level in levels] == [7.0, 4.0]
    mask = levels[1].masks["down.weight"]
    assert torch.equal(net.down.weight, weights[2] * mask)  # the second round begins with the best of the first


def test_it_stops_at_the_tolerance_with_the_last_level_within_it() -> None:
    net = network()
    scores = iter([1.0, 0.95, 0.94, 0.6, 0.7])
    levels = prune_in_rounds(net, RECIPE, 5, lambda net: None, lambda net: next(scores), calibration=X, tolerance=0.1)
    assert [level.kept for level in levels] == [True, False]
    zeros = sum(int((net.get_parameter(name) == 0).sum()) for name in levels[0].masks)
    assert zeros == levels[0].zeros < levels[1].zeros
    net, before = network(), network()
    scores = iter([1.0, 0.5, 0.6])
    levels = prune_in_rounds(net, RECIPE, 5, lambda net: None, lambda net: next(scores), calibration=X, tolerance=0.1)
    assert [level.kept for level in levels] == [False]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))  # its own


def test_what_cannot_be_done_in_rounds_is_refused() -> None:
    def refused(match: str, rounds: int = 2, fit: Any = lambda net: None, kind: Any = InputError, **more: Any) -> None:
        recipe = {**RECIPE, **more.pop("recipe", {})}
        with pytest.raises(kind, match=match):
            prune_in_rounds(network(), recipe, rounds, fit, lambda net: 0.0, calibration=X, **more)

    refused("0 rounds along 'cubic': take at least one", 0)
    refused("along 'square'", schedule="square")
    fixed = {"pattern": "2:4", "sparsity": {}, "allocate": "uniform"}
    refused("pattern 2:4 has one sparsity", recipe=fixed)
    assert len(prune_in_rounds(network(), {**RECIPE, **fixed}, 1, lambda n: None, lambda n: 0.0, calibration=X)) == 1

    def revive(net: nn.Module) -> None:
        with torch.no_grad():
            net.get_parameter("down.weight").add_(1)

    refused("weights of 'down.weight' that are pruned are not zero after training", fit=revive, kind=StepError)
    with pytest.raises(InputError, match="to distil takes at least an epoch"):
        distil(network(), X, epochs=0)


def test_distilling_leaves_the_dense_network_and_modes_alone() -> None:
    dense = network()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    fit, net = distil(dense, X, epochs=8, rate=1e-2, looks=2), network()
    with torch.no_grad():
        net.down.weight.mul_(0.3)
    start = closeness(dense)(net)
    assert len(list(fit(net))) == 2
    assert closeness(dense)(net) > start
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert not net.training
