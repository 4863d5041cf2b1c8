"""Which of several ways to the same result is the fastest here, by what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

T = TypeVar("T")

_chosen: dict[Hashable, str] = {}
AGAIN = 3  # how often each way is tried


def fastest(key: Hashable, ways: Mapping[str, Callable[[], T]]) -> T:
    """The result of the fastest way. The first time that a key is seen all of them are run, in turns; later the one
    that took the least time then."""
    if (chosen := _chosen.get(key, "")) in ways:
        return ways[chosen]()
    best = dict.fromkeys(ways, float("inf"))
    results = {}
    for _ in range(AGAIN):
        for name, way in ways.items():
            start = time.perf_counter()
            results[name] = way()
            best[name] = min(best[name], time.perf_counter() - start)
    _chosen[key] = min(best, key=best.__getitem__)
    return results[_chosen[key]]


def forget() -> None:
    """Measure everything anew: other instructions are used, or another machine."""
    _chosen.clear()
