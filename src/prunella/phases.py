"""Where the time of a run goes, for those who ask: `measured`.

load        reading weights and bringing them to the device, as far as it is waited for
forward     blocks at work
statistics  what is made of the inputs of their layers
solve       the steps
write       the output, packed or not, as far as it is waited for
other       all else
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any


class Clock:
    """Marks set where one phase gives way to another; what stands within another phase counts for itself alone.

    mark:    sets one. On a GPU an event in its stream does, and nothing has to wait
    between: the seconds between two marks
    """

    def __init__(self, mark: Callable[[], Any], between: Callable[[Any, Any], float]):
        self._mark, self._between = mark, between
        self._inside: list[str] = ["other"]
        self._marks: list[tuple[str, Any]] = [("other", mark())]  # the phase that begins there

    def enter(self, name: str) -> None:
        self._inside.append(name)
        self._marks.append((name, self._mark()))

    def leave(self) -> None:
        self._inside.pop()
        self._marks.append((self._inside[-1], self._mark()))

    def stop(self) -> None:
        self._marks.append(("other", self._mark()))

    def seconds(self) -> dict[str, float]:
        """By phase, up to the last mark."""
        found: dict[str, float] = {}
        for (name, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            found[name] = found.get(name, 0.0) + self._between(begin, end)
        return found


_clock: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextlib.contextmanager
def measured(
    mark: Callable[[], Any] = time.perf_counter,
    between: Callable[[Any, Any], float] = lambda begin, end: end - begin,
) -> Iterator[Clock]:
    """A clock that runs inside. Without other marks a device's work counts where something happens to wait for it."""
    clock = Clock(mark, between)
    before = _clock.set(clock)
    try:
        yield clock
    finally:
        clock.stop()
        _clock.reset(before)


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """What is done inside is of this phase; costs next to nothing where no clock runs."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    clock.enter(name)
    try:
        yield
    finally:
        clock.leave()
