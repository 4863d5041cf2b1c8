"""What users are told: errors, each naming the thing, what is wrong with it and what to do about it; and asides."""

import difflib
import errno
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path


class PrunellaError(Exception):
    """Something the user can mend: the command line prints it on one line and exits with code 2."""


class InputError(PrunellaError):
    """A name, a number, a file or a text that cannot be used as given."""


class EndlessError(InputError):
    """All of a source was asked for, which has no end."""


class ModelError(PrunellaError):
    """A model that cannot be found, read or taken apart into blocks."""


class ReadError(ModelError):
    """A file of a model that could not be read this time: a disk or a network that failed, maybe not for good."""


class NumericalError(PrunellaError):
    """NaN or infinity in the weights, the activations or the result of a step."""


class StatisticError(PrunellaError):
    """A step asked for a statistic that it did not declare in `needs`."""


class DefectError(Exception):
    """An assumption of Prunella about a model does not hold: a defect of ours, exit code 1."""


class StepError(PrunellaError):
    """A step, an allocation or a healing method of the user's own raised an error, or did not do what it must."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """A message about an unknown name, with the nearest known one, if any is near, and a list of all."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return f"unknown {kind} '{name}'.{hint} Available: {', '.join(names)}."


def some(names: Sequence[str], most: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def command(*words: object) -> str:
    """A command of Prunella, its words quoted so that it can be pasted into a shell."""
    return shlex.join(["prunella", *map(str, words)])


def first_line(error: BaseException) -> str:
    """The first line of what an error of another library says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def say(message: str) -> None:
    """Tell the user, on stderr, what takes a while, touches the network or is slower than it could be."""
    print(f"prunella: {message}", file=sys.stderr, flush=True)


def kept(error: PrunellaError, where: Path) -> None:
    """Add to the message of an error that the work done before it is kept."""
    said = str(error).rstrip(".")
    error.args = (f"{said}. What is done is kept in '{where}': the same command with --resume goes on.",)


def disk_full(error: Exception) -> bool:
    """Was a full disk the cause? Libraries report it each in its own way."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return any(words in str(error) for words in ("No space left", "inline_container"))  # the latter is torch.save


def disk_error(error: Exception, where: Path) -> InputError:
    """The error to raise when writing to `where` failed."""
    if disk_full(error):
        there = next(path for path in (where, *where.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e6
        return InputError(
            f"no space left on the disk of '{where}' ({free:,.0f} MB free): make room, or choose another -o."
        )
    name, reason = (error.filename, error.strerror) if isinstance(error, OSError) else (None, None)
    return InputError(f"'{name or where}' cannot be written: {reason or error}.")
