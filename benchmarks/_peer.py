"""Another project's engine in a process and an environment of its own, which answers lines with lines."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent


class Peer:
    """A worker, a script of this folder, by the Python of an environment, which is built once: that may take long.

    Raises OSError, RuntimeError or subprocess.CalledProcessError where it cannot be built or run.
    """

    def __init__(self, directory: Path, packages: Sequence[str], worker: str, *arguments: object):
        python = directory / "bin" / "python"
        if not (directory / "ready").exists():
            print(f"building {packages[0]} in {directory}: this takes long", file=sys.stderr)
            venv.create(directory, with_pip=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
            (directory / "ready").touch()
        command = [python, FOLDER / worker, *arguments]
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"it ended with code {self.process.wait()}")
        return line.strip()

    def ask(self, *words: object) -> str:
        """What it says to a line of words."""
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
