"""Fine-tuning to what the dense network puts out: no labels are needed."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..samples import Batch
from ..tasks.module import Module
from .around import asleep
from .loop import Training
from .schedule import make_schedule

Fit = Callable[[nn.Module], Iterator[None]]  # trains a network; at each pause it may be the best one


def distil(
    dense: nn.Module,
    batches: Any,
    *,
    epochs: int = 5,
    batch: int = 16,
    micro: int | None = None,
    rate: float = 1e-4,
    looks: int | None = None,
    batch_norm: Literal["fixed", "follow"] = "fixed",
    warmup: float = 0.1,
    seed: int = 0,
    bfloat16: bool = False,
) -> Fit:
    """What fine-tunes a network to the outputs of the dense one, all parameters of it, with AdamW: `fit(network)`. The
    loss is |y - y'|^2 / |y'|^2, the mean over samples and over the tensors that are put out, y' being the dense
    network's: the raw maps of a detector, say, so that neither labels nor anchors are needed. Nothing is dropped.

    Args:
        dense: the network as it is now; a copy is made.
        batches: what it is called with, as `calibration` of `prunella.prune`.
        epochs: how often all of it is taken.
        batch: samples in a step.
        micro: samples that run at a time; None: all of a step.
        rate: learning rate.
        warmup: share of all steps over which it rises; then it falls linearly to 0.
        looks: pauses, at which the network may be scored: one an epoch if nothing is said.
        batch_norm: its statistics stay as they are (`fixed`), and it normalizes by them in training as it does after;
            or they `follow` what it sees, and it normalizes by that of each batch. Of few samples the former is better.
        seed: of the order of the samples, a new one in each epoch.
        bfloat16: products in bfloat16, of float32 weights: faster where the processor has them.

    Raises:
        InputError: no batches, or none that the network takes.
    """
    task = Module()
    task.hold(dense, batches)
    samples, teacher = task.held[False], copy.deepcopy(dense).eval().requires_grad_(False)
    if min(epochs, batch) < 1 or not 0 < rate < 1:
        raise InputError("to distil takes at least an epoch, a sample a step, and a rate between 0 and 1.")
    steps = epochs * max(1, len(samples) // batch)
    size = min(batch, len(samples))

    def loss(outputs: Any, one: Batch) -> Tensor:
        kind = next(iter(one.values())).device.type
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=bfloat16):
            wanted = task.run(teacher, one)
        return task.divergence(outputs, wanted, one)

    def fit(network: nn.Module) -> Iterator[None]:
        modes = {module: module.training for module in network.modules()}
        each = math.ceil(steps / (looks or epochs))
        with (
            tempfile.TemporaryDirectory() as folder,
            Training(
                network,
                rate,
                samples,
                loss,
                make_schedule("constant", steps, {"warmup": warmup}),
                folder,
                run=lambda module, one: task.run(module, one),
                order=lambda number: samples.shuffled(seed * 2**20 + number, size),
                still=asleep(network, follow=batch_norm == "follow", recompute=False),
                unused=True,
                batch=size,
                micro=micro or size,
                every=steps,
                seed=seed,
                bfloat16=bfloat16,
            ) as training,
        ):
            going = True
            while going:
                going = training.advance(each)
                yield
        for module, training_mode in modes.items():
            module.training = training_mode

    return fit
