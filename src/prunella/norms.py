"""Batch norm after pruning: the mean and variance of what enters each norm, estimated anew in the pruned network.

A batch norm divides by statistics of its inputs that were gathered in training. Pruning changes these inputs; in a
network that it broke the old statistics are the larger part of the damage, and in one that it hardly touched they are
better than any estimate from a few samples. So what estimating does is measured on samples that were not estimated on.

Norms are estimated in the order in which they run, each on what the norms before it make by their new statistics.

Third parties register a way of their own: `@estimates("mine")` in a file of theirs, then
`--set batch_norm=path/to/mine.py:mine`.
"""

from __future__ import annotations

import contextlib
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from .compat import BATCH_NORM, INSTANCE_NORM
from .errors import InputError, ModelError, NumericalError, unknown
from .evaluate.measure import measure
from .evaluate.perplexity import answered
from .foreign import call
from .model.checkpoint import Source
from .model.network import Model
from .model.task import NO_ANSWERS, Answers
from .progress import Track, no_track
from .registry import Method, checked, lookup
from .samples import Samples
from .save import Output
from .stream import Stream
from .unlabelled import targeted
from .waits import fetch
from .watch import Stop

MEAN, VARIANCE = "running_mean", "running_var"  # torch's names
HELD_OUT = 5  # of so many samples one is not estimated on
KIND = "way to estimate batch norms"
AUTO = ("reset", "correct")  # the ways that are tried where nobody chose one
NOTE = "batch norm"  # in the journal, and in front of progress
Statistics = tuple[Tensor, Tensor]  # mean and variance of each channel, (C,), float64


@dataclass(frozen=True)
class Moments:
    """What entered a norm, by channel, over all samples and positions: float64, on the host."""

    count: int
    sum_C: Tensor
    sumsq_C: Tensor

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.sum_C + other.sum_C, self.sumsq_C + other.sumsq_C)

    @property
    def mean_C(self) -> Tensor:
        return self.sum_C / self.count

    @property
    def variance_C(self) -> Tensor:
        """Of n values divided by n - 1, as torch keeps it."""
        return (self.sumsq_C - self.sum_C * self.mean_C).clamp_min(0) / (self.count - 1)


@dataclass(frozen=True)
class Norm:
    """One batch norm, for a way to estimate its statistics.

    mean_C, variance_C: its statistics as they are
    epsilon: what is added to the variance
    dense:   what enters it in the dense network
    pruned:  what enters it in the pruned one
    """

    name: str
    mean_C: Tensor
    variance_C: Tensor
    epsilon: float
    dense: Moments
    pruned: Moments


# ---------------------------------------------------------------------------------------------------------
# Ways

Way = Callable[[Norm], Statistics]
ways: dict[str, Method] = {}


def estimates(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a way to estimate the statistics of a batch norm: a decorator.

    The function is given a `Norm` and returns its new mean and variance, two tensors (C,). Its keyword arguments are
    the way's options, with their types and defaults.

    Args:
        name: what users call it, as `batch_norm` of a recipe.
    """

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        first = next(iter(inspect.signature(function).parameters))
        if typing.get_type_hints(function).get(first) is not Norm:
            raise TypeError(f"the first argument of the way '{name}' to estimate batch norms must be annotated as Norm")
        ways[name] = Method(name, frozenset(), function, per_layer=False)
        return function

    return add


@estimates("reset")
def reset(norm: Norm) -> Statistics:
    """The mean and variance of what enters the norm now, and nothing of what they were.

    Over all samples and positions at once: what torch's own norm gathers in training mode with momentum=None from one
    batch of all samples.
    """
    return norm.pruned.mean_C, norm.pruned.variance_C


@estimates("momentum")
def momentum(norm: Norm, *, share: Annotated[float, Field(gt=0, le=1)] = 0.5) -> Statistics:
    """From the old statistics towards those of `reset`: (1 - share) old + share new.

    Args:
        share: how far; 1 is `reset`.
    """
    mean_C, variance_C = reset(norm)
    return norm.mean_C.lerp(mean_C, share), norm.variance_C.lerp(variance_C, share)


@estimates("correct")
def correct(norm: Norm) -> Statistics:
    """What gives the norm's output the mean and deviation that it has in the dense network, channel by channel.

    Let a, b be mean and variance of the inputs in the pruned network, A, B those in the dense one, and m, v + e the
    statistics with which the norm divides there. Its output has there the mean g (A - m) / sqrt(v + e) + h and the
    deviation |g| sqrt(B / (v + e)); with

        v' + e = (v + e) b / B        m' = a - (A - m) sqrt(b / B)

    it has them here too. Both networks see the same samples, and what these have of their own cancels: where
    pruning changed nothing, nothing changes. A channel that does not vary, here or there, keeps its variance, and one
    that hardly varies here gets no variance below 0.
    """
    a_C, b_C, dense = norm.pruned.mean_C, norm.pruned.variance_C, norm.dense
    varies_C = (b_C > 0) & (dense.variance_C > 0)
    ratio_C = torch.where(varies_C, b_C / dense.variance_C, torch.ones_like(b_C))
    variance_C = (norm.variance_C + norm.epsilon) * ratio_C - norm.epsilon
    return a_C - (dense.mean_C - norm.mean_C) * ratio_C.sqrt(), variance_C.clamp_min(0)


def make_way(name: str, options: Mapping[str, Any] | None = None) -> Way:
    """The registered way `name`, or the one that `path/to/file.py:name` registers, ready to use. Raises InputError for
    an unknown name, an unknown option or a wrong value."""
    if ".py:" not in name and name not in ways:
        raise InputError(unknown(KIND, name, ["auto", "keep", *ways]))
    method = lookup(KIND, ways, name)
    chosen = checked(KIND, method, options or {})

    def estimate(norm: Norm) -> Statistics:
        mean_C, variance_C = call(method, f"way '{name}' at batch norm '{norm.name}'", tuple, norm, chosen)
        return mean_C, variance_C

    return estimate


def make_ways(name: str, options: Mapping[str, Any] | None = None) -> dict[str, Way]:
    """What a recipe's `batch_norm` has to be tried: `keep` nothing, `auto` several. Raises InputError."""
    if name in ("auto", "keep"):
        if options:
            raise InputError(f"batch_norm: {name} has no options.")
        return {key: make_way(key) for key in (AUTO if name == "auto" else ())}
    return {name: make_way(name, options)}


# ---------------------------------------------------------------------------------------------------------
# Norms of a network


def batch_norms(network: nn.Module) -> dict[str, nn.Module]:
    """The batch norms of a network that have statistics, by name, and what else is made as one (frozen ones, whose
    statistics are buffers). Raises ModelError for one that has none: what it makes of a sample depends on those that
    happen to be in its batch."""
    found: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        mean = module._buffers.get(MEAN)
        if isinstance(module, BATCH_NORM) and mean is None:
            raise ModelError(
                f"batch norm '{name}' keeps no statistics (track_running_stats=False): what it makes of a sample"
                " depends on the others of its batch. Make it with track_running_stats=True, and let it see data in"
                " training mode once."
            )
        if mean is not None and module._buffers.get(VARIANCE) is not None and not isinstance(module, INSTANCE_NORM):
            found[name] = module
    return found


class _Gather:
    """Watches what enters norms. `done` is called after each batch that passed: only then does it count."""

    def __init__(self, norms: Mapping[str, nn.Module], stop: bool):
        self.norms, self.stop = norms, stop
        self.moments: dict[str, Moments] = {}
        self.strange: dict[str, str] = {}
        self._new: dict[str, tuple[int, Tensor, Tensor]] = {}

    def __enter__(self) -> _Gather:
        self._handles = [
            module.register_forward_pre_hook(partial(self._see, name), with_kwargs=True)
            for name, module in self.norms.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        channels = len(module._buffers[MEAN])  # type: ignore[arg-type]
        if name in self._new:
            self.strange[name] = "is called several times"
        elif x.ndim < 2 or x.shape[1] != channels:
            self.strange[name] = f"is given {tuple(x.shape)} for its {channels} channels"
        else:
            x_CT = x.transpose(0, 1).flatten(1)
            x_CT = x_CT if x.device.type == "mps" else x_CT.double()  # which has none
            self._new[name] = x_CT.shape[1], x_CT.sum(1), x_CT.square().sum(1)
        if self.stop:
            raise Stop

    def forget(self) -> None:
        """A batch begins."""
        self._new = {}

    def done(self) -> None:
        """A batch has passed."""
        names, counts = list(self._new), [count for count, _, _ in self._new.values()]
        here = iter(fetch([tensor for _, *both in self._new.values() for tensor in both]))
        for name, count in zip(names, counts, strict=True):
            new = Moments(count, next(here).double(), next(here).double())
            self.moments[name] = self.moments[name] + new if name in self.moments else new


Run = Callable[[_Gather], None]


def _runs(model: Model, samples: Samples, source: Source | None, track: Track) -> Iterator[tuple[str | None, Run]]:
    """The parts of a network in the order in which samples pass them: the block, or None for what lies before a
    stack of blocks or behind them all, and what runs all samples through that part alone. Its weights are loaded; those
    that a norm has when the next part is asked for are what the samples pass."""
    stream = Stream(model, samples, checkpoint=source)

    def every(work: Callable[[int], Any], gather: _Gather) -> None:
        def one() -> None:
            gather.forget()
            with contextlib.suppress(Stop):
                work(batch)
            gather.done()

        batch = 0
        with torch.no_grad():
            while batch < len(stream.batches):
                batch += stream.fits(batch, one)

    def enter(batch: int) -> tuple[Tensor, list[Any]]:
        return stream.calls.enter(stream.batches[batch], stream.hidden.states(batch))

    for index, block in model.walk(source, track=track, what=NOTE):
        if index == model.spans[model.stack_of(index)].start:
            with model.outside(head=False, checkpoint=source):
                yield None, partial(every, enter)
                with torch.no_grad():
                    for batch in range(len(stream.batches)):
                        stream.hidden[batch], calls = enter(batch)
                        stream.hidden.calls[batch][-len(calls) :] = calls
        yield block.name, partial(every, partial(stream.run, block, stream.hidden))
        stream.advance(block)
    with model.outside(checkpoint=source):
        yield None, partial(every, stream.outputs)


class BatchNorms:
    """The batch norms of a network that is to be pruned, and what enters them before it is.

    Args:
        samples: of the calibration.
        ways: to be tried.
        choose: take what is best of these and of keeping what was; else the last of these.
        seed: of the choice of samples that are held out.

    samples:  to estimate on, and `held_out`, to measure on: a fifth
    norms:    by name
    order:    for each part of the network the norms that it runs, in order
    before:   their statistics, {tensor: value}
    dense:    what enters each
    kept:     those that stay as they are, and why
    """

    def __init__(
        self,
        model: Model,
        samples: Samples,
        ways: Mapping[str, Way],
        *,
        choose: bool,
        seed: int = 0,
        track: Track = no_track,
    ):
        self.model, self.ways, self.choose, self.track = model, ways, choose, track
        self._higher = False
        self.norms = batch_norms(model.network)
        # Drawn: among samples in a regular order every fifth would be of one class.
        drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
        apart = len(samples) // HELD_OUT
        self.held_out = targeted(model, Samples(tuple(samples.pick(sorted(drawn[:apart])))), track=track)
        self.samples = Samples(tuple(samples.pick(sorted(drawn[apart:]))))
        self.answers: Answers = NO_ANSWERS
        if self.held_out.groups:
            self.held_out = targeted(model, self.held_out, track=track)
            _, self.answers = answered(model, self.held_out, track=track)
        self.order: list[list[str]] = []
        self.before: dict[str, Tensor] = {}
        self.dense: dict[str, Moments] = {}
        self.kept: dict[str, str] = {}
        for block, run in _runs(model, self.samples, None, track):
            here = {
                name: module
                for name, module in self.norms.items()
                if name not in self.dense and name not in self.kept and model.block_of(f"{name}.{MEAN}") == block
            }
            with _Gather(here, stop=False) as gather:
                run(gather)
            self.kept |= gather.strange
            found = {name: moments for name, moments in gather.moments.items() if name not in self.kept}
            self.kept |= {name: "sees a single value" for name, moments in found.items() if moments.count < 2}
            self.order.append([name for name in found if name not in self.kept])
            self.dense |= {name: found[name] for name in self.order[-1]}
            self.before |= {
                f"{name}.{key}": self.norms[name]._buffers[key].detach().clone()  # type: ignore[union-attr]
                for name in self.order[-1]
                for key in (MEAN, VARIANCE)
            }
        self.kept |= {name: "is not called" for name in self.norms if name not in self.dense and name not in self.kept}

    def settle(self, out: Output | None) -> dict[str, Any]:
        """Estimate the statistics of the pruned network, which is on disk, or in memory; keep those that the recipe
        asks for or, if it leaves that open, those with the lowest loss on what is held out. Returns what happened, for
        the report. A run that resumes does not do it again."""
        on_disk = out if self.model.checkpoint is not None else None
        if out is not None and (found := out.notes.get(NOTE)) is not None:
            return dict(found)

        def put(statistics: Mapping[str, Tensor]) -> None:
            for name, value in statistics.items():
                self.model.network.get_buffer(name).copy_(value)
            if on_disk is not None:
                on_disk.write_outside(statistics)

        put(self.before)  # an interrupted run may have left others
        source = None if on_disk is None else on_disk.checkpoint
        new = {"keep": self.before}
        tried = {"keep": self._scores(source)}
        for name, way in self.ways.items():
            if self.choose and not self.held_out.groups:
                break
            put(self.before)
            new[name] = self._estimate(way, source, put)
            tried[name] = self._scores(source)
        taken = self._best(tried) if self.choose else list(new)[-1]
        put(new[taken])
        about = {"samples": len(self.samples), "held_out": len(self.held_out), "norms": len(self.dense)}
        found = {"taken": taken, **about, "tried": tried, "kept": self.kept}
        if out is not None:
            out.note(NOTE, found)
        return found

    def _scores(self, source: Source | None) -> dict[str, float]:
        """Of what is held out, the loss, if the task has one, and the task's own figure; nothing where they are not
        finite, or nothing is held out."""
        if not self.held_out.groups:
            return {}
        try:
            scores, _ = measure(self.model, None, self.held_out, source, self.track, self.answers)
        except NumericalError:  # a network that is broken: others may be better
            return {}
        self._higher = "loss" not in scores and bool(scores.get("higher"))
        return {key: scores[key] for key in dict.fromkeys(("loss", scores.get("figure", "loss"))) if key in scores}

    def _best(self, tried: Mapping[str, Mapping[str, float]]) -> str:
        """What gives the lowest loss or, of a task without one, the best figure; of equal ones the first."""
        first = {name: next(iter(scores.values())) for name, scores in tried.items() if scores}
        sign = -1 if self._higher else 1
        return min(first, key=lambda name: sign * first[name], default="keep")

    def _estimate(
        self, way: Way, source: Source | None, put: Callable[[Mapping[str, Tensor]], None]
    ) -> dict[str, Tensor]:
        """Give each norm new statistics, by this way, and return them; `put` makes the network have them, where it is
        read from too. Raises NumericalError."""
        new: dict[str, Tensor] = {}
        runs = _runs(self.model, self.samples, source, self.track)
        for names, (block, run) in zip(self.order, runs, strict=True):
            for name in names:
                with _Gather({name: self.norms[name]}, stop=block is not None) as gather:
                    run(gather)
                found = self._estimated(name, way, gather.moments[name])
                put(found)
                new |= found
        return new

    def _estimated(self, name: str, way: Way, pruned: Moments) -> dict[str, Tensor]:
        mean, variance = (self.before[f"{name}.{key}"] for key in (MEAN, VARIANCE))
        epsilon = float(getattr(self.norms[name], "eps", 1e-5))
        if not (pruned.sum_C.isfinite().all() and pruned.sumsq_C.isfinite().all()):
            raise NumericalError(
                f"the inputs of batch norm '{name}' hold NaN or infinity: the pruned network overflows; use"
                " --dtype float32 or bfloat16, or keep the statistics (--set batch_norm=keep)."
            )
        norm = Norm(name, mean.cpu().double(), variance.cpu().double(), epsilon, self.dense[name], pruned)
        found = dict(zip((MEAN, VARIANCE), way(norm), strict=True))
        new = {f"{name}.{key}": value.to(mean.dtype) for key, value in found.items()}
        for key, value in new.items():
            if (
                value.shape != mean.shape
                or not value.isfinite().all()
                or (key.endswith(VARIANCE) and (value < 0).any())
            ):
                raise NumericalError(
                    f"'{key}' would become {tuple(value.shape)} values from {value.min():g} to {value.max():g}, which"
                    f" {mean.dtype} or a norm cannot hold: use --dtype float32, or --set batch_norm=keep."
                )
        return new
