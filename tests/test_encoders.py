"""Encoders and classifiers of every usual kind: cut into blocks, replayed exactly, pruned by every step, and loaded by
transformers from what is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import encoders
import pytest
import torch
import transformers as t

import prunella
from prunella import Model
from prunella.registry import steps
from prunella.samples import Samples
from prunella.stream import Stream
from prunella.tasks import make_task

KINDS = tuple(encoders.CONFIGS)
STEPS = sorted(name for name, step in steps.items() if step.function.__module__.startswith("prunella.steps"))


def token_samples(lengths: tuple[int, ...] = (12, 7), count: int = 6) -> Samples:
    random = torch.Generator().manual_seed(1)
    return Samples.of(
        [
            {
                "input_ids": torch.randint(5, encoders.VOCABULARY, (count, length), generator=random),
                "labels": torch.randint(2, (count,), generator=random),
            }
            for length in lengths
        ]
    )


def opened(kind: str) -> Model:
    return make_task("classify").wrap(encoders.build(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_replayed_exactly_and_all_weights_are_accounted_for(kind: str) -> None:
    model = opened(kind)
    assert model.undivided == (kind == "albert")  # whose layers are one, called again and again
    if kind != "albert":
        assert len(model.blocks) >= 3
    samples = token_samples()
    stream = Stream(model, samples)
    for _, block in model.walk():
        stream.advance(block)
    for number, batch in enumerate(stream.batches):
        with torch.no_grad():
            whole = model.task.run(model.network, batch).logits
        assert torch.equal(stream.outputs(number).logits, whole)
    report = prunella.prune(model, {"task": "classify", "steps": ["wanda"]}, calibration=samples)
    matrices = {id(p): p for name in model.blocks for p in model.module(name).parameters() if p.ndim > 1}.values()
    assert report.weights == sum(p.numel() for p in matrices)
    zeros = sum(int((p == 0).sum()) for p in matrices)
    assert report.sparsity == pytest.approx(zeros / report.weights, abs=1e-9)
    for layer in report.layers:
        assert layer.sparsity == pytest.approx(0.5, abs=0.5 / layer.shape[1] + 1e-9), layer.name


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ("bert", "llama") else pytest.mark.slow) for kind in KINDS]
)
def test_every_step_prunes_to_two_of_four(kind: str, step: str) -> None:
    used: list[Any] = [step] if steps[step].prunes else ["wanda", step]
    pattern = "unstructured" if step == "besa" else "2:4"  # it gives each row a share of its own
    model = opened(kind)
    report = prunella.prune(
        model, {"task": "classify", "steps": used, "pattern": pattern}, calibration=token_samples(count=3)
    )
    assert report.layers
    if pattern != "2:4":
        gone = sum(layer.sparsity * layer.size for layer in report.layers) / sum(layer.size for layer in report.layers)
        assert gone == pytest.approx(0.5, abs=0.01)
        return
    for layer in report.layers:
        weight = model.network.get_parameter(f"{layer.name}.weight")
        kept = (weight != 0).view(len(weight), -1, 4).sum(2)
        assert int(kept.max()) <= 2, layer.name
        assert layer.sparsity >= 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_loads_where_the_original_loaded(kind: str, tmp_path: Path) -> None:
    source = encoders.write(tmp_path / "dense", encoders.build(kind, num_labels=3))
    report = prunella.prune(
        str(source),
        {
            "steps": ["sparsegpt"],
            "calibration": {"samples": 6, "length": 24},
            "evaluate": {"windows": 6, "length": 24},
        },
        output=tmp_path / "out",
    )
    assert "classify" in report.recipe["task"]
    assert report.dense["agreement"] == 1
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "out")
    dense, pruned = (t.AutoModelForSequenceClassification.from_pretrained(tmp_path / name) for name in ("dense", "out"))
    model = make_task("classify").open(str(tmp_path / "out"))
    ids_BL = tokenizer(["what is true of a statement"], return_tensors="pt").input_ids
    with torch.no_grad(), model.whole() as network:
        found, before = pruned(ids_BL).logits, dense(ids_BL).logits
        assert torch.allclose(model.task.run(network, {"input_ids": ids_BL}).logits, found, atol=1e-5)
    assert not torch.allclose(found, before)
    state = pruned.state_dict()
    for layer in report.layers:
        weight = state.get(f"{layer.name}.weight")
        assert weight is not None, layer.name
        assert float((weight == 0).float().mean()) == pytest.approx(layer.sparsity)


def test_samples_of_one_shape_are_batched_as_each_alone() -> None:
    """Nothing is padded, so that a text's answer does not depend on its neighbours."""
    model = opened("llama")
    samples = token_samples()
    for group in samples.groups:
        with torch.no_grad():
            together = model.run(group).logits
            alone = torch.cat([model.run({"input_ids": ids_L[None]}).logits for ids_L in group["input_ids"]])
        assert torch.allclose(together, alone, atol=1e-6)
    assert model.network.config.pad_token_id is None


def test_a_network_that_several_processes_train_is_run_like_itself() -> None:
    """What lies around it knows neither its config nor its arguments."""
    model = opened("llama")
    around = torch.nn.parallel.DistributedDataParallel.__new__(torch.nn.parallel.DistributedDataParallel)
    torch.nn.Module.__init__(around)
    around.module = model.network
    around.forward = lambda *args, **kwargs: model.network(*args, **kwargs)
    batch = token_samples().groups[0]
    with torch.no_grad():
        found = model.task.run(around, batch)
        assert torch.equal(found.logits, model.task.run(model.network, batch).logits)
    assert found.past_key_values is None
