"""Healing of networks that are no language models: convolutional ones with batch norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import convnets
import pytest
import torch
from processes import together
from safetensors.torch import load_file, save_file
from torch import Tensor

import prunella
from prunella import InputError, Report
from prunella.heal.masks import full
from prunella.layers import find_layers
from prunella.moving import updates
from prunella.tasks import make_task
from prunella.tensors import MASKS
from prunella.train.callback import hold
from prunella.train.loop import Training
from prunella.train.parts import attach, choose, detach, make_group, parts_of
from prunella.train.schedule import make_schedule

BASE: dict[str, Any] = {
    "task": "textures",
    "calibration": {"samples": 16},
    "evaluate": {"windows": 32},
    "sparsity": 0.8,
    "steps": ["magnitude"],
}


def recipe(**heal: Any) -> dict[str, Any]:
    return {**BASE, "heal": {"train": ["all"], "epochs": 3, "batch": 16, "micro": 8, "evaluations": 2, **heal}}


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def changed(one: Path, other: Path) -> set[str]:
    before, after = tensors_of(one), tensors_of(other)
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def same_zeros(one: Path, other: Path) -> bool:
    """Of every layer with a mask, in the tensors and in the masks."""
    masks = prunella.read_masks(one)
    assert masks
    return (one / MASKS).read_bytes() == (other / MASKS).read_bytes() and all(
        torch.equal(tensors_of(one)[f"{name}.weight"] == 0, tensors_of(other)[f"{name}.weight"] == 0)
        for name in masks
        if f"{name}.weight" in tensors_of(one)
    )


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convnets.write(tmp_path_factory.mktemp("any") / "dense", convnets.trained())


@pytest.fixture(scope="module")
def pruned(dense: Path) -> Path:
    path = dense.with_name("pruned")
    prunella.prune(str(dense), BASE, output=path)
    return path


KINDS = {
    "all": {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"},
    "norms": {"norm"},
    "biases": {"bias"},
    "head": {"head"},
    "mask-lora": {"weight"},
    "scale-lora": {"weight"},
    "lora-prune": {"weight"},
}


@pytest.mark.parametrize("method", KINDS)
def test_each_method_trains_what_it_says_with_the_mask_held(method: str, pruned: Path, tmp_path: Path) -> None:
    """Convolutions through their lens, grouped ones too; statistics of norms move where whole layers train."""
    report = prunella.heal(pruned, recipe(train=[method], rate=3e-3, held_out=0), output=tmp_path / "out")
    moved = changed(pruned, tmp_path / "out")
    kind = {
        "norms": lambda name: ".norm" in name and name.endswith(("weight", "bias")),
        "biases": lambda name: name.endswith("bias"),
        "head": lambda name: name == "head.weight",
        "all": lambda name: True,
    }.get(method, lambda name: name.removesuffix(".weight") in layers)
    grouped = {name.rpartition(".")[0] for name in prunella.read_masks(pruned) if name[-1].isdigit()}
    layers = {*prunella.read_masks(pruned), *(name.removesuffix(".weight") for name in grouped)}
    assert moved
    assert all(kind(name) for name in moved), moved
    if method == "all":
        assert {name for name in tensors_of(pruned) if not name.endswith("tracked")} <= moved
    elif method not in ("head",):
        assert moved == {name for name in tensors_of(pruned) if kind(name) and "running" not in name}
    assert same_zeros(pruned, tmp_path / "out")
    assert report.healing["samples"] == report.healing["steps"] * 16
    assert "tokens" not in report.healing
    prunella.open_model(str(tmp_path / "out"), "textures")


def test_it_becomes_better_by_its_labels_and_by_the_dense_network_alone(pruned: Path, tmp_path: Path) -> None:
    for name, heal in {"labels": {}, "distilled": {"distill": 1.0, "temperature": 2.0, "text": ["bare"]}}.items():
        report = prunella.heal(pruned, recipe(epochs=6, rate=3e-3, **heal), output=tmp_path / name)
        assert report.healing["after"]["loss"] < 0.9 * report.healing["before"]["loss"]
    assert report.healing["after"]["source"] == "drawn"


def test_a_streamed_teacher_teaches_as_one_in_memory(pruned: Path, tmp_path: Path) -> None:
    for teacher in ("memory", "stream"):
        prunella.heal(pruned, recipe(distill=0.5, teacher=teacher), output=tmp_path / teacher)
    one, two = tensors_of(tmp_path / "memory"), tensors_of(tmp_path / "stream")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    with pytest.raises(InputError, match="knows no augmented samples"):
        prunella.heal(pruned, recipe(distill=0.5, teacher="stream", augment=True), output=tmp_path / "no")


@pytest.mark.parametrize("batch_norm", ["fixed", "follow"])
def test_statistics_of_norms_stay_or_follow_and_are_saved(batch_norm: str, pruned: Path, tmp_path: Path) -> None:
    prunella.heal(pruned, recipe(train=["mask-lora"], batch_norm=batch_norm, held_out=0), output=tmp_path / "out")
    moved = {name for name in changed(pruned, tmp_path / "out") if "running" in name}
    every = {name for name in tensors_of(pruned) if "running" in name}
    assert moved == (every if batch_norm == "follow" else set())


def test_what_training_only_makes_worse_stays_as_it_was_statistics_too(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = convnets.Textures.objective

    def climb(self: Any, outputs: Tensor, *args: Any, **options: Any) -> Tensor:
        loss = real(self, outputs, *args, **options)
        return -loss if outputs.requires_grad else loss

    monkeypatch.setattr(convnets.Textures, "objective", climb)
    report = prunella.heal(pruned, recipe(rate=0.05), output=tmp_path / "out")
    assert report.healing["best_step"] == 0
    assert not changed(pruned, tmp_path / "out")


@pytest.mark.parametrize("heal", [{"augment": True}, {"text": ["sizes"], "distill": 0.5, "held_out": 6}], ids=str)
def test_a_run_that_was_killed_and_resumed_ends_like_one_that_was_not(
    heal: dict[str, Any], pruned: Path, tmp_path: Path
) -> None:
    """Samples of several shapes, what is drawn at random, statistics of norms."""
    wanted = recipe(evaluations=5, rate=3e-3, **heal)

    def stop(step: int, steps: int, loss: float | None) -> None:
        if step == 6:
            raise KeyboardInterrupt

    prunella.heal(pruned, wanted, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prunella.heal(pruned, wanted, output=tmp_path / "cut", watch=stop)
    assert (tmp_path / "cut.partial" / "training").is_dir()
    prunella.heal(pruned, wanted, output=tmp_path / "cut", resume=True)
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_two_processes_share_each_step(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of samples of several shapes; the statistics of norms are the mean of what both have seen."""
    wanted = recipe(text=["sizes"], rate=3e-3, held_out=6, distill=0.3)
    one = prunella.heal(pruned, wanted, output=tmp_path / "one")
    log = tmp_path / "log"
    assert together(log, convnets.heal, pruned, wanted, tmp_path / "two") == 0, log.read_text()
    two = Report.read(tmp_path / "two")
    assert two.healing["losses"] == pytest.approx(one.healing["losses"], rel=1e-3)
    assert two.healing["processes"] == 2
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert together(log, convnets.heal, pruned, wanted, tmp_path / "sharded") != 0
    assert "FSDP shards causal language models" in log.read_text()
    before, after = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    for name in before:
        if before[name].is_floating_point() and "running" not in name:
            torch.testing.assert_close(after[name], before[name], rtol=1e-2, atol=2e-3)
    assert same_zeros(pruned, tmp_path / "two")


def test_reconstruction_uses_the_statistics_that_the_pruned_network_has(
    dense: Path, pruned: Path, tmp_path: Path
) -> None:
    """They are not the dense network's where pruning estimated them anew."""
    start = convnets.write(tmp_path / "start", convnets.ConvNet())
    state = tensors_of(pruned)
    state |= {name: 2 * tensor for name, tensor in state.items() if name.endswith("running_var")}
    save_file(state, start / "model.safetensors")
    (start / MASKS).write_bytes((pruned / MASKS).read_bytes())

    def error(directory: Path) -> float:
        pixels = convnets.pictures(16, 0)["pixels"]
        networks = [convnets.ConvNet().eval() for _ in range(2)]
        for network, place in zip(networks, (dense, directory), strict=True):
            network.load_state_dict(tensors_of(place))
        with torch.no_grad():
            wanted, got = (network(pixels) for network in networks)
        return float((got - wanted).square().sum() / wanted.square().sum())

    heal = {"train": ["norms", "all"], "way": "reconstruct", "epochs": 8, "dense": str(dense)}
    report = prunella.heal(start, {**BASE, "heal": heal}, output=tmp_path / "out")
    assert error(tmp_path / "out") < 0.5 * error(start)
    assert not any("running" in name for name in changed(start, tmp_path / "out"))
    assert report.healing["samples"] == 16 * 8
    sub = {**heal, "part": "sub-block", "epochs": 2}
    prunella.heal(start, {**BASE, "heal": sub}, output=tmp_path / "sub")
    assert changed(start, tmp_path / "sub")


def test_the_step_reconstruct_prunes_convolutions(dense: Path, tmp_path: Path) -> None:
    once = prunella.prune(str(dense), {**BASE, "sparsity": 0.6, "batch_norm": "keep"}, output=tmp_path / "once")
    steps = ["magnitude", {"reconstruct": {"epochs": 4, "train": ["norms", "all"]}}]
    wanted = {**BASE, "sparsity": 0.6, "batch_norm": "keep", "steps": steps}
    fitted = prunella.prune(str(dense), wanted, output=tmp_path / "fitted")
    assert fitted.sparsity == once.sparsity
    assert fitted.pruned["loss"] < once.pruned["loss"]


def test_it_is_pruned_and_healed_in_rounds(dense: Path, tmp_path: Path) -> None:
    report = prunella.prune(str(dense), recipe(rounds=2, distill=0.5, adapt=1), output=tmp_path / "out")
    assert report.sparsity == pytest.approx(0.8, abs=0.01)
    assert report.healing["taught"]["samples"] > 0
    assert report.model["name"] == str(dense)
    assert not any(path.name.startswith("out.") for path in tmp_path.iterdir())
    said = [row[0] for row in report.healing_rows()]
    assert "samples" in said
    assert "tokens" not in said


def test_a_dense_network_trains_as_a_whole(dense: Path, tmp_path: Path) -> None:
    fresh = convnets.write(tmp_path / "fresh")
    report = prunella.heal(fresh, recipe(epochs=12, rate=1e-2, held_out=8), output=tmp_path / "out")
    assert report.healing["after"]["loss"] < 0.7 * report.healing["before"]["loss"]
    assert report.sparsity == 0
    assert not prunella.read_masks(tmp_path / "out")
    with pytest.raises(InputError, match="samples have no labels"):
        prunella.heal(fresh, recipe(text=["bare"]), output=tmp_path / "bare")
    with pytest.raises(InputError, match="nothing to heal"):
        prunella.heal(fresh, {**BASE, "heal": {"way": "reconstruct", "dense": str(dense)}}, output=tmp_path / "no")
    assert not (tmp_path / "bare").exists()


def test_samples_to_evaluate_on_are_never_trained_on(pruned: Path, tmp_path: Path, capsys: Any) -> None:
    wanted = recipe(text=["drawn:1"], train=["norms"]) | {"evaluate": {"windows": 32, "source": "drawn:1"}}
    report = prunella.heal(pruned, wanted, output=tmp_path / "out")
    assert report.healing["samples"] == 96
    assert "32 of 64 samples to train on are left out" in capsys.readouterr().err
    wanted["heal"]["samples"] = 20
    with pytest.raises(InputError, match="every sample to train on is also one to evaluate on"):
        prunella.heal(pruned, wanted, output=tmp_path / "none")


@pytest.mark.parametrize(
    ("heal", "message"),
    [
        ({"tokens": 100}, r"heal\.tokens is of text: task 'textures' trains in passes, heal\.epochs"),
        ({"text": ["nowhere"]}, "there are no pictures 'nowhere'"),
        ({"held_out": 64}, "too few to hold 64 of them out"),
        ({"train": ["new-biases"]}, "no switch in the config of this ConvNet"),
        ({"train": ["embeddings"]}, "'embeddings' finds nothing to train"),
        ({"checkpointing": True}, "cannot recompute activations"),
    ],
)
def test_what_cannot_be_healed_is_refused(heal: dict[str, Any], message: str, pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        prunella.heal(pruned, recipe(**heal), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_masks_are_held_in_a_training_of_ones_own(pruned: Path) -> None:
    """Of grouped convolutions too, whose layers are parts of a weight."""
    network = convnets.ConvNet()
    network.load_state_dict(tensors_of(pruned))
    before = {name: value == 0 for name, value in network.named_parameters() if value.ndim > 1}
    data = convnets.pictures(8, 5)
    with hold(network, prunella.read_masks(pruned)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            torch.nn.functional.cross_entropy(network(data["pixels"]), data["labels"]).backward()
            optimizer.step()
    for name, value in network.named_parameters():
        if value.ndim > 1:
            assert (value == 0).equal(before[name]), name
    with (
        pytest.raises(InputError, match="'nowhere' is neither a layer nor a parameter"),
        hold(network, {"nowhere": torch.ones(2, 2, dtype=torch.bool)}),
    ):
        pass


def test_masks_that_move_are_chosen_by_the_recipe_s_steps(pruned: Path, tmp_path: Path) -> None:
    """Of a convolutional network: dense at first, as sparse as it is to be at the end."""
    task = make_task("textures")
    model = task.wrap(convnets.trained())
    samples = task.samples(model, "drawn", 64)
    chosen = choose(parts_of(model, full(model)), [make_group("all")])
    attach(chosen)
    wanted = prunella.Recipe.of({**BASE, "steps": ["wanda"], "batch_norm": "keep"})
    training = Training(
        model.network,
        chosen,
        samples,
        lambda outputs, batch: task.losses(outputs, batch).mean(),
        make_schedule("imp", 6, {"rounds": 2}),
        tmp_path / "training",
        run=task.run,
        update=updates(model, chosen, wanted, samples.first(16)),
        batch=16,
        micro=16,
        every=6,
    )
    with training:
        training.advance()
    detach(chosen)
    for name in model.blocks:
        for slot in find_layers(model.module(name), name):
            assert (slot.read() == 0).float().mean().item() == pytest.approx(0.8, abs=0.02), slot.name
