"""Which of several ways to the same result is the fastest here, by what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

T = TypeVar("T")

_chosen: dict[Hashable, str] = {}
AGAIN = 3  # how often each way is tried


def fastest(key: Hashable, ways: Mapping[str, Callable[[], T]]) -> T:
    """The result of the fastest way, by what they took when this key was seen first."""
    if (chosen := _chosen.get(key, "")) in ways:
        return ways[chosen]()
    took = times(ways)
    _chosen[key] = min(took, key=took.__getitem__)
    return ways[_chosen[key]]()


def times(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The least seconds of each way, run in turns."""
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(AGAIN):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def forget() -> None:
    """Measure everything anew: other instructions are used, or another machine."""
    _chosen.clear()
