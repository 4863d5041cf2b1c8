"""Scores that are made of more than losses: what a network answered, beside what the dense one did."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import prunella
from prunella import Model, Task, register_task
from prunella.errors import StepError
from prunella.evaluate.measure import measure
from prunella.evaluate.perplexity import answered
from prunella.progress import no_track
from prunella.samples import Batch, Samples
from prunella.tasks.scores import class_answers, class_scores, mean_score


@register_task("clusters")
class Clusters(Task):
    """Which of seven points is nearest?"""

    argument = "x"
    figure = "accuracy"
    higher = True
    unit = "%"

    def __init__(self, *, labelled: bool = True) -> None:
        self.labelled = labelled

    def samples(
        self, model: Model, source: str, count: int, *, used: int = 0, seed: int = 0, test: bool = False
    ) -> Samples:
        random = torch.Generator().manual_seed(seed)
        x, y = torch.randn(used + count, 8, generator=random), torch.randint(7, (used + count,), generator=random)
        return Samples.of({"x": x[used:]} | ({"labels": y[used:]} if self.labelled else {}))

    def example(self, network: nn.Module) -> Batch:
        return {"x": torch.zeros(1, 8)}

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
        return network(batch["x"])

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        labels = batch["labels"] if self.labelled else outputs.argmax(1)
        return functional.cross_entropy(outputs, labels, reduction="none")

    def answers(self, outputs: Tensor, batch: Batch) -> Any:
        return class_answers(outputs, batch.get("labels"), top=5)

    def scores(self, model: Model, samples: Samples, losses: Any, answers: Any = None, dense: Any = None) -> Any:
        if not losses:
            return {"accuracy": None}
        return class_scores("accuracy", losses, answers or {}, dense or {}, top=5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 7))


def test_the_error_of_a_mean_is_the_standard_one() -> None:
    found = mean_score("accuracy", [1, 1, 0, 1])
    assert found["accuracy"] == 0.75
    assert found["error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert found["each"] == [1, 1, 0, 1]
    assert "error" not in mean_score("cosine", [0.5])


def test_classes_are_counted_as_by_hand() -> None:
    logits = torch.tensor([[3.0, 2, 1], [0, 5, 4], [1, 1, 0], [0, 1, 2]])
    labels = torch.tensor([0, 2, 0, 1])
    answers = class_answers(logits, labels, top=2)
    assert answers["class"].tolist() == [0, 1, 0, 2]
    other = class_answers(logits.flip(0), labels, top=2)  # 2, 0, 1, 0
    found = class_scores("top-1", [1.0] * 4, answers, other, top=2)
    assert (found["top-1"], found["top-2"]) == (0.5, 1.0)
    assert (found["agreement"], found["changed"]) == (0.0, 4)
    assert (found["lost"], found["gained"]) == (0, 2)  # the other one is right about none: 2, 0, 1, 0 for 0, 2, 0, 1
    blind = class_scores("top-1", [1.0] * 4, class_answers(logits), class_answers(logits.roll(2, 0)))
    assert (blind["figure"], blind["agreement"]) == ("agreement", 0.5)


@pytest.mark.parametrize("labelled", [True, False])
def test_what_the_pruned_network_answers_is_set_beside_what_the_dense_one_did(labelled: bool) -> None:
    one = network()
    dense = [one[0](torch.zeros(1, 8)), one]  # the network as it was answers here
    task: Any = Clusters(labelled=labelled)
    samples = task.samples(None, "", 64, used=32, seed=0)
    with torch.no_grad():
        before = one(samples.groups[0]["x"]).argmax(1)
    report = prunella.prune(
        one,
        {
            "task": {"clusters": {"labelled": labelled}},
            "steps": ["magnitude"],
            "sparsity": 0.8,
            "evaluate": {"windows": 64},
        },
    )
    with torch.no_grad():
        after = one(samples.groups[0]["x"]).argmax(1)
    assert dense
    same = (before == after).double().mean().item()
    assert 0 < same < 1
    assert report.pruned["agreement"] == same
    assert report.pruned["figure"] == report.dense["figure"] == ("accuracy" if labelled else "agreement")
    if labelled:
        right = (after == samples.groups[0]["labels"]).double().mean().item()
        assert report.pruned["accuracy"] == right
        assert "agreement" not in report.dense
        assert report.pruned["changed"] == int((before != after).sum())
    else:
        assert report.dense["agreement"] == 1
    assert (report.pruned["higher"], report.pruned["unit"]) == (True, "%")


def test_answers_come_in_the_order_of_the_samples_and_of_all_groups() -> None:
    task = Clusters()
    model = task.wrap(network())
    x = torch.randn(70, 8)
    labels = torch.randint(7, (70,))
    samples = Samples.of([{"x": x[:33], "labels": labels[:33]}, {"x": x[33:], "labels": labels[33:]}])
    losses, answers = answered(model, samples)
    with torch.no_grad():
        logits = model.network(x)
    assert torch.equal(answers["class"], logits.argmax(1))
    assert losses == pytest.approx(functional.cross_entropy(logits, labels, reduction="none").tolist())
    found, told = measure(model, "here", samples, None, no_track)
    assert found["accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    assert torch.equal(told["right"], logits.argmax(1) == labels)


def test_answers_that_are_no_row_a_sample_are_refused() -> None:
    task = Clusters()
    model = task.wrap(network())
    task.answers = lambda outputs, batch: {"sum": outputs.sum()[None]}  # type: ignore[method-assign]
    with pytest.raises(StepError, match=r"answers 'sum' of shape \(1,\) for 4 samples"):
        answered(model, Samples.of({"x": torch.randn(4, 8), "labels": torch.zeros(4, dtype=torch.long)}))
    task.answers = lambda outputs, batch: {"x": batch["x"]}  # type: ignore[method-assign]
    assert (
        answered(model, Samples.of({"x": torch.randn(4, 8), "labels": torch.zeros(4, dtype=torch.long)}))[1]["x"].ndim
        == 2
    )


def test_a_task_that_needs_no_answers_has_the_scores_it_always_had(tmp_path: Path) -> None:
    import nets

    model = nets.wrapped(nets.build("resnet"), nets.samples_of("resnet"))
    found, told = measure(model, "", nets.samples_of("resnet"), None, no_track)
    assert not told
    assert found["figure"] == "loss"
    assert set(found) == {"source", "figure", "samples", "loss", "losses", "sample"}
