"""Functions that do not come with Prunella: their failures are theirs, and are said to be."""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch

from .errors import PrunellaError, StepError, first_line


class Registered(Protocol):
    """What any registry holds: something with a function."""

    @property
    def function(self) -> Callable[..., Any]: ...


def call(method: Registered, where: str, due: type | tuple[type, ...], thing: Any, options: Mapping[str, Any]) -> Any:
    """What a method makes of a thing.

    If it does not come with Prunella, and fails or gives back something else than what is due, raises StepError, which
    says where; a PrunellaError, which it raises on purpose, passes, as does a full memory.
    """
    with blamed(method.function, where):
        result = method.function(thing, **options)
    if not isinstance(result, due) and not _ours(method.function):
        wanted = " or ".join(one.__name__ for one in (due if isinstance(due, tuple) else (due,)))
        kind = where.partition(" '")[0]
        raise StepError(f"{where} returned {type(result).__name__}, not {wanted}; the defect is in the {kind}.")
    return result


@contextlib.contextmanager
def blamed(thing: Any, where: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """What fails inside fails for this function or class, if it does not come with Prunella: raises StepError, as
    `call` does. Errors of the kinds `but` pass."""
    try:
        yield
    except Exception as error:
        if _ours(thing) or isinstance(error, (PrunellaError, MemoryError, torch.OutOfMemoryError, *but)):
            raise
        file = inspect.getsourcefile(thing) or ""
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = f", line {frames[-1].lineno} of {file}" if frames else ""
        kind = where.partition(" '")[0]
        raise StepError(
            f"{where}: {type(error).__name__}: {first_line(error)}; the defect is in the {kind}{line}."
        ) from error


def _ours(thing: Any) -> bool:
    return bool(thing.__module__.partition(".")[0] == __package__.partition(".")[0])
