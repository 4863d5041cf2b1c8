"""Command lines in processes of their own that can be killed, and processes that work together.

They are forked from one process that has imported everything and computed nothing, so that a hundred of them cost a
minute and not ten.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["prunella.cli", "prunella.cells", "prunella.heal.run", "prunella.packed.quantizer"])
SCALE = float(os.environ.get("PRUNELLA_FAULTS", "0.2"))  # how much of all kills and mutations

SHORT = ("--samples", 4, "--length", 32, "--windows", 1)  # flags of a quick run


def times(count: int) -> int:
    return max(1, round(count * SCALE))


def _main(arguments: tuple[str, ...], log: str) -> None:
    import torch

    from prunella import cli

    torch.set_num_threads(1)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["prunella", *arguments]
    cli.main()


@dataclass
class Command:
    """A command that was started; what it prints is in `log`."""

    process: Any
    log: Path

    @classmethod
    def start(cls, log: Path, *arguments: object) -> Command:
        process = CONTEXT.Process(target=_main, args=(tuple(map(str, arguments)), str(log)), daemon=True)
        process.start()
        return cls(process, log)

    def kill_after(self, seconds: float) -> bool:
        """SIGKILL after so long; was it still running?"""
        self.process.join(seconds)
        if self.process.exitcode is not None:
            return False
        self.process.kill()
        self.process.join()
        return bool(self.process.exitcode < 0)

    def finish(self, seconds: float = 120) -> int:
        """Wait for the end; the exit status."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {seconds} s: {self.said()}")
        return int(self.process.exitcode)

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def _member(environment: dict[str, str], log: str, what: Any, arguments: tuple[Any, ...], options: Any) -> None:
    os.environ.update(environment)
    import torch

    import prunella

    torch.set_num_threads(1)
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    dies = options.pop("dies", None)

    def watch(step: int, *_: Any) -> None:
        if step == dies:
            os._exit(1)

    if callable(what):
        what(*arguments)
    else:
        getattr(prunella, what)(*arguments, watch=watch, **options)


def together(log: Path, what: Any, *arguments: Any, count: int = 2, **options: Any) -> int:
    """Call a function, or one of Prunella by name, in several processes, as `torchrun` starts them: when one fails, so
    do all. With `dies` they end after that step. Returns the exit status of the first that failed, or 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {key: value for key, value in os.environ.items() if key.startswith(("ACCELERATE_", "FSDP_", "PRUNELLA_"))}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    members = []
    for rank in range(count):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        what_it_does = (environment, str(log), what, arguments, options)
        members.append(CONTEXT.Process(target=_member, args=what_it_does, daemon=True))
        members[-1].start()
    deadline, code = time.monotonic() + 300, 0
    while not code and any(member.exitcode is None for member in members):
        time.sleep(0.01)
        late = time.monotonic() > deadline
        code = next((int(member.exitcode) for member in members if member.exitcode), -1 if late else 0)
    for member in members:
        member.kill()
        member.join()
    return code
