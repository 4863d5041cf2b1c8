"""Things that are timed in turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Times:
    """Seconds that calls took, sorted."""

    seconds: tuple[float, ...]

    def quantile(self, share: float) -> float:
        return self.seconds[min(int(share * len(self.seconds)), len(self.seconds) - 1)]

    def plain(self) -> dict[str, float]:
        """The least, the quartiles around the median, and how many calls there were."""
        shares = {"min": 0.0, "low": 0.25, "median": 0.5, "high": 0.75}
        return {**{name: self.quantile(share) for name, share in shares.items()}, "calls": len(self.seconds)}


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, Times]:
    """Times of several functions.

    In each round each has its turn: so many calls as fit into its share of `seconds`, one at least; where they are
    short, one before them warms caches and threads up, and does not count. Every other round goes the other way round.
    Before the first each is called once. A function that gives back a float has timed itself, in another process say.
    """
    taken = {name: [_timed(run)] for name, run in runs.items()}
    for number in range(rounds):
        for name in [*runs][:: -1 if number % 2 else 1]:
            if min(taken[name]) < seconds:
                runs[name]()
            end = time.perf_counter() + seconds
            while True:
                taken[name].append(_timed(runs[name]))
                if time.perf_counter() >= end:
                    break
    return {name: Times(tuple(sorted(found[1:]))) for name, found in taken.items()}


def _timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    found = run()
    return found if isinstance(found, float) else time.perf_counter() - start
