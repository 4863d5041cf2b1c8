"""Functions that do not come with Prunella: their failures are theirs, and are said to be."""

from __future__ import annotations

import contextlib
import sys
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
    if not isinstance(result, due) and not _own(method.function):
        wanted = " or ".join(one.__name__ for one in (due if isinstance(due, tuple) else (due,)))
        raise StepError(f"{where} returned {type(result).__name__}, not {wanted}; the defect is in the {_kind(where)}.")
    return result


@contextlib.contextmanager
def blamed(made: Any, where: str) -> Iterator[None]:
    """What fails inside is a defect of the function or class `made`, if it does not come with Prunella: StepError says
    where. A PrunellaError, which it raises on purpose, passes, as does a full memory."""
    try:
        yield
    except (PrunellaError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if _own(made):
            raise
        file = getattr(sys.modules.get(made.__module__), "__file__", "")
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
        line = f", line {frames[-1].lineno} of {file}" if frames else ""
        raise StepError(
            f"{where}: {type(error).__name__}: {first_line(error)}; the defect is in the {_kind(where)}{line}."
        ) from error


def _own(made: Any) -> bool:
    return bool(made.__module__.partition(".")[0] == __package__.partition(".")[0])


def _kind(where: str) -> str:
    return where.partition(" '")[0]
