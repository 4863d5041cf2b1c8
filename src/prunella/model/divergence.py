"""How far what a network puts out is from what a teacher does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from ..trees import tensors


def kl(logits_TV: Tensor, teacher_TV: Tensor, temperature: float = 1.0) -> Tensor:
    """tau^2 KL(teacher^(1/tau) || model^(1/tau)) of logits, the mean over rows; the factor keeps gradients as large as
    they are at tau = 1.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
    """
    ours_TV, theirs_TV = ((logits.float() / temperature).log_softmax(1) for logits in (logits_TV, teacher_TV))
    return kl_div(ours_TV, theirs_TV, reduction="batchmean", log_target=True) * temperature**2


def each_relative_error(ours: Tensor, theirs: Tensor) -> Tensor:
    """||y - y'||^2 / ||y'||^2 of each sample, (B,), from two tensors (B, …) of what is put out."""
    error_B, size_B = (t.float().reshape(len(t), -1).square().sum(1) for t in (ours - theirs, theirs))
    return error_B / size_B.clamp_min(1e-12)


def relative_error(outputs: Any, teacher: Any) -> Tensor:
    """||Y - Y_teacher||^2 / ||Y_teacher||^2 of each sample in each tensor of a tree, the mean over both: of hidden
    states, or of maps. Raises ValueError for trees of other shapes, or without such a tensor."""
    pairs = list(zip(tensors(outputs), tensors(teacher), strict=True))
    found = []
    for ours, theirs in pairs:
        if ours.shape != theirs.shape:
            raise ValueError(f"outputs of shape {tuple(ours.shape)} beside a teacher's {tuple(theirs.shape)}")
        if ours.is_floating_point() and ours.ndim:
            found.append(each_relative_error(ours, theirs).mean())
    if not found:
        raise ValueError("no tensor of numbers among the outputs")
    return torch.stack(found).mean()
