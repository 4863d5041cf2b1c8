import os

# Before anything imports the hub's client: no test touches the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread each: tests run side by side, and the models are too small to share out. What they start inherits it.
os.environ["OMP_NUM_THREADS"] = "1"

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerator
import pytest
import tiny
import torch
import transformers

import prunella.heal  # noqa: F401  (registers every step: tests are parametrized over the registries)
from prunella import cli, registry
from prunella.allocate import allocations
from prunella.heal import groups
from prunella.lenses.registry import lenses
from prunella.norm_ways import ways
from prunella.statistics.registry import statistics
from prunella.store.registry import stores
from prunella.tasks import tasks
from prunella.train.schedule import schedules

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)  # whatever had imported torch before
if hasattr(torch._C, "_acc"):
    accelerator.meet()
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined anywhere


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Converted models and sampled texts of the tests stay out of the user's cache."""
    path = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNELLA_CACHE", str(path))
        yield path


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a test registers is gone afterwards."""
    kinds: tuple[dict[str, Any], ...] = (
        registry.steps,
        allocations,
        groups,
        lenses,
        schedules,
        statistics,
        ways,
        stores,
        tasks,
    )
    before = [(known, dict(known)) for known in kinds]
    yield
    registry._of_file.clear()
    for name in [name for name in sys.modules if name.startswith("prunella_step_")]:
        del sys.modules[name]
    for known, methods in before:
        known.clear()
        known.update(methods)


@pytest.fixture
def ids() -> torch.Tensor:
    return tiny.token_windows()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaMA of three blocks in several shards, with a tokenizer and a generation config. Read only."""
    path = tmp_path_factory.mktemp("models") / "llama"
    tiny.build("llama", num_hidden_layers=3, max_position_embeddings=128).save_pretrained(path, max_shard_size="60KB")
    tiny.write_tokenizer(path)
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.fixture
def sim() -> Iterator[torch.device]:
    """A device that is not the CPU, simulated."""
    if not hasattr(torch._C, "_acc"):
        pytest.skip("this PyTorch takes no device that is written in Python")
    with accelerator.plugged_in() as device:
        yield device


@pytest.fixture(scope="session")
def bos(llama: Path) -> Path:
    """That model with a tokenizer that puts a BOS, token 1, before a text. Read only."""
    path = llama.with_name("bos")
    shutil.copytree(llama, path)
    tiny.write_tokenizer(path, bos=True)
    return path


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run a command line in this process."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["prunella", *map(str, arguments)])
        monkeypatch.setattr(cli.console, "EVERY", float("inf"))  # no lines of progress, however slow the machine
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a script in a fresh Python."""

    def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
        )

    return python
