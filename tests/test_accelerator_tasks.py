"""Networks of every task on the simulated accelerator: the files, and the figures, are the CPU's."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import encoders
import pictures as drawn
import pytest
import soundfile
import test_seq2seq as seq2seq
import test_speech as speech
import tiny
import torch
import transformers as t
from test_accelerator import both, plain  # noqa: F401  (a fixture for all tests of this file)
from test_module import Convolutions, pictures

import prunella
from prunella.registry import steps
from prunella.tasks import tasks

pytestmark = pytest.mark.usefixtures("sim")
TEXTS = ["A rose is pruned in spring.", "Cut it back.", "Apples want to be pruned, too.", "Water it."] * 3


def of_pictures(folder: Path) -> dict[str, Any]:
    timm = pytest.importorskip("timm")
    timm.models.save_for_hf(drawn.tiny_timm(), str(folder / "dense"), safe_serialization=True)
    return {"source": str(drawn.folder(folder / "pictures", 4))}


def of_classes(folder: Path) -> dict[str, Any]:
    encoders.write(folder / "dense", encoders.build("bert"))
    rows = [json.dumps({"text": text, "label": number % 2}) for number, text in enumerate(TEXTS)]
    (folder / "texts.jsonl").write_text("\n".join(rows) + "\n")
    return {"source": str(folder / "texts.jsonl")}


def of_words(folder: Path) -> dict[str, Any]:
    encoders.write(folder / "dense", encoders.build("bert", "MaskedLM"))
    return {"source": "pydoc", "length": 24}


def of_pairs(folder: Path) -> dict[str, Any]:
    seq2seq.network().save_pretrained(folder / "dense")
    tiny.write_tokenizer(folder / "dense", eos=True)
    rows = [json.dumps({"source": one, "target": other}) for one, other in seq2seq.PAIRS]
    (folder / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    return {"source": str(folder / "pairs.jsonl")}


def of_sounds(folder: Path) -> dict[str, Any]:
    (folder / "dense").mkdir()
    tiny.write_tokenizer(folder / "dense", bos=True)
    tokenizer = t.AutoTokenizer.from_pretrained(folder / "dense")
    hears = t.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    t.WhisperProcessor(hears, tokenizer).save_pretrained(folder / "dense")
    speech.network().save_pretrained(folder / "dense")
    (folder / "sounds").mkdir()
    for number in range(12):
        soundfile.write(folder / "sounds" / f"{number}.wav", speech.wave(200 + 50 * number), speech.RATE)
        (folder / "sounds" / f"{number}.txt").write_text(f"tone number {number}\n")
    return {"source": str(folder / "sounds")}


MADE: Mapping[str, Callable[[Path], dict[str, Any]]] = {
    "images": of_pictures,
    "classify": of_classes,
    "masked": of_words,
    "seq2seq": of_pairs,
    "speech": of_sounds,
}


def test_every_task_of_files_has_its_test_here() -> None:
    own = {name for name, method in tasks.items() if method.function.__module__.startswith("prunella.")}
    assert own - {"text", "module", "captions"} == MADE.keys()


# Samples of several shapes, and stacks of which one follows the other, do not go through a layer together.
@pytest.mark.parametrize(("name", "order"), [("images", "layer"), *((name, "block") for name in MADE)])
def test_the_files_of_a_task_are_those_of_the_cpu(name: str, order: str, tmp_path: Path) -> None:
    read = MADE[name](tmp_path)
    said: dict[str, Any] = {}

    def work(device: str, output: Path) -> None:
        recipe = {
            "steps": ["sparsegpt"],
            "order": order,
            "calibration": {**read, "samples": 6, "min_tokens": 1},
            "evaluate": {**read, "windows": 4},
            "device": device,
        }
        report = prunella.prune(str(tmp_path / "dense"), recipe, output=output)
        assert list(report.recipe["task"]) == [name]
        said[device] = [
            {k: v for k, v in side.items() if isinstance(v, float)} for side in (report.dense, report.pruned)
        ]

    both(tmp_path, work)
    for here, there in zip(*said.values(), strict=True):
        assert there == pytest.approx(here, rel=1e-5)


@pytest.mark.parametrize("name", sorted(steps))
def test_every_step_prunes_convolutions_of_a_module_there(name: str) -> None:
    """Batch norms and all: weights and statistics are the CPU's."""
    own = [name] if steps[name].prunes else ["wanda", name]
    loss = (lambda out, batch: out.square().mean()) if name == "besa" else None
    after = {}
    for device in ("cpu", "sim"):
        torch.manual_seed(0)
        net = Convolutions().to(device)
        prunella.prune(net, {"steps": own}, calibration=pictures().to(device), loss=loss)
        after[device] = {key: value.cpu() for key, value in net.state_dict().items()}
    for key, value in after["cpu"].items():
        assert torch.equal((after["sim"][key] == 0), (value == 0)), key
        torch.testing.assert_close(after["sim"][key], value, rtol=1e-4, atol=1e-6)
