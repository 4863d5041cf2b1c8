"""What several tasks say of how good a network is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.task import NO_ANSWERS, Answers


def mean_score(name: str, each: Sequence[float] | Tensor) -> dict[str, Any]:
    """A figure that is a mean over samples: under its name, with `error`, its standard error, and `each` sample's own.

    error = s / sqrt(n), with s² = Σ (x - mean)² / (n - 1); of right and wrong answers, sqrt(p (1 - p) / (n - 1)).
    """
    values = [float(value) for value in each]
    count = len(values)
    mean = sum(values) / count
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1)) if count > 1 else None
    return {
        name: mean,
        **({} if spread is None else {"error": spread / math.sqrt(count)}),
        "each": [int(value) if value.is_integer() else value for value in values],
    }


def class_answers(logits_BC: Tensor, labels_B: Tensor | None = None, top: int = 0) -> Answers:
    """What `class_scores` counts: `class`, the one with the highest logit (of equal ones the first); with labels, is it
    `right`, and is the label `among` the `top` highest, if any are asked for."""
    found: dict[str, Tensor] = {"class": logits_BC.argmax(1)}
    if labels_B is not None:
        found["right"] = found["class"] == labels_B
        if top and logits_BC.shape[1] > top:
            found["among"] = (logits_BC.topk(top, 1).indices == labels_B[:, None]).any(1)
    return found


def class_scores(
    figure: str, losses: Sequence[float], answers: Answers, dense: Answers = NO_ANSWERS, top: int = 0
) -> dict[str, Any]:
    """Of a classifier: the share of right answers under the name `figure` and, of `top` classes, `top-5` say; without
    labels `agreement`, the share of samples that get the class that the dense network gives them. With both, how many
    answers `changed`, and how many of these from right to wrong (`lost`) and from wrong to right (`gained`)."""
    other = dense or answers
    same = answers["class"] == other["class"]
    shown = {f"top-{top}": "%", "agreement": "%", "changed": "", "lost": "", "gained": "", "loss": ""}
    found: dict[str, Any] = {"samples": len(losses), "loss": sum(losses) / len(losses)}
    if "right" not in answers:
        return {"figure": "agreement", "higher": True, "unit": "%", **found, **mean_score("agreement", same.double())}
    found |= {
        "more": shown,
        "figure": figure,
        "higher": True,
        "unit": "%",
        **mean_score(figure, answers["right"].double()),
    }
    if "among" in answers:
        found[f"top-{top}"] = answers["among"].double().mean().item()
    if dense:
        before, now = dense["right"].to(torch.bool), answers["right"].to(torch.bool)
        found["agreement"] = same.double().mean().item()
        found["changed"] = int((~same).sum())
        found |= {"lost": int((before & ~now).sum()), "gained": int((~before & now).sum())}
    return found
