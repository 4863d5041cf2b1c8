"""What is typed first: help, version, completion, mistakes; none of it waits for torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

import prunella
from prunella.cli.app import app

Run = Callable[..., Any]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def options(command: str) -> set[str]:
    return {name for parameter in COMMANDS[command].params for name in parameter.opts if name.startswith("--")}


def test_the_bare_command_prints_the_help_as_help(run: Run) -> None:
    bare, asked, short = run(), run("--help"), run("-h")
    assert bare == asked == short
    assert (bare.code, bare.err) == (0, "")
    assert "Usage: prunella" in bare.out
    for name in COMMANDS:
        assert re.search(rf"^│ {name} ", bare.out, re.MULTILINE), name


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_is_explained_in_the_help_of_its_command(run: Run, monkeypatch: Any, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shown = run(name, "-h")
    assert (shown.code, shown.err) == (0, "")
    for option in options(name):
        assert re.search(rf"{option}\b.*[A-Za-z0-9]{{3}}.*│", shown.out), option
    assert all(parameter.help for parameter in COMMANDS[name].params)


def test_the_help_of_prune_is_in_groups_with_defaults(run: Run, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shown = run("prune", "--help").out
    groups = ["What to prune, and how", "Calibration", "Healing", "Measuring", "What is saved", "The run"]
    assert [group for group in re.findall(r"^╭─ (.*?) ─", shown, re.MULTILINE) if group in groups] == groups
    for option, default in {"step": "sparsegpt", "sparsity": "0.5", "samples": "32", "windows": "8"}.items():
        assert re.search(rf"--{option} .*\[default: {re.escape(default)}\]", shown), option


def test_the_defaults_that_the_help_names_are_the_recipes(run: Run, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    recipe = prunella.Recipe.of({"task": "text"})
    means = {
        "step": next(iter(recipe.steps[0])),
        "sparsity": recipe.default_sparsity,
        "pattern": recipe.pattern,
        "allocate": next(iter(recipe.allocate)),
        "calibration": recipe.calibration.source,
        "samples": recipe.calibration.samples,
        "evaluate": recipe.evaluate.source,
        "windows": recipe.evaluate.windows,
        "format": recipe.format,
        "group": recipe.group,
        "seed": recipe.seed,
    }
    shown = run("prune", "-h").out
    for option, default in means.items():
        assert re.search(rf"--{option} .*\[default: {re.escape(str(default))}\]", shown), option


def test_a_sweep_takes_what_prune_takes() -> None:
    assert options("prune") <= options("sweep")


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_the_version_is_one_line(run: Run, flag: str) -> None:
    assert run(flag).out == f"prunella {prunella.__version__}\n"


def test_nothing_of_this_imports_torch(python: Run) -> None:
    script = """
        import contextlib, io, os, sys
        import prunella
        from prunella.cli import main
        def said(*words, **environment):
            sys.argv = ["prunella", *words]
            out = io.StringIO()
            os.environ |= environment
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):
                main()
            for name in environment:
                del os.environ[name]
            return out.getvalue()
        assert "Usage" in said() and "Usage" in said("prune", "--help")
        assert prunella.__version__ in said("--version")
        assert "sparsegpt" in said("methods")
        assert "No such" in said("prun")
        words = dict(COMP_WORDS="prunella prune m --step wa", COMP_CWORD="4")
        assert "wanda" in said(_PRUNELLA_COMPLETE="complete_bash", **words)
        slow = {"torch", "numpy", "transformers", "yaml"} & sys.modules.keys()
        assert not slow, slow
    """
    done = python(textwrap.dedent(script))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["swe"], {"sweep"}),
        (["prune", "m", "--step", "sparse"], {"sparsegpt"}),
        (["heal", "m", "--train", "mask"], {"mask-lora"}),
        (["prune", "m", "--allocate", ""], {"dlp", "global", "owl", "probe", "ramp", "uniform"}),
        (["prune", "m", "--recipe", "bal"], {"balanced"}),
        (["eval", "m", "--text", "wiki"], {"wikitext2"}),
    ],
)
def test_words_are_completed(run: Run, monkeypatch: Any, words: list[str], expected: set[str]) -> None:
    monkeypatch.setenv("_PRUNELLA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", " ".join(["prunella", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    assert set(run().out.split()) == expected


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "prunella", "-V"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"prunella {prunella.__version__}\n", "")


# ---------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["prun"], "No such command 'prun'. Did you mean 'prune'? See prunella --help."),
        (["--nope"], "No such option: --nope. See prunella --help."),
        (["prune"], "Missing argument 'MODEL'. See prunella prune --help."),
        (["prune", "m", "-o"], "Option '-o' requires an argument. See prunella prune --help."),
        (["prune", "m", "-o", "x", "y"], "(y). See prunella prune --help."),
        (["prune", "m", "-o", "x", "--sparsty", "1"], "--sparsity"),
        (["eval", "m", "--windows", "0"], "See prunella eval --help."),
    ],
)
def test_a_usage_error_is_one_line_that_says_where_to_read_on(run: Run, words: list[str], message: str) -> None:
    said = run(*words)
    assert (said.code, said.out) == (2, "")
    assert re.fullmatch(r"prunella: error: [^\n]+\n", said.err)
    assert message in said.err


@pytest.mark.parametrize(
    "words", [("--debug", "inspect", "no"), ("inspect", "--debug", "no"), ("inspect", "no", "--debug")]
)
def test_debug_may_stand_anywhere(run: Run, words: tuple[str, ...]) -> None:
    said = run(*words)
    assert said.code == 2
    assert "Traceback" in said.err


def test_after_two_dashes_debug_is_a_word_like_any_other(run: Run) -> None:
    said = run("inspect", "--", "--debug")
    assert "Traceback" not in said.err
    assert "'--debug' is not a directory" in said.err


# ---------------------------------------------------------------------------------------------------------
# What is printed


def test_names_are_printed_as_they_are_and_commands_quoted(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "my [b]model :key:"
    short = ("--samples", 2, "--length", 16, "--evaluate", "none")
    done = run("prune", llama, "-o", out, "--step", "magnitude", *short)
    assert done.code == 0, done.err
    assert f"saved to {out}\n" in done.out
    assert f"prunella pack '{out}' -o DIR" in done.out
    assert "my [b]model :key:" in run("compare", out).out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_output_in_any_encoding_is_no_error(tmp_path: Path, encoding: str) -> None:
    name = tmp_path / "é…\udcff"  # a byte that is no UTF-8, as a path may have
    name.mkdir()
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-m", "prunella", "prune", "--help"], capture_output=True, env=environment, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    script = (
        "import sys; from prunella.cli.console import never_fail_to_encode, print_table\n"
        "never_fail_to_encode(); print(sys.argv[1]); print_table(('a', '…'), [(sys.argv[1], '±')])"
    )
    done = subprocess.run([sys.executable, "-c", script, name], capture_output=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    if encoding == "utf-8":
        assert os.fsencode(name) + b"\n" in done.stdout


def test_a_reader_that_has_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "prunella", "methods"], stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_sweeps_flags_are_in_the_recipes_of_its_cells(run: Run, llama: Path, tmp_path: Path) -> None:
    flags = ("--samples", 2, "--length", 16, "--windows", 1, "--skip", "q_proj", "--order", "block", "--seed", 3)
    shares = ("--sparsity", 0.5, "--sparsity", "down_proj=0.25")
    done = run("sweep", llama, "-o", tmp_path / "out", "--step", "magnitude", "--json", "--resume", *shares, *flags)
    assert done.code == 0, done.err
    _, row = json.loads(done.out)
    assert row["recipe"]["skip"] == ["q_proj"]
    assert (row["recipe"]["order"], row["recipe"]["seed"]) == ("block", 3)
    assert row["recipe"]["sparsity"] == {"*": 0.5, "down_proj": 0.25}
    assert (row["settings"]["samples"], row["settings"]["length"], row["settings"]["windows"]) == (2, 16, 1)
