"""A schedule of a third party: sparsity grows cubically, with new masks every few steps."""

from __future__ import annotations

from pydantic import PositiveInt

from prunella.train.schedule import Schedule, register_schedule


class Cubic(Schedule):
    """Masks move at steps 0, k, 2k, …; the last quarter of the steps only trains."""

    def __init__(self, steps: int, every: int):
        super().__init__(steps)
        self.every, self.last = every, max(0, (3 * steps // 4 - 1) // every * every)
        self.seen: list[int] = []

    def sparsity(self, t: int) -> float | None:
        if t > self.last or t % self.every:
            return None
        self.seen.append(t)
        return 1 - (1 - (t + 1) / (self.last + 1)) ** 3

    def rate(self, t: int) -> float:
        return 1 - t / self.steps

    def final(self, t: int) -> str | None:
        return "final" if t > self.last else None

    def state(self) -> dict[str, list[int]]:
        return {"seen": self.seen}

    def load(self, state: dict[str, list[int]]) -> None:
        self.seen = list(state["seen"])


@register_schedule("cubic")
def cubic(steps: int, *, every: PositiveInt = 2) -> Schedule:
    """Sparsity grows as 1 - (1 - t/T)^3.

    Args:
        every: steps between new masks.
    """
    return Cubic(steps, every)
