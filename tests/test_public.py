from __future__ import annotations

import doctest
import importlib
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import prunella

PUBLIC = [
    "Block",
    "InputError",
    "Inputs",
    "Layer",
    "Lens",
    "Level",
    "Model",
    "ModelError",
    "NumericalError",
    "Pattern",
    "Perplexity",
    "PrunellaError",
    "Recipe",
    "Report",
    "StatisticError",
    "Stats",
    "Step",
    "Task",
    "distil",
    "find_directory",
    "gradients",
    "heal",
    "keep",
    "load_model",
    "load_packed",
    "load_state",
    "make",
    "open_model",
    "perplexity",
    "prune",
    "prune_in_rounds",
    "read_masks",
    "register",
    "register_lens",
    "register_statistic",
    "register_task",
    "to_torch_prune",
    "wrap_model",
]
ROOT = Path(prunella.__file__).parent
MODULES = sorted(
    ".".join(("prunella", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
)


def module_of(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name is None or error.name.startswith("prunella"):
            raise
        pytest.skip(f"{name} needs {error.name}")


def own(module: ModuleType) -> list[tuple[str, Any]]:
    """Public functions and classes that a module defines itself."""
    return [
        (name, thing)
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(thing) or inspect.isclass(thing))
        and thing.__module__ == module.__name__
    ]


def test_these_names_and_no_others_are_public() -> None:
    assert sorted(prunella.__all__) == PUBLIC
    for name in PUBLIC:
        assert hasattr(prunella, name), name
    visible = {n for n, thing in vars(prunella).items() if not n.startswith("_") and not inspect.ismodule(thing)}
    assert visible == set(PUBLIC)


@pytest.mark.parametrize("name", MODULES)
def test_every_public_thing_says_what_it_is(name: str) -> None:
    module = module_of(name)
    assert module.__doc__, name
    silent = [thing for thing, value in own(module) if not inspect.getdoc(value)]
    assert not silent


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_are_right(name: str) -> None:
    # Examples may use what a reader would have imported.
    import torch

    names = {"torch": torch, **{key: getattr(prunella, key) for key in PUBLIC}}
    assert doctest.testmod(module_of(name), extraglobs=names).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    for name in ("prunella.types", "prunella.pattern"):
        assert any(test.examples for test in finder.find(module_of(name)))


def test_all_errors_are_one_kind_to_catch() -> None:
    errors = [getattr(prunella, name) for name in PUBLIC if name.endswith("Error")]
    assert len(errors) == 5
    assert all(issubclass(error, prunella.PrunellaError) for error in errors)
    assert not issubclass(prunella.PrunellaError, ValueError)


def test_importing_does_no_work(python: Callable[..., Any]) -> None:
    """No threads, no output, no files, no change of torch's state or of the environment, no slow library."""
    script = """
        import os, sys, threading
        import torch
        def state():
            settings = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
            return *settings, torch.random.get_rng_state().tolist()
        before = state()
        threads, environment, tasks = threading.enumerate(), dict(os.environ), len(os.listdir("/proc/self/task"))
        import prunella, prunella.cli
        assert state() == before
        assert threading.enumerate() == threads
        assert len(os.listdir("/proc/self/task")) == tasks
        assert dict(os.environ) == environment
        slow = {"datasets", "transformers", "matplotlib", "gguf", "accelerate"} & sys.modules.keys()
        assert not slow, slow
    """
    result = python(textwrap.dedent(script))
    assert result.returncode == 0, result.stderr
    assert result.stdout == result.stderr == ""


def test_names_are_imported_when_they_are_asked_for_and_are_what_they_were(python: Callable[..., Any]) -> None:
    script = """
        import sys
        import prunella
        assert "torch" not in sys.modules
        assert {*prunella.__all__} <= {*dir(prunella)}
        import prunella.prune, prunella.heal.run, prunella.cells  # modules that are called as functions are
        assert type(prunella.prune) is type(prunella.heal) is type(lambda: 0)
        assert prunella.prune is sys.modules["prunella.prune"].prune
        from prunella import heal, load_model, make, stream
        assert heal is sys.modules["prunella.heal.run"].heal
        assert stream is prunella.stream
        assert make("wanda").name == "wanda" and make("reconstruct").name == "reconstruct"
        for name in ("nothing", "_nothing"):
            assert not hasattr(prunella, name)
        try:
            from prunella import nothing
        except ImportError:
            print("right")
    """
    done = python(textwrap.dedent(script))
    assert (done.stdout, done.stderr) == ("right\n", "")


def test_a_step_is_found_whoever_is_asked_first(python: Callable[..., Any]) -> None:
    done = python("import prunella; print(prunella.make('wanda').name)")
    assert (done.stdout, done.stderr) == ("wanda\n", "")


def test_the_module_runs_as_a_command(python: Callable[..., Any]) -> None:
    result = python("import sys; sys.argv = ['prunella', '--version']; from prunella.cli import main; main()")
    assert result.returncode == 0
    assert result.stdout == f"prunella {prunella.__version__}\n"
