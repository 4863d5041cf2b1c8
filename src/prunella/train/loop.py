"""The training loop, for every network: on accelerate, in one process or several."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..compat import forget_accelerator
from ..errors import InputError
from ..progress import OnStep
from ..samples import Batch, Samples, on, size_of
from ..team import meet, team, told
from ..waits import demand, fetch, together
from . import checkpoints
from .around import Called, check_reached, remade, share_statistics, statistics_of
from .checkpoints import Diverged, State
from .parts import Change, Chosen, trained
from .schedule import Schedule
from .shard import gather, is_sharded, scatter, share_optimizer

Run = Callable[[nn.Module, Batch], Any]  # what the network makes of a batch
Loss = Callable[[Any, Batch], Tensor]  # of what it made, the mean over the batch
Update = Callable[[float], Mapping[str, Tensor]]  # share of the wanted sparsity -> {part: its new mask, of its shape}


@dataclass(frozen=True)
class Outcome:
    """What a training did: the loss of every step, and of the held-out samples {step: loss}. The best step is 0 where
    no step was better than what was there before."""

    losses: tuple[float, ...]
    held_out: dict[int, float]
    best_step: int
    steps: int


class Training:
    """One training of a network whose weights are loaded, or sharded: `with Training(…) as training`.

    A step adds up the gradients of `batch` samples, `micro` at a time in each process, clips them, and takes a step of
    AdamW without weight decay. Where the schedule says so, new masks are chosen before it; moments of weights that went
    or came back are zero then. Checkpoints hold what trains, its moments, the masks if they moved, and how far it is: a
    run that was killed goes on to the same bytes.

    Args:
        network: what trains; its parameters in float32 or, behind a `Change`, in any dtype.
        chosen: what trains of it, attached; or the learning rate of all its parameters.
        samples: what to train on, in this order; taken again from the start where more is asked for.
        loss: of the network's outputs on a batch, the mean over its samples.
        schedule: what changes meanwhile, and for how many steps.
        folder: for checkpoints.
        run: what the network makes of a batch; by default it is called with all tensors of the batch.
        order: numbers of the samples in the order of the k-th pass, from 0; None: as they are. Where they are of
            several shapes, those of a step that are of one shape go together.
        augment: what is made of some samples before they are run, and the step that they are for.
        still: modules that stay as they are in evaluation.
        unused: parameters may train that do not enter every loss.
        held_out: what to find the best checkpoint on, with `score` in the place of the loss; None: the last one is it.
        every: steps from one checkpoint, and look at what is held out, to the next; there is one at the end too.
        patience: stop after so many looks that were no better; None: never.
        bfloat16: products in bfloat16, of float32 weights.
        recompute: activations, and what changes make, in the backward pass: less memory, more time.
        update: chooses new masks, where the schedule moves them; called with the weights in training.
        resume: go on from the last checkpoint, if there is one.
        on_step: called after each step, `on_step(step, steps, loss)`.
    """

    def __init__(
        self,
        network: nn.Module,
        chosen: Sequence[Chosen] | float,
        samples: Samples,
        loss: Loss,
        schedule: Schedule,
        folder: str | Path,
        *,
        run: Run = lambda network, batch: network(**batch),
        order: Callable[[int], Sequence[int]] | None = None,
        augment: Callable[[Batch, int], Batch] | None = None,
        still: Collection[nn.Module] = (),
        unused: bool = False,
        held_out: Samples | None = None,
        score: Loss | None = None,
        batch: int,
        micro: int,
        every: int,
        clip: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        patience: int | None = None,
        seed: int = 0,
        bfloat16: bool = False,
        recompute: bool = False,
        update: Update | None = None,
        resume: bool = False,
        on_step: OnStep | None = None,
    ):
        self.network, self.samples, self.loss, self.schedule = network, samples, loss, schedule
        self.called, self.folder = Called(network, run), Path(folder)
        self.order, self.augment, self.still, self.unused = order, augment, still, unused
        self.held_out, self.score = held_out, score or loss
        self.batch, self.micro, self.every, self.clip, self.betas = batch, micro, every, clip, betas
        self.patience, self.seed, self.bfloat16, self.recompute = patience, seed, bfloat16, recompute
        self.update, self.resume, self.on_step = update, resume, on_step
        self.chosen = () if isinstance(chosen, float) else tuple(chosen)
        self.changes = tuple(dict.fromkeys(item.change for item in self.chosen))
        self.device = next(network.parameters()).device
        self.sharded = is_sharded(network)
        self.state = State()
        self._rate = chosen if isinstance(chosen, float) else None
        self._stack = contextlib.ExitStack()
        self._drawn: tuple[int, Sequence[int]] = -1, ()  # a pass, and the order of its samples

    # --- around it

    def __enter__(self) -> Training:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        device = meet(self.device)
        self.team = team()
        if device.index is not None and self.device.index not in (None, device.index):
            raise InputError(
                f"retraining runs on {device} here, not on {self.device}: choose with CUDA_VISIBLE_DEVICES."
            )
        if self.batch < self.team.size:
            raise InputError(f"a step of {self.batch} samples cannot be shared by {self.team.size} processes.")
        if self.team.size > 1 and len(self.samples.groups) > 1 and self.sharded:
            raise InputError("samples of several shapes cannot train a model that is sharded.")
        with contextlib.ExitStack() as stack:
            stack.enter_context(remade(self.network, self.changes, self.recompute))
            forget_accelerator()
            with told(self.device), warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".broadcast_buffers. is deprecated", FutureWarning)
                # Buffers are not sent about: masks are the same everywhere.
                kwargs = DistributedDataParallelKwargs(find_unused_parameters=self.unused, broadcast_buffers=False)
                self.accelerator = Accelerator(
                    cpu=self.device.type == "cpu",
                    device_placement=False,
                    mixed_precision="bf16" if self.bfloat16 else "no",
                    kwargs_handlers=[kwargs],
                )
                self.model = self.accelerator.prepare_model(self.called, evaluation_mode=self.sharded)
            self.optimizer = self._make_optimizer()
            if self.resume:
                self._go_on()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.network.eval()
        self._stack.close()
        del self.model, self.accelerator, self.optimizer

    def _make_optimizer(self) -> torch.optim.AdamW:
        named: dict[str, dict[str, Any]] = {}
        if self._rate is not None:
            named["all"] = {"params": list(self.network.parameters()), "lr": self._rate, "rate": self._rate}
        for item in self.chosen:
            rate = item.group.rate
            group = named.setdefault(item.group.name, {"params": [], "lr": rate, "rate": rate})
            group["params"] += list(item.change.parameters())
        optimizer = torch.optim.AdamW(list(named.values()), betas=self.betas, weight_decay=0.0, fused=True)
        if self.sharded:
            share_optimizer(optimizer)
        return optimizer

    # --- training

    @property
    def ended(self) -> bool:
        """Are all steps done, or was it stopped early?"""
        return self.state.step >= self.schedule.steps or self._stopped

    @property
    def _stopped(self) -> bool:
        return self.patience is not None and self.state.waited >= self.patience

    def advance(self, steps: int | None = None) -> bool:
        """Take so many steps, or all that are left; False: there are none left. Raises Diverged."""
        if self.state.step == 0 and self.held_out is not None and not self.state.held_out:
            self.state.held_out[0] = self.evaluate()
        end = self.schedule.steps if steps is None else self.state.step + steps
        while self.state.step < end and not self.ended:
            self._step()
        return not self.ended

    def finish(self, name: str = "final") -> Outcome:
        """Take the best checkpoint of this name, if samples were held out; what was done."""
        state = self.state
        best = state.best.get(name, state.step)
        if name in state.best and (self.held_out is not None or best != state.step):
            self._load(checkpoints.at(self.folder, best))
        if state.held_out.get(0, math.inf) <= state.held_out.get(best, -math.inf):
            best = 0
        return Outcome(tuple(state.losses), dict(state.held_out), best, state.step)

    def _step(self) -> None:
        state, schedule = self.state, self.schedule
        torch.manual_seed(((self.seed * 2**20 + state.step) * self.team.size + self.team.rank) % 2**63)
        if (share := schedule.sparsity(state.step)) is not None:
            self._move(share)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * schedule.rate(state.step)
        with together():
            total = schedule.gradient(self._pass, self._parameters())
            (loss,) = fetch([self.team.reduce(total) / self.team.size])  # the one look at the device in a step
        if state.step == 0 and self.unused:
            check_reached(self.chosen)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        share_statistics(self.network, self.team)
        self._forget()
        self.model.zero_grad()
        state.step += 1
        state.losses.append(loss.item())
        if self.on_step is not None and self.team.main:
            self.on_step(state.step, schedule.steps, state.losses[-1])
        if state.step % self.every == 0 or state.step >= schedule.steps:
            self._look()
            self._save()

    def _pass(self) -> Tensor:
        """Add the gradients of this step's samples, as far as they are this process's; their loss."""
        self._forget()  # the weights may be others than in the last pass
        self.model.train()
        for module in self.still:
            module.training = False
        numbers = [self._number(self.state.step * self.batch + i) for i in range(self.batch)]
        if len(self.samples.groups) > 1:
            numbers.sort(key=self.samples.group_of)
        chunks = [numbers[i : i + self.micro] for i in range(0, self.batch, self.micro)]
        pieces = [piece for chunk in self.team.share(chunks) for piece in self.samples.pick(chunk)]
        total = torch.zeros((), device=self.device)
        for left, piece in zip(reversed(range(len(pieces))), pieces, strict=True):
            # Deferred where it is sharded, every process would hold whole gradients meanwhile.
            together = left == 0 or self.sharded
            with contextlib.nullcontext() if together else self.accelerator.no_sync(self.model):
                batch = on(piece if self.augment is None else self.augment(piece, self.state.step), self.device)
                loss = self.loss(self.model(batch), batch)
                demand(torch.isfinite(loss), partial(self._diverged, loss.detach()))
                part = loss / (self.batch / (size_of(piece) * self.team.size))
                part.backward()  # type: ignore[no-untyped-call]
                total += part.detach()
        return total

    def _diverged(self, loss: Tensor) -> Diverged:
        best = self.state.best.get("final", 0) if self.held_out is not None else 0
        return Diverged(self.state.step + 1, loss.item(), checkpoints.at(self.folder, best) if best else None)

    def _number(self, place: int) -> int:
        """The sample that is taken at a place of all passes, one behind the other."""
        number, place = divmod(place, len(self.samples))
        if self.order is None:
            return place
        if self._drawn[0] != number:
            self._drawn = number, self.order(number)
        return self._drawn[1][place]

    def evaluate(self) -> float:
        """The loss of the held-out samples, the mean over them."""
        assert self.held_out is not None
        self._forget()
        self.network.eval()
        size, count = self.team.size, len(self.held_out)
        chunks = [range(i, min(i + self.micro, count)) for i in range(0, count, self.micro)]
        losses = torch.zeros(count, device=self.device)
        for number in range(self.team.rank, -(-len(chunks) // size) * size, size):  # as many in each process
            chunk = chunks[number % len(chunks)]
            start = chunk.start
            for piece in self.held_out.pick(chunk):
                batch = on(piece, self.device)
                with torch.no_grad():
                    loss = self.score(self.called(batch), batch)
                if number < len(chunks):
                    losses[start : start + size_of(piece)] = loss
                start += size_of(piece)
        self._forget()
        return float(self.team.reduce(losses).cpu().numpy().mean())

    def _look(self) -> None:
        """What is held out now, and whether this is the best so far."""
        state, name = self.state, self.schedule.final(self.state.step)
        if self.held_out is not None:
            state.held_out[state.step] = self.evaluate()
        if name is None:
            return
        best = state.best.get(name)
        better = self.held_out is None or best is None or state.held_out[state.step] < state.held_out[best]
        if better:
            state.best[name] = state.step
        state.waited = 0 if better else state.waited + 1

    def _forget(self) -> None:
        """What trains has changed."""
        for change in self.changes:
            change.forget()

    def _parameters(self) -> dict[str, nn.Parameter]:
        if self._rate is not None:
            return dict(self.network.named_parameters())
        return {
            f"{item.part.name}.{key}": parameter
            for item in self.chosen
            for key, parameter in item.change.named_parameters()
        }

    # --- masks that move

    def _move(self, share: float) -> None:
        """Choose masks, and hold them."""
        if self.update is None or self.sharded or not self.chosen:
            why = "a sharded model's stay" if self.sharded else "nothing here chooses them (`update`)"
            raise InputError(f"the schedule moves masks, but {why}: use the schedule `constant`.")
        with torch.no_grad():
            masks = self.team.broadcast(dict(self.update(share)) if self.team.main else {})
        before = self._masks()
        strange = sorted(set(masks) - {item.part.name for item in self.chosen})
        if strange:
            raise InputError(f"'{strange[0]}' gets another mask, but does not train: train `all`.")
        changed = self._hold(masks)

        def divergence() -> float:
            after = self.evaluate()
            self._hold(before)
            then = self.evaluate()
            self._hold(masks)
            return after - then

        if self.held_out is not None and not self.schedule.accept(divergence):
            self._hold(before)
            return
        for change, where in changed:
            for parameter in change.parameters():
                for moment in self.optimizer.state.get(parameter, {}).values():
                    if moment.shape == where.shape:
                        moment.masked_fill_(where.to(moment.device), 0)

    def _masks(self) -> dict[str, Tensor]:
        """What is held, of each part: all of it where nothing was."""
        held = {item.part.name: item.change.mask for item in self.chosen}
        whole = {item.part.name: item.part.value for item in self.chosen}
        return {
            name: torch.ones(whole[name].shape, dtype=torch.bool, device=self.device) if mask is None else mask
            for name, mask in held.items()
        }

    def _hold(self, masks: Mapping[str, Tensor]) -> list[tuple[Change, Tensor]]:
        return [
            (item.change, item.change.hold(masks[item.part.name].to(self.device)))
            for item in self.chosen
            if item.part.name in masks
        ]

    # --- checkpoints

    def _tensors(self) -> dict[str, Tensor]:
        """What trains, by name: to read and to write. Running means of norms are part of it."""
        values = trained(self.chosen)
        if self._rate is not None:
            values = {name: parameter.data for name, parameter in self.network.named_parameters()}
        return values | statistics_of(self.network)

    def _save(self) -> None:
        main = self.team.main
        values = gather(self._tensors(), keep=main)
        moments = self.optimizer.state_dict() if main or self.sharded else {}
        if main:
            self.state.schedule = self.schedule.state()
            masks = {} if self.update is None else self._masks()
            checkpoints.write(self.folder, self.state, values, moments, masks)
        self.team.barrier()  # it is there

    def _load(self, folder: Path) -> None:
        scatter(load_file(folder / checkpoints.WEIGHTS), self._tensors())
        self._hold(checkpoints.masks(folder, {item.part.name: item.part.value.shape for item in self.chosen}))
        self._forget()

    def _go_on(self) -> None:
        """Continue from the newest checkpoint that is whole, if there is one."""
        found = checkpoints.newest(self.folder)
        if found is None:
            return
        folder, self.state = found
        self._load(folder)
        moments = torch.load(folder / checkpoints.OPTIMIZER, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(moments)
        self.schedule.load(self.state.schedule)
