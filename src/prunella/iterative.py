"""Iterative pruning: in rounds, each a little sparser, with training of one's own after each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import InputError, StepError
from .layers import find_layers
from .outcome import BlockResult
from .pattern import unpack
from .pruning import prune_once
from .recipe import Recipe
from .report import Report
from .tasks.module import Module
from .torch_prune import plain
from .train.callback import hold

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "cubic": lambda t: 1 - (1 - t) ** 3,
}


@dataclass(frozen=True)
class Level:
    """A round of iterative pruning.

    share:  of the sparsity that is wanted in the end
    zeros, weights: of the layers that are pruned
    score:  of the best network of this level, which is the one that was kept
    scores: when it was pruned, and at each pause of the training
    kept:   it is within the tolerance
    masks:  {parameter: True where a weight is kept, of its shape}
    report: of the pruning
    """

    share: float
    zeros: int
    weights: int
    score: float
    scores: tuple[float, ...]
    kept: bool
    masks: Mapping[str, Tensor]
    report: Report

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights


def prune_in_rounds(
    network: nn.Module,
    recipe: Recipe | Mapping[str, Any],
    rounds: int,
    fit: Callable[[nn.Module], Iterable[Any] | None],
    score: Callable[[nn.Module], float],
    *,
    calibration: Any,
    tolerance: float | None = None,
    schedule: Literal["linear", "cubic"] = "cubic",
    on_level: Callable[[Level], None] | None = None,
) -> list[Level]:
    """Prune a network in memory in rounds, and train it after each.

    Round k of K prunes to s(k/K), s the recipe's sparsities times t (`linear`) or 1 - (1 - t)^3 (`cubic`): shares of
    all weights, not of what is left, as those of torch.nn.utils.prune are. What one round pruned stays pruned in the
    next. While `fit` trains, whatever optimizer it takes, pruned weights are zero after every step, as are its moments
    of them. Of each level the network with the best score is kept, and the next round begins with it.

    Args:
        network: any module; in the end it has the weights of the last level that is within the tolerance, with zeros
            and no hooks, or its own where none is.
        recipe: its `sparsity` is what is wanted in the end, its steps and allocation choose the weights of each round.
        rounds: K.
        fit: trains the network. If it is a generator function, it may be scored wherever that yields.
        score: how good a network is; larger is better.
        calibration: batches that the network is called with, as of `prunella.prune`.
        tolerance: stop when the score of a level is lower than the dense network's by more; None: never.
        schedule: `linear` or `cubic`, see above.
        on_level: called after each round.

    Returns:
        The levels, in order; the last one may be one that is not `kept`.

    Raises:
        InputError: a pattern of a fixed sparsity, fewer rounds than one, an unknown schedule.
        StepError: weights that are pruned were not zero after `fit`: it trains other parameters than the network's.

    Zhu & Gupta, "To prune, or not to prune", 2017 (the cubic schedule).
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.of({"task": "module", **recipe})
    if rounds < 1 or schedule not in SCHEDULES:
        raise InputError(f"{rounds} rounds along '{schedule}': take at least one, and {' or '.join(SCHEDULES)}.")
    if recipe.shape.sparsity is not None and rounds > 1:
        raise InputError(f"pattern {recipe.pattern} has one sparsity, which leaves nothing to do in {rounds} rounds.")
    task = Module()
    task.hold(network, calibration)
    nothing = {"evaluate": recipe.evaluate.model_copy(update={"source": None}), "keep_zeros": True}
    recipe = recipe.resolved(network).model_copy(update=nothing)
    wanted = {"*": recipe.default_sparsity, **recipe.sparsity}
    dense, levels = score(network), list[Level]()
    with plain(network):
        before = _state(network)
        for number in range(1, rounds + 1):
            share = SCHEDULES[schedule](number / rounds)
            part = {"sparsity": {glob: whole * share for glob, whole in wanted.items()}}
            bits: dict[str, Tensor] = {}
            report = prune_once(
                network,
                recipe if recipe.shape.sparsity is not None else recipe.model_copy(update=part),
                calibration=task.held[False],
                task=task,
                on_block=lambda result, bits=bits: _take(result, bits),  # type: ignore[misc]
            )
            masks = _masks(network, bits)
            scores, best, state = [score(network)], 0, _state(network)
            with hold(network, masks):
                for _ in fit(network) or ((),):
                    _check_zeros(network, masks)
                    scores.append(score(network))
                    if scores[-1] > scores[best]:
                        best, state = len(scores) - 1, _state(network)
            kept = tolerance is None or dense - scores[best] <= tolerance
            network.load_state_dict(state if kept else before)
            zeros = sum(int(mask.numel() - mask.count_nonzero()) for mask in masks.values())
            weights = sum(mask.numel() for mask in masks.values())
            levels.append(Level(share, zeros, weights, scores[best], tuple(scores), kept, masks, report))
            if on_level is not None:
                on_level(levels[-1])
            if not kept:
                break
            before = state
    return levels


def _take(result: BlockResult, bits: dict[str, Tensor]) -> None:
    bits.update(result.masks)


def _masks(network: nn.Module, bits: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of parameters, of their shapes, from those of layers."""
    found: dict[str, Tensor] = {}
    for slot in find_layers(network, ""):
        if slot.name in bits:
            whole = found.setdefault(slot.key, torch.ones(slot.tensor.shape, dtype=torch.bool))
            slot.write(unpack(bits[slot.name].cpu(), slot.shape), whole)
    return found


def _state(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def _check_zeros(network: nn.Module, masks: Mapping[str, Tensor]) -> None:
    parameters = dict(network.named_parameters())
    for name, mask in masks.items():
        if (parameters[name].detach()[~mask.to(parameters[name].device)] != 0).any():
            raise StepError(
                f"weights of '{name}' that are pruned are not zero after training: train the network's own parameters,"
                " with an optimizer of torch."
            )
