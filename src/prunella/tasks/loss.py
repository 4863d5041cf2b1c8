"""The loss of a language model from its logits, beside a teacher's if there is one, in little memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..machine import at_a_time

ROWS = 16  # tokens at a time on a CPU: in float32 their logits stay in the cache


def _cooled(log_RV: Tensor, temperature: float) -> Tensor:
    """Logarithms of probabilities p as those of p^(1/tau)."""
    return log_RV if temperature == 1 else (log_RV / temperature).log_softmax(1)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TV: Tensor, labels_T: Tensor, teacher_TV: Tensor | None, share: float, temperature: float
    ) -> Tensor:
        grad_TV = torch.empty_like(logits_TV) if ctx.needs_input_grad[0] else None
        keep_T = labels_T >= 0
        count = keep_T.sum().clamp_min(1)
        weight = 1.0 if teacher_TV is None else 1 - share
        total = torch.zeros((), dtype=torch.float32, device=logits_TV.device)
        rows = at_a_time(ROWS, logits_TV.device)
        for start in range(0, len(labels_T), rows):
            here = slice(start, start + rows)
            keep_R1 = keep_T[here, None]
            label_R1 = labels_T[here, None].clamp_min(0)
            log_RV = logits_TV[here].float().log_softmax(1)
            total -= weight * (log_RV.gather(1, label_R1) * keep_R1).sum()
            if grad_TV is not None:
                grad_RV = log_RV.exp().mul_(weight)
                grad_RV.scatter_add_(1, label_R1, torch.full_like(label_R1, -weight, dtype=torch.float32))
            if teacher_TV is not None:
                wanted_RV = _cooled(teacher_TV[here].float().log_softmax(1), temperature)
                p_RV = wanted_RV.exp()
                log_RV = _cooled(log_RV, temperature)
                total += share * temperature**2 * ((p_RV * wanted_RV.sub_(log_RV)).sum(1, keepdim=True) * keep_R1).sum()
                if grad_TV is not None:
                    grad_RV.add_(log_RV.exp_().sub_(p_RV), alpha=share * temperature)
            if grad_TV is not None:
                grad_TV[here] = grad_RV.mul_(keep_R1 / count)
        ctx.save_for_backward(grad_TV)
        return total / count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad_TV,) = ctx.saved_tensors
        return grad_TV.mul_(grads[0].to(grad_TV.dtype)), None, None, None, None


def next_token_loss(
    logits_BLV: Tensor,
    ids_BL: Tensor,
    teacher_BLV: Tensor | None = None,
    *,
    share: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """(1 - share) * cross entropy + share * tau^2 KL(teacher^(1/tau) || model^(1/tau)), mean over predicted tokens.

    Without a teacher: the cross entropy. In float32, a few tokens at a time; beside the logits there is only
    their gradient, in their own dtype.
    """
    labels_BL = torch.full_like(ids_BL, -1)
    labels_BL[:, :-1] = ids_BL[:, 1:]
    teacher_TV = None if teacher_BLV is None else teacher_BLV.flatten(0, 1)
    loss: Tensor = _Loss.apply(  # type: ignore[no-untyped-call]
        logits_BLV.flatten(0, 1), labels_BL.flatten(), teacher_TV, share, temperature
    )
    return loss
