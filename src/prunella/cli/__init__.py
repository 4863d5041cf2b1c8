"""The command line: parse, call, print.

```
app.py        the application, and what is asked before any command
options.py    what several commands are asked in the same words
console.py    what they print through: tables, progress
make.py       prune, heal, sweep
run.py        pack, unpack, generate, bench
see.py        eval, inspect, report, compare, methods
```

Nothing here imports torch before a command needs it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import typer

from ..errors import PrunellaError
from ..heap import keep_freed_memory
from . import console, make, run, see  # noqa: F401  (importing commands registers them)
from .app import app
from .console import err, never_fail_to_encode, out

__all__ = ["app", "err", "main", "out"]


def main() -> None:
    """Entry point. An error that the user can mend is one line and exit code 2, a defect of ours exit code 1."""
    keep_freed_memory()
    never_fail_to_encode()
    arguments, _ = _arguments()
    sys.exit(_guard(lambda: app(arguments or ["--help"], standalone_mode=False, prog_name="prunella")))


def _arguments() -> tuple[list[str], bool]:
    """The words of the command line without --debug, which may stand anywhere before `--`, and whether it did."""
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    return [word for word in words[:end] if word != "--debug"] + words[end:], "--debug" in words[:end]


def _guard(call: Callable[[], Any]) -> int:
    try:
        result = call()
        sys.stdout.flush()
        if result == 130:  # typer catches Ctrl-C itself, and says nothing
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.__context__, BrokenPipeError):
            raise  # completion has ended; but rich and typer make one of a reader that has gone, too
        with contextlib.suppress(OSError):  # else Python tries to write what is left, and complains, on its way out
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, code = _explain(error)
        if _arguments()[1] or os.environ.get("PRUNELLA_DEBUG"):
            traceback.print_exc()
    print(f"prunella: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    """What to say about an error, and the exit code."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    if isinstance(error, PrunellaError):
        return str(error), 2
    if hasattr(error, "format_message"):  # typer's, which are click's in some of its versions and its own in others
        return _usage(error, command), 2
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return f"interrupted.{KEPT.get(command, '')}", 130
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return f"out of memory: {LESS.get(command, LESS['prune'])}.", 2
    first = text.splitlines()[0] if text else ""
    return f"internal error, please report it: {type(error).__name__}: {first} (--debug shows where)", 1


KEPT = {  # of an interrupted command
    "prune": " Finished blocks are kept: continue with the same command and --resume.",
    "heal": " What is finished is kept: continue with the same command and --resume.",
    "sweep": " Finished cells are kept: continue with the same command.",
}
LESS = {  # what takes less memory
    "prune": "use fewer or shorter windows (--samples, --length), or --order block",
    "sweep": "use fewer or shorter windows (--samples, --length), or --order block",
    "heal": "use shorter windows (--length), fewer at a time (--set heal.micro=1), or --set heal.checkpointing=true",
    "eval": "use shorter windows (--length)",
    "generate": "use a smaller --dtype, such as bfloat16, or fewer --tokens",
}


def _usage(error: Any, command: str) -> str:
    """Typer's message about a command line that it cannot read, and which help to open."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else f"prunella {command}".rstrip()
    message = error.format_message().strip()
    return f"{message if message.endswith(('.', '?')) else f'{message}.'} See {path} --help."
