"""What the commands print through: two consoles, and progress on blocks and on training."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..errors import say

if TYPE_CHECKING:
    from rich.progress import Progress

# Names of files, layers and methods are printed as they are: `[b]` is no markup and `:key:` no emoji.
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

EVERY = 10.0  # seconds between lines of progress, at least
_CONTROL = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n"), ord("\t")}, "\N{REPLACEMENT CHARACTER}")


def never_fail_to_encode() -> None:
    """Print `?` for characters that the terminal cannot encode; file names that are not UTF-8 keep their bytes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            unicode = stream.encoding.lower().replace("-", "").startswith("utf")
            stream.reconfigure(errors="surrogateescape" if unicode else "replace")


def print_table(
    columns: Collection[str], rows: Iterable[Iterable[str]], title: str = "", right: Collection[str] = ()
) -> None:
    """A table; `right` names the columns that are aligned there. Long cells are folded, never cut.

    A model's text and a file's name may hold what a terminal would obey: control characters are shown, not sent.
    """
    table = Table(title=title or None)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell.translate(_CONTROL) for cell in row))
    out.print(table)


def track(items: Iterable[int], description: str, total: int) -> Iterator[int]:
    """Progress over blocks."""
    with meter(description, "blocks") as tell:
        tell(0, total, None)
        for done, item in enumerate(items, 1):
            yield item
            tell(done, total, None)


@contextlib.contextmanager
def meter(what: str = "healing", units: str = "steps") -> Iterator[Callable[[int, int, float | None], None]]:
    """Progress, by a function that is told how much is done, of how much, with what loss. In a terminal it is a bar
    with the time left, from the first call to the last; else a line now and then."""
    lines, bar = Lines(what, units), None

    def tell(done: int, total: int, loss: float | None) -> None:
        nonlocal bar
        about = "" if loss is None else f", loss {loss:.3f}"
        if not err.is_interactive:
            return lines.at(done, total, about)
        if bar is None:
            bar = _bar(units)
            bar.add_task(f"{what:<12}", total=total, about="")
            bar.start()
        bar.update(bar.task_ids[0], completed=done, total=total, about=about)
        if done == total:  # what follows may have a bar of its own
            bar.stop()
            bar = None
        return None

    try:
        yield tell
    finally:
        if bar is not None:
            bar.stop()


class Lines:
    """Progress where nothing can be drawn over, in a log or a pipe: plain lines, ten seconds apart or more. The clock
    starts when it is first told what is done."""

    def __init__(self, what: str, units: str):
        self.what, self.units = what, units
        self.first: int | None = None

    def at(self, done: int, total: int, about: str) -> None:
        """Tell that `done` of `total` are done; prints no more than a line in ten seconds."""
        now = time.monotonic()
        if self.first is None or done <= self.first:
            self.first, self.start, self.last = done, now, now
        if now - self.last < EVERY or os.environ.get("RANK", "0") != "0":  # one process speaks for all
            return
        self.last, spent = now, now - self.start
        left = spent / (done - self.first) * (total - done)
        say(f"{self.what}: {done} of {total} {self.units}{about}, {clock(spent)} elapsed, {clock(left)} left")


def clock(seconds: float) -> str:
    """Seconds as 0:07, 12:05 or 3:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _bar(units: str) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        *([BarColumn()] if err.width >= 80 else []),  # the time left goes before it
        MofNCompleteColumn(),
        TextColumn(units + "{task.fields[about]}, elapsed", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
    )
