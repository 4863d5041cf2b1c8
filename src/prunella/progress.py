"""How a run tells how far it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Track = Callable[[Iterable[int], str, int], Iterable[int]]
OnStep = Callable[[int, int, float | None], None]  # of training: steps done, steps in all, the loss of the last


def no_track(items: Iterable[int], description: str, total: int) -> Iterable[int]:
    """Show no progress."""
    return items
