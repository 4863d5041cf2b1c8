"""Retraining: the task's loss on the whole network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from ..compat import has_bfloat16_products
from ..errors import InputError, NumericalError
from ..model.network import Model
from ..progress import OnStep
from ..samples import Batch, Samples, size_of
from ..team import team
from .around import asleep, keeps_statistics, no_dropout
from .checkpoints import Diverged
from .loop import Outcome, Training
from .parts import Chosen, Master
from .schedule import make_schedule
from .shard import is_sharded

Count = Annotated[int, Field(ge=1)]


NUMBER = "number of a sample"  # in a batch, beside what the network is called with: no argument has such a name


class Teacher(Protocol):
    """What the dense network puts out for some of the training samples."""

    def __call__(self, numbers_B: Tensor, batch: Batch) -> Any: ...


def retrain(
    model: Model,
    chosen: Sequence[Chosen],
    samples: Samples,
    held_out: Samples | None,
    steps: int,
    folder: Path,
    seed: int = 0,
    teacher: Teacher | None = None,
    resume: bool = False,
    on_step: OnStep | None = None,
    *,
    batch: Count = 8,
    micro: Count = 4,
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1,
    clip: Annotated[float, Field(gt=0)] = 1.0,
    betas: tuple[float, float] = (0.9, 0.99),
    distill: Annotated[float, Field(ge=0, le=1)] = 0.0,
    temperature: Annotated[float, Field(gt=0)] = 1.0,
    evaluations: Count = 5,
    patience: Count = 3,
    checkpointing: bool = False,
    batch_norm: Literal["auto", "follow", "fixed"] = "auto",
    augment: bool = False,
) -> Outcome:
    """Train the attached changes of a model whose weights are loaded, or sharded.

    What a sharded one makes in forward is made again, block by block, in backward, whatever `checkpointing` says: else
    each process would hold whole weights of all layers. The options are the keys of a recipe's `heal` section, which
    says what they mean.

    A language model trains in training mode, without dropout. Any other network computes as it does when it is
    measured, but for norms whose running statistics follow.

    Args:
        samples: what to train on; taken again where more is asked for. Those of a language model in this order; others
            in a new order each time, which the seed draws.
        held_out: what to find the best checkpoint on.
        folder: for checkpoints.
        teacher: `distill` of the loss is the divergence from what it puts out. It knows held-out samples, which
            a task without a loss scores by it, by the numbers that follow those of `samples`.
        resume: continue from the last of them, if there is one.
    Raises:
        InputError: a step cannot be shared by the processes.
        NumericalError: the loss is not finite; the checkpoints stay.
    """
    network, task, processes = model.network, model.task, team(model.device).size
    micro = min(micro, -(-batch // processes))
    if batch % (micro * processes):
        raise InputError(
            f"a step of {batch} windows cannot be shared by {processes} processes, {micro} windows at a time each:"
            " choose a multiple (--set heal.batch=…, --set heal.micro=…)."
        )
    follow, recompute = follows(network, chosen, batch_norm), checkpointing or is_sharded(network)

    def bare(batch: Batch) -> Batch:
        return {key: value for key, value in batch.items() if key != NUMBER}

    def loss(outputs: Any, batch: Batch) -> Tensor:
        own = bare(batch)
        theirs = None if teacher is None else teacher(batch[NUMBER], own)
        return task.objective(outputs, own, theirs, share=distill, temperature=temperature)

    def score(outputs: Any, batch: Batch) -> Tensor:  # held-out samples are scored by the task
        return loss(outputs, batch) if task.blind else task.objective(outputs, bare(batch))

    def drawn(number: int) -> Sequence[int]:
        return samples.shuffled(seed * 2**20 + number, micro)

    def changed(piece: Batch, step: int) -> Batch:
        generator = torch.Generator().manual_seed((seed * 2**40 + step * 2**20 + int(piece[NUMBER][0])) % 2**63)
        return {**task.augment(bare(piece), generator), NUMBER: piece[NUMBER]}

    with no_dropout(network):
        training = Training(
            network,
            chosen,
            numbered(samples),
            loss,
            make_schedule("constant", steps, {"warmup": warmup}),
            folder,
            run=lambda network, batch: task.run(network, bare(batch)),
            order=None if task.language else drawn,
            augment=changed if augment else None,
            still=() if task.language else asleep(network, follow=follow, recompute=recompute),
            unused=not task.language,
            held_out=None if held_out is None else numbered(held_out, len(samples)),
            score=score,
            batch=batch,
            micro=micro,
            every=max(1, math.ceil(steps / evaluations) if held_out else steps // 4),
            clip=clip,
            betas=betas,
            patience=patience if held_out else None,
            seed=seed,
            bfloat16=model.dtype == torch.float32 and _fast_bfloat16(model.device),
            recompute=recompute,
            resume=resume,
            on_step=on_step,
        )
        try:
            with training:
                training.advance()
                return training.finish()
        except Diverged as error:
            kept = f" The best checkpoint is kept in '{error.best}'." if error.best else ""
            raise NumericalError(
                f"healing diverged: {str(error).rstrip('.')}. Use a lower learning rate (--set heal.rate=…), and delete"
                f" '{folder.parent}' before.{kept}"
            ) from None


def numbered(samples: Samples, start: int = 0) -> Samples:
    """Samples with their numbers beside them, from `start`."""
    groups = []
    for group in samples.groups:
        groups.append({**group, NUMBER: torch.arange(start, start + size_of(group))})
        start += size_of(group)
    return Samples(tuple(groups))


def follows(network: nn.Module, chosen: Sequence[Chosen], batch_norm: str) -> bool:
    """Do running statistics of norms follow? By themselves where whole layers train, which moves what norms see; where
    less trains, the statistics of a few samples at a time are worse than those that are there."""
    whole = any(isinstance(item.change, Master) and "linear" in item.part.kinds for item in chosen)
    asked = batch_norm == "follow" or (batch_norm == "auto" and whole)
    return asked and any(map(keeps_statistics, network.modules()))


def _fast_bfloat16(device: torch.device) -> bool:
    """Does bfloat16 pay on this processor?"""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return device.type == "cpu" and has_bfloat16_products()
