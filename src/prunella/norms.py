"""Batch norm after pruning: the mean and variance of what enters each norm, estimated anew in the pruned network.

A batch norm divides by statistics of its inputs that were gathered in training. Pruning changes these inputs; in a
network that it broke the old statistics are the larger part of the damage, and in one that it hardly touched they are
better than any estimate from a few samples. So what estimating does is measured on samples that were not estimated on.

Norms are estimated in the order in which they run, each on what the norms before it make by their new statistics.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .compat import BATCH_NORM, INSTANCE_NORM
from .errors import ModelError, NumericalError
from .evaluate.measure import measure
from .evaluate.perplexity import answered, measured
from .model.checkpoint import Source
from .model.network import Model
from .model.task import NO_ANSWERS, Answers
from .model.walk import LoadedBlock, Weights
from .norm_ways import Moments, Norm, Way
from .progress import Track, no_track
from .samples import Samples
from .save import Output
from .stream import Stream
from .unlabelled import compared, targeted
from .waits import fetch
from .watch import Stop

MEAN, VARIANCE = "running_mean", "running_var"  # torch's names
HELD_OUT = 5  # of so many samples one is not estimated on
NOTE = "batch norm"  # in the journal, and in front of progress
FILE = "batch_norm.safetensors"  # beside the model in the making: the statistics that were taken


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


def _every(stream: Stream, work: Callable[[int], Any], gather: _Gather) -> None:
    """Do this with each batch of a stream, and let what norms are given count where it was done."""

    def one() -> None:
        gather.forget()
        with contextlib.suppress(Stop):
            work(batch)
        gather.done()

    batch = 0
    with torch.no_grad():
        while batch < len(stream.batches):
            batch += stream.fits(batch, one)


def _runs(model: Model, samples: Samples, source: Source | None, track: Track) -> Iterator[tuple[str | None, Run]]:
    """The parts of a network in the order in which samples pass them: the block, or None for what lies before a
    stack of blocks or behind them all, and what runs all samples through that part alone. Its weights are loaded; those
    that a norm has when the next part is asked for are what the samples pass."""
    stream = Stream(model, samples, checkpoint=source)

    def enter(batch: int) -> tuple[Tensor, list[Any]]:
        return stream.calls.enter(stream.batches[batch], stream.hidden.states(batch))

    for index, block in model.walk(source, track=track, what=NOTE):
        if index == model.spans[model.stack_of(index)].start:
            with model.outside(head=False, checkpoint=source):
                yield None, partial(_every, stream, enter)
                with torch.no_grad():
                    for batch in range(len(stream.batches)):
                        stream.hidden[batch], calls = enter(batch)
                        stream.hidden.calls[batch][-len(calls) :] = calls
        yield block.name, partial(_every, stream, partial(stream.run, block, stream.hidden))
        stream.advance(block)
    with model.outside(checkpoint=source):
        yield None, partial(_every, stream, stream.outputs)


class BatchNorms:
    """The batch norms of a network that is to be pruned, and what enters them before it is.

    Args:
        samples: of the calibration.
        ways: to be tried.
        choose: take what is best of these and of keeping what was; else the last of these.
        seed: of the choice of samples that are held out.

    samples:  to estimate on, and `held_out`, to measure on: a fifth
    compared: those of the latter with what the dense network answers in place of their labels, where the task tells how
              far a network is from that
    norms:    by name
    order:    for each part of the network the norms that it runs, in order
    before:   their statistics, {tensor: value}
    dense:    what enters each, of these samples, and of `every` one
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
        self.held_out = Samples(tuple(samples.pick(sorted(drawn[:apart]))))
        self.samples = Samples(tuple(samples.pick(sorted(drawn[apart:]))))
        self.answers: Answers = NO_ANSWERS
        self.compared: Samples | None = None
        if self.held_out.groups:
            self.compared = compared(model, self.held_out, track=track)
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
        self.every = dict(self.dense)
        others = _runs(model, self.held_out, None, track) if self.held_out.groups else ()
        for names, (_, run) in zip(self.order, others, strict=False):
            with _Gather({name: self.norms[name] for name in names}, stop=False) as gather:
                run(gather)
            self.every |= {name: self.dense[name] + gather.moments[name] for name in names}
        self.kept |= {name: "is not called" for name in self.norms if name not in self.dense and name not in self.kept}

    def advance(self, stream: Stream, block: LoadedBlock, weights: Weights) -> None:
        """Take a stream of all samples through a block that is pruned and has these weights. Meanwhile its norms have
        statistics that fit what enters them, so that the blocks after it see inputs of the size that they are going to
        have: else what they lose is chosen, and made up for, in a network that is broken. Where nobody chose a way it
        is `correct`, which leaves alone what is not broken."""
        way = self.ways["correct"] if self.choose else list(self.ways.values())[-1]
        names = [name for part in self.order for name in part if self.model.block_of(f"{name}.{MEAN}") == block.name]
        with contextlib.ExitStack() as stack:
            stack.enter_context(block.use(weights))
            for name in names:
                with _Gather({name: self.norms[name]}, stop=True) as gather:
                    _every(stream, partial(stream.run, block, stream.hidden), gather)
                stack.enter_context(block.use(self._estimated(name, way, self.every[name], gather.moments[name])))
            stream.advance(block)

    def settle(self, out: Output | None) -> dict[str, Any]:
        """Estimate the statistics of the pruned network, which is on disk, or in memory; keep those that the recipe
        asks for or, if it leaves that open, those that bring it nearest to the dense one on what is held out. Returns
        what happened, for the report. A run that resumes does not do it again."""
        on_disk = out if self.model.checkpoint is not None else None

        def put(statistics: Mapping[str, Tensor]) -> None:
            for name, value in statistics.items():
                self.model.network.get_buffer(name).copy_(value)
            if on_disk is not None:
                on_disk.write_outside(statistics)

        if out is not None and (found := out.notes.get(NOTE)) is not None:
            put(load_file(out.partial / FILE))  # those outside of the blocks are the source's again
            return dict(found)
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
            out.put_aside(FILE, new[taken])
            out.note(NOTE, found)
        return found

    def _scores(self, source: Source | None) -> dict[str, float]:
        """Of what is held out, how far the network is from the dense one, if labels tell something else; the loss, if
        the task has one, and the task's own figure. Nothing where they are not finite, or nothing is held out."""
        if not self.held_out.groups:
            return {}
        try:
            scores, _ = measure(self.model, None, self.held_out, source, self.track, self.answers)
            apart = self.compared and measured(self.model, self.compared, checkpoint=source, track=self.track)
        except NumericalError:  # a network that is broken: others may be better
            return {}
        self._higher = not apart and "loss" not in scores and bool(scores.get("higher"))
        found = {"divergence": sum(apart) / len(apart)} if apart else {}
        keys = dict.fromkeys(("loss", scores.get("figure", "loss")))
        return found | {key: scores[key] for key in keys if key in scores}

    def _best(self, tried: Mapping[str, Mapping[str, float]]) -> str:
        """What is nearest to the dense network: of as few samples as these that says more than which answers are right.
        Else what gives the lowest loss or, of a task without one, the best figure; of equal ones the first."""
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
                found = self._estimated(name, way, self.dense[name], gather.moments[name])
                put(found)
                new |= found
        return new

    def _estimated(self, name: str, way: Way, dense: Moments, pruned: Moments) -> dict[str, Tensor]:
        mean, variance = (self.before[f"{name}.{key}"] for key in (MEAN, VARIANCE))
        epsilon = float(getattr(self.norms[name], "eps", 1e-5))
        if not (pruned.sum_C.isfinite().all() and pruned.sumsq_C.isfinite().all()):
            raise NumericalError(
                f"the inputs of batch norm '{name}' hold NaN or infinity: the pruned network overflows; use"
                " --dtype float32 or bfloat16, or keep the statistics (--set batch_norm=keep)."
            )
        norm = Norm(name, mean.cpu().double(), variance.cpu().double(), epsilon, dense, pruned)
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
        return {key: value.to(mean.device) for key, value in new.items()}
