"""A run that was killed and then resumed ends with the same bytes as one that was not."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from processes import CONTEXT
from transformers import AutoModelForCausalLM

import prunella
from prunella import InputError, Layer, ModelError, NumericalError, keep, register
from prunella.model import checkpoint
from prunella.registry import steps
from prunella.save import Output
from prunella.stream import Stream
from prunella.tensors import TensorFile, read_grids


def recipe_of(order: str, **changes: Any) -> dict[str, Any]:
    short = {"calibration": {"samples": 4, "length": 32}, "evaluate": {"windows": 1}}
    return {"steps": ["sparsegpt"], "order": order, **short, **changes}


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.suffix in (".safetensors", ".masks")}


@pytest.fixture(scope="module", params=["layer", "block"])
def order(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def expected(order: str, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Any]:
    """The files and the report of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    report = prunella.prune(llama, recipe_of(order), output=out)
    return files_of(out), report


class Killed(BaseException):
    """Stands for the end of the process: nobody catches it."""


def killed_run(monkeypatch: pytest.MonkeyPatch, place: Any, method: str, call: int, run: Callable[[], Any]) -> None:
    """Run until the `call`-th call of a method, counted from 0, and die there."""
    original = getattr(place, method)
    count = 0

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > call:
            raise Killed
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, method, dying)
        with pytest.raises(Killed):
            run()


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_killed_between_blocks(
    blocks: int, order: str, expected: Any, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    killed_run(monkeypatch, Output, "write", blocks, lambda: prunella.prune(llama, recipe_of(order), output=out))
    assert not out.exists()
    assert (tmp_path / "out.partial").is_dir()
    report = prunella.prune(llama, recipe_of(order), output=out, resume=True)
    files, whole = expected
    assert files_of(out) == files
    assert report.run["resumed_after_blocks"] == blocks
    assert report.layers == whole.layers
    assert (report.dense, report.pruned) == (whole.dense, whole.pruned)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_dense_model_beside_the_pruned_one_is_resumed_too(
    order: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, whole, out = recipe_of(order, steps=["align", "wanda", "update"]), tmp_path / "whole", tmp_path / "out"
    prunella.prune(llama, recipe, output=whole)
    killed_run(monkeypatch, Output, "write", 1, lambda: prunella.prune(llama, recipe, output=out))
    assert prunella.prune(llama, recipe, output=out, resume=True).run["resumed_after_blocks"] == 1
    assert files_of(out) == files_of(whole)


@pytest.mark.parametrize(
    ("place", "method", "call"),
    [
        (TensorFile, "write", 10),  # in the middle of the second block's tensors
        (Output, "_log", 2),  # the weights are written, the journal does not say so
        (Output, "complete", 0),  # all blocks are done
        (TensorFile, "copy", 3),  # what no step touched is half copied
        (Output, "finish", 0),  # only the companions are missing
        (shutil, "copyfile", 1),
        (Path, "rename", 0),  # everything is there but the name
    ],
)
def test_killed_anywhere_else(
    place: Any,
    method: str,
    call: int,
    order: str,
    expected: Any,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    killed_run(monkeypatch, place, method, call, lambda: prunella.prune(llama, recipe_of(order), output=out))
    assert not out.exists()
    prunella.prune(llama, recipe_of(order), output=out, resume=True)
    assert files_of(out) == expected[0]


@pytest.mark.parametrize("flags", [{}, {"format": "packed", "bits": 8}], ids=["dense", "packed"])
def test_killed_just_before_the_model_has_its_name(
    flags: dict[str, Any], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grids of all layers survive, nothing is pruned or measured again, and nothing is left beside the result."""
    recipe = recipe_of("layer", steps=["wanda", "gptq"], **flags)
    prunella.prune(llama, recipe, output=tmp_path / "whole")
    out, looked = tmp_path / "out", []

    def track(items: Any, what: str, total: int) -> Any:
        looked.append(what)
        return items

    killed_run(monkeypatch, Path, "rename", 0, lambda: prunella.prune(llama, recipe, output=out))
    assert not out.exists()
    monkeypatch.setattr(Stream, "prune", None)
    report = prunella.prune(llama, recipe, output=out, resume=True, track=track)
    assert looked == ["pruning"]
    assert report.run["resumed_after_blocks"] == 3
    whole, found = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir() if p.suffix not in (".json", ".md")}
        for name in ("whole", "out")
    )
    assert found == whole
    assert bool(read_grids(out)) is not bool(flags)  # packed weights carry theirs
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_killed_twice(order: str, expected: Any, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    killed_run(monkeypatch, Output, "write", 1, lambda: prunella.prune(llama, recipe_of(order), output=out))
    killed_run(
        monkeypatch, Output, "write", 1, lambda: prunella.prune(llama, recipe_of(order), output=out, resume=True)
    )
    report = prunella.prune(llama, recipe_of(order), output=out, resume=True)
    assert report.run["resumed_after_blocks"] == 2
    assert files_of(out) == expected[0]


def _die_at_the_second_block(source: Path, out: Path, order: str) -> None:
    write, done = Output.write, 0

    def dying(self: Output, result: Any) -> None:
        nonlocal done
        if done == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, result)
        done += 1

    Output.write = dying  # type: ignore[method-assign]
    prunella.prune(source, recipe_of(order), output=out)


def test_killed_by_the_system(order: str, expected: Any, llama: Path, tmp_path: Path) -> None:
    """The real thing: SIGKILL, which nothing can clean up after."""
    out = tmp_path / "out"
    killed = CONTEXT.Process(target=_die_at_the_second_block, args=(llama, out, order))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert not out.exists()
    report = prunella.prune(llama, recipe_of(order), output=out, resume=True)
    assert report.run["resumed_after_blocks"] == 1
    assert files_of(out) == expected[0]


@pytest.mark.parametrize("tail", [b'{"block": 1, "lay', b'{"block": 1}', b"\x00\x00\x00", b'{"note": "x", "value": 1}'])
def test_a_torn_last_line_of_the_journal_is_forgotten(
    tail: bytes, order: str, expected: Any, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    killed_run(monkeypatch, Output, "write", 1, lambda: prunella.prune(llama, recipe_of(order), output=out))
    with (tmp_path / "out.partial" / "journal.jsonl").open("ab") as journal:
        journal.write(tail)  # without its newline
    killed_run(
        monkeypatch, Output, "write", 1, lambda: prunella.prune(llama, recipe_of(order), output=out, resume=True)
    )
    for line in (tmp_path / "out.partial" / "journal.jsonl").read_text().splitlines():
        json.loads(line)
    report = prunella.prune(llama, recipe_of(order), output=out, resume=True)
    assert report.run["resumed_after_blocks"] == 2
    assert files_of(out) == expected[0]


def test_a_mixture_resumes_to_the_same_bytes(order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, ids = tmp_path / "source", tiny.token_windows()
    tiny.build("mixtral", num_hidden_layers=3).save_pretrained(source, max_shard_size="40KB")

    def run(name: str, **options: Any) -> Any:
        return prunella.prune(source, recipe_of(order), output=tmp_path / name, calibration=ids, **options)

    run("whole")
    killed_run(monkeypatch, Output, "write", 2, lambda: run("out"))
    run("out", resume=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_step_that_draws_at_random_resumes_to_the_same_bytes(
    order: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @register("chance")
    def chance(layer: Layer) -> Layer:
        """Prune at random."""
        return layer.pruned(layer.weight_OI, keep(torch.rand(layer.weight_OI.shape), layer.sparsity))

    def run(name: str, **options: Any) -> Any:
        return prunella.prune(llama, recipe_of(order, steps=["chance"]), output=tmp_path / name, **options)

    try:
        run("whole")
        killed_run(monkeypatch, Output, "write", 2, lambda: run("out"))
        run("out", resume=True)
    finally:
        del steps["chance"]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------
# What may go wrong


@pytest.mark.parametrize(("method", "blocks"), [("__init__", 0), ("write", 2)])
def test_a_file_that_cannot_be_read_costs_no_finished_block(
    method: str, blocks: int, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, out = recipe_of("block", evaluate={"source": None}), tmp_path / "out"
    prunella.prune(llama, recipe, output=tmp_path / "whole")
    real, before = checkpoint.safe_open, getattr(Output, method)

    def broken(*arguments: Any, **options: Any) -> Any:
        raise OSError(5, "Input/output error")

    def then_breaks(*arguments: Any) -> None:
        before(*arguments)
        monkeypatch.setattr(checkpoint, "safe_open", broken)

    monkeypatch.setattr(Output, method, then_breaks)
    with pytest.raises(ModelError, match=r"cannot be read: .*Input/output error.* What is done is kept.*--resume"):
        prunella.prune(llama, recipe, output=out)
    monkeypatch.setattr(Output, method, before)
    monkeypatch.setattr(checkpoint, "safe_open", real)
    assert prunella.prune(llama, recipe, output=out, resume=True).run["resumed_after_blocks"] == blocks
    assert files_of(out) == files_of(tmp_path / "whole")


def test_an_evaluation_that_fails_costs_nothing_and_is_all_that_is_done_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, measure = tmp_path / "out", importlib.import_module("prunella.evaluate.measure")
    real: Any = vars(measure)["answered"]

    def fails(model: Any, samples: Any, *, checkpoint: Any = None, track: Any = None) -> Any:
        if checkpoint is not None:
            raise NumericalError("the perplexity is not finite.")
        return real(model, samples)

    with monkeypatch.context() as patch:
        patch.setattr(measure, "answered", fails)
        with pytest.raises(NumericalError, match=r"not finite\. What is done is kept"):
            prunella.prune(llama, recipe_of("layer"), output=out)
    monkeypatch.setattr(Stream, "prune", None)
    report = prunella.prune(llama, recipe_of("layer"), output=out, resume=True)
    assert report.run["resumed_after_blocks"] == 3
    assert report.pruned["perplexity"] > 1


# ---------------------------------------------------------------------------------------------------------
# What is the same run


def test_resuming_what_was_not_begun_begins_it(llama: Path, tmp_path: Path, expected: Any, order: str) -> None:
    prunella.prune(llama, recipe_of(order), output=tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == expected[0]


def test_models_and_texts_by_another_of_their_names_are_the_same_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("Trees grow back when they are pruned in time.\n" * 200)
    (tmp_path / "link").symlink_to(llama)
    (tmp_path / "same.txt").symlink_to(tmp_path / "text.txt")
    recipe = recipe_of("layer", calibration={"source": str(tmp_path / "text.txt"), "samples": 4, "length": 32})
    out = tmp_path / "out"
    killed_run(monkeypatch, Output, "write", 1, lambda: prunella.prune(llama, recipe, output=out))
    monkeypatch.chdir(tmp_path)
    recipe["calibration"]["source"] = "same.txt"
    report = prunella.prune("link", recipe, output="out", resume=True)
    assert report.run["resumed_after_blocks"] == 1
    assert report.model["path"] == str(tmp_path / "link")
    assert report.recipe["calibration"]["source"] == str(tmp_path / "same.txt")


def test_another_evaluation_is_no_other_run_and_its_figures_are_those_of_its_own_text(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    two = prunella.prune(llama, recipe_of("layer", evaluate={"windows": 2}), output=tmp_path / "two")
    killed_run(monkeypatch, Path, "rename", 0, lambda: prunella.prune(llama, recipe_of("layer"), output=out))
    report = prunella.prune(llama, recipe_of("layer", evaluate={"windows": 2}), output=out, resume=True)
    assert report.run["resumed_after_blocks"] == 3
    assert (report.dense, report.pruned) == (two.dense, two.pruned)


@pytest.mark.parametrize("began", ["layer", "block"])
def test_a_run_whose_order_was_chosen_for_it_goes_on_in_that_order(
    began: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    killed_run(monkeypatch, Output, "write", 1, lambda: prunella.prune(llama, recipe_of(began), output=out))
    report = prunella.prune(llama, recipe_of("auto"), output=out, resume=True)
    assert report.run["resumed_after_blocks"] == 1
    assert report.recipe["order"] == began


# ---------------------------------------------------------------------------------------------------------
# What may not be resumed


@pytest.fixture
def unfinished(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    out = tmp_path / "out"
    killed_run(monkeypatch, Output, "write", 1, lambda: prunella.prune(llama, recipe_of("layer"), output=out))
    return out


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"sparsity": 0.4}, "sparsity"),
        ({"steps": [{"sparsegpt": {"damping": 0.02}}]}, "steps"),
        ({"order": "block"}, "order"),
        ({"seed": 1}, "seed"),
        ({"calibration": {"samples": 5, "length": 32}}, "calibration, calibration tokens"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"skip": ["q_proj"]}, "skip"),
    ],
)
def test_another_recipe_does_not_continue_a_run(
    changes: dict[str, Any], what: str, unfinished: Path, llama: Path
) -> None:
    partial = unfinished.with_name("out.partial")
    before = {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=f"was another one: {what} differ"):
        prunella.prune(llama, recipe_of("layer") | changes, output=unfinished, resume=True)
    assert {path: path.read_bytes() for path in partial.rglob("*") if path.is_file()} == before
    assert prunella.prune(llama, recipe_of("layer"), output=unfinished, resume=True).run["resumed_after_blocks"] == 1


def test_a_model_that_changed_meanwhile_does_not_continue_a_run(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(llama, source)
    killed_run(monkeypatch, Output, "write", 1, lambda: prunella.prune(source, recipe_of("layer"), output=out))
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(source, max_shard_size="60KB")
    with pytest.raises(InputError, match="was another one: model files differ"):
        prunella.prune(source, recipe_of("layer"), output=out, resume=True)


def test_an_unfinished_run_is_neither_overwritten_nor_finished_by_accident(unfinished: Path, llama: Path) -> None:
    with pytest.raises(InputError, match=r"holds an unfinished run: repeat its command with --resume, or delete"):
        prunella.prune(llama, recipe_of("layer"), output=unfinished)
    prunella.prune(llama, recipe_of("layer"), output=unfinished, resume=True)
    with pytest.raises(InputError, match="exists and is not empty"):
        prunella.prune(llama, recipe_of("layer"), output=unfinished, resume=True)


def test_a_model_in_memory_leaves_nothing_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing could resume it."""

    def run() -> Any:
        recipe = {"steps": ["wanda"]}
        return prunella.prune(tiny.build(), recipe, output=tmp_path / "out", calibration=tiny.token_windows())

    killed_run(monkeypatch, Output, "write", 1, run)
    assert not list(tmp_path.iterdir())
    assert run().sparsity == 0.5


def test_two_runs_do_not_write_into_one_directory(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused: list[str] = []

    def track(items: Any, what: str, total: int) -> Any:
        for resume in (False, True):
            with pytest.raises(InputError) as error:
                prunella.prune(llama, recipe_of("layer"), output=out, resume=resume)
            refused.append(str(error.value))
        return items

    prunella.prune(llama, recipe_of("layer"), output=out, track=track)
    assert len(refused) == 6
    assert all("another run is writing to" in message for message in refused)
    assert (out / "prunella.json").exists()
