"""Retraining: the language-model loss on the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from ..compat import has_bfloat16_products
from ..errors import InputError, NumericalError
from ..model.network import Model
from ..progress import OnStep
from ..samples import Batch, Samples
from ..team import team
from .around import no_dropout
from .loop import Diverged, Outcome, Training
from .loss import next_token_loss
from .parts import Chosen
from .schedule import make_schedule
from .shard import is_sharded

Count = Annotated[int, Field(ge=1)]


class Teacher(Protocol):
    """The dense model's logits for some of the training windows."""

    def __call__(self, index_B: Tensor, ids_BL: Tensor) -> Tensor: ...


def retrain(
    model: Model,
    chosen: Sequence[Chosen],
    windows_NL: Tensor,
    held_out_NL: Tensor | None,
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
) -> Outcome:
    """Train the attached changes of a model whose weights are loaded, or sharded.

    What a sharded one makes in forward is made again, block by block, in backward, whatever `checkpointing` says: else
    each process would hold whole weights of all layers. The options are the keys of a recipe's `heal` section, which
    says what they mean.

    Args:
        windows_NL: what to train on, in this order; taken again from the start where more is asked for.
        held_out_NL: what to find the best checkpoint on.
        folder: for checkpoints.
        teacher: `distill` of the loss is the divergence from its predictions.
        resume: continue from the last of them, if there is one.
    Raises:
        NumericalError: the loss is not finite; the checkpoints stay.
    """
    network, processes = model.network, team(model.device).size
    micro = min(micro, -(-batch // processes))
    if batch % (micro * processes):
        raise InputError(
            f"a step of {batch} windows cannot be shared by {processes} processes, {micro} windows at a time each:"
            " choose a multiple (--set heal.batch=…, --set heal.micro=…)."
        )

    def run(module: nn.Module, batch: Batch) -> Tensor:
        logits_BLV: Tensor = module(input_ids=batch["input_ids"], use_cache=False).logits
        return logits_BLV

    def loss(logits_BLV: Any, batch: Batch) -> Tensor:
        ids_BL = batch["input_ids"]
        teacher_BLV = None if teacher is None else teacher(batch["index"], ids_BL)
        return next_token_loss(logits_BLV, ids_BL, teacher_BLV, share=distill, temperature=temperature)

    def score(logits_BLV: Any, batch: Batch) -> Tensor:  # held-out text is scored as text
        return next_token_loss(logits_BLV, batch["input_ids"])

    windows = {"input_ids": windows_NL, "index": torch.arange(len(windows_NL))}
    held_out = None if held_out_NL is None else Samples.of(held_out_NL)
    with no_dropout(network):
        training = Training(
            network,
            chosen,
            Samples.of(windows),
            loss,
            make_schedule("constant", steps, {"warmup": warmup}),
            folder,
            run=run,
            held_out=held_out,
            score=score,
            batch=batch,
            micro=micro,
            every=max(1, math.ceil(steps / evaluations) if held_out else steps // 4),
            clip=clip,
            betas=betas,
            patience=patience if held_out else None,
            seed=seed,
            bfloat16=model.dtype == torch.float32 and _fast_bfloat16(model.device),
            recompute=checkpointing or is_sharded(network),
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


def _fast_bfloat16(device: torch.device) -> bool:
    """Does bfloat16 pay on this processor?"""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return device.type == "cpu" and has_bfloat16_products()
