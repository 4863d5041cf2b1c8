"""A schedule from a file outside the package, which moves masks inside one training, by every step that prunes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from processes import together
from torch import Tensor

import prunella
from prunella import InputError
from prunella.layers import find_layers
from prunella.moving import updates
from prunella.recipe import Recipe
from prunella.registry import steps as known
from prunella.samples import Samples
from prunella.tasks.loss import next_token_loss
from prunella.train.loop import Training
from prunella.train.parts import Chosen, attach, choose, detach, make_group, parts_of
from prunella.train.schedule import Schedule, make_schedule

FILE = Path(__file__).parent / "extensions" / "toy_schedule.py"
STEPS, SPARSITY = 8, 0.5
QUICK = {"magnitude", "wanda"}
PRUNING = sorted(name for name, method in known.items() if method.prunes)


def trained_by(step: str, schedule: Schedule, folder: Path, **options: Any) -> tuple[Training, Any, list[Chosen]]:
    """A tiny model, everything in it trains, masks by this step."""
    torch.manual_seed(0)
    network = tiny.build("llama")
    model = prunella.wrap_model(network)
    chosen = choose(parts_of(model, {}), [make_group("all", {"rate": 1e-2})])
    attach(chosen)
    recipe = Recipe.of({"steps": [step], "sparsity": SPARSITY, "calibration": {"min_tokens": 1}})
    ids = tiny.token_windows(8, 16)
    training = Training(
        network,
        chosen,
        Samples.of(ids),
        lambda outputs, batch: next_token_loss(outputs.logits, batch["input_ids"]),
        schedule,
        folder,
        batch=2,
        micro=1,
        every=3,
        update=updates(network, chosen, recipe, ids[:4]),
        **options,
    )
    return training, network, chosen


def weights(network: Any) -> dict[str, Tensor]:
    model = prunella.wrap_model(network)
    found = {s.name: s.read().clone() for b in model.blocks for s in find_layers(model.module(b), b)}
    model.give_back()
    return found


@pytest.mark.parametrize(
    "step", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PRUNING]
)
def test_masks_move_while_it_trains(step: str, tmp_path: Path) -> None:
    schedule = make_schedule(f"{FILE}:cubic", STEPS, {"every": 2})
    training, network, chosen = trained_by(step, schedule, tmp_path)
    zeros: dict[int, int] = {}
    layers = [item for item in chosen if "linear" in item.part.kinds]
    with training:
        while training.advance(1):
            zeros[training.state.step] = 0
            for item in layers:
                mask = item.change.mask
                assert mask is not None
                assert not item.change(item.part.value)[~mask].any()
                zeros[training.state.step] += int((~mask).sum())
                for moment in training.optimizer.state[next(item.change.parameters())].values():
                    if moment.shape == mask.shape:
                        assert not moment[~mask].any()
        outcome = training.finish()
    assert outcome.steps == STEPS == len(outcome.losses)
    assert len(set(zeros.values())) == 3  # at steps 0, 2 and 4
    assert list(zeros.values()) == sorted(zeros.values())
    detach(chosen)
    budgets: dict[str, list[int]] = {}
    for name, weight in weights(network).items():  # a step on blocks may spread it over a block's layers
        at = name if known[step].per_layer else name[: len("model.layers.0")]
        budget = budgets.setdefault(at, [0, 0])
        budget[0] += int((weight == 0).sum())
        budget[1] += round(SPARSITY * weight.numel())
    assert all(zero == wanted for zero, wanted in budgets.values()), budgets


def test_it_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    ends = []
    for folder, kills in ((tmp_path / "whole", False), (tmp_path / "cut", True)):
        training, network, chosen = trained_by("magnitude", make_schedule(f"{FILE}:cubic", STEPS), folder)
        with training:
            training.advance(5 if kills else None)
        if kills:  # between its checkpoints
            schedule = make_schedule(f"{FILE}:cubic", STEPS)
            training, network, chosen = trained_by("magnitude", schedule, folder, resume=True)
            with training:
                assert training.state.step == 3
                assert schedule.state() == {"seen": [0, 2]}
                training.advance()
        detach(chosen)
        ends.append((weights(network), training.state.losses))
    assert ends[0][1] == ends[1][1]
    assert all(torch.equal(weight, ends[1][0][name]) for name, weight in ends[0][0].items())


def in_company(folder: str) -> None:
    training, network, chosen = trained_by("magnitude", make_schedule(f"{FILE}:cubic", STEPS), Path(folder))
    with training:
        training.advance()
    detach(chosen)
    if training.team.main:
        torch.save((weights(network), training.state.losses), Path(folder) / f"{training.team.size}.pt")


@pytest.mark.slow
def test_two_processes_hold_the_masks_of_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    in_company(str(tmp_path))
    assert together(log, in_company, str(tmp_path)) == 0, log.read_text()
    one, two = (torch.load(tmp_path / f"{size}.pt") for size in (1, 2))
    assert two[1] == pytest.approx(one[1], rel=1e-3)
    for name, weight in one[0].items():
        assert int((two[0][name] == 0).sum()) == int((weight == 0).sum()) == round(SPARSITY * weight.numel())
        assert ((two[0][name] == 0) == (weight == 0)).float().mean() > 0.99


def test_masks_that_are_not_accepted_are_taken_back(tmp_path: Path) -> None:
    class Gated(Schedule):
        seen: list[float] = []  # noqa: RUF012

        def sparsity(self, t: int) -> float | None:
            return {0: 0.5, 2: 1.0}.get(t)

        def accept(self, divergence: Any) -> bool:
            self.seen.append(divergence())
            return len(self.seen) == 1

    held_out = Samples.of(tiny.token_windows(4, 16))
    training, network, chosen = trained_by("magnitude", Gated(4), tmp_path, held_out=held_out)
    with training:
        training.advance()
    detach(chosen)
    assert len(Gated.seen) == 2
    for name, weight in weights(network).items():
        assert int((weight == 0).sum()) == round(SPARSITY / 2 * weight.numel()), name


def test_what_a_schedule_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown option of schedule cubic 'evry'\. Did you mean 'every'"):
        make_schedule(f"{FILE}:cubic", STEPS, {"evry": 2})
    with pytest.raises(InputError, match="Did you mean 'constant'"):
        make_schedule("constnt", STEPS)
    training, _, _ = trained_by("magnitude", make_schedule("imp", 4, {"rounds": 2}), tmp_path)
    training.update = None
    with training, pytest.raises(InputError, match="use the schedule `constant`"):
        training.advance()
