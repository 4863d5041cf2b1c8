"""The figure of a task, and the others beside it, as a report says them: read and put into words without the task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Figure:
    """What says how good a network is: perplexity, or what its task has in its place.

    name:   as tables say it
    value:  None where it was not measured
    error:  its standard error, where it is a mean over samples
    each:   the figure of each sample then; of a perplexity each window's negative log-likelihood
    higher: is more of it better?
    unit:   `%` of a share, or nothing
    """

    name: str = PERPLEXITY
    value: float | None = None
    error: float | None = None
    each: tuple[float, ...] = ()
    higher: bool = False
    unit: str = ""

    @classmethod
    def of(cls, side: Mapping[str, Any]) -> Figure:
        """From a side of a report: dense, pruned, before or after healing."""
        name = str(side.get("figure", PERPLEXITY))
        each = side.get("each") or side.get("nll" if name == PERPLEXITY else "losses" if name == "loss" else "each")
        return cls(
            name,
            side.get(name),
            side.get("error"),
            tuple(each or ()),
            bool(side.get("higher", False)),
            str(side.get("unit", "")),
        )

    @property
    def title(self) -> str:
        """Its name at the beginning of a sentence."""
        return self.name[:1].upper() + self.name[1:]

    @property
    def scale(self) -> float:
        """By what it is multiplied to be shown."""
        return 100.0 if self.unit == "%" else 1.0

    def say(self, value: float | None, error: float | None = None, digits: int | None = None) -> str:
        """A value of it, with its standard error if there is one: `88.0 ± 1.5 %`."""
        if value is None:
            return "not measured"
        if self.name == PERPLEXITY:
            return f"{value:.{2 if digits is None else digits}f}"
        if self.unit == "%":
            within = "" if error is None else f" ± {100 * error:.{1 if digits is None else digits}f}"
            return f"{100 * value:.{1 if digits is None else digits}f}{within} %"
        number = f"{value:.4g}" if digits is None else f"{value:.{digits}f}"
        return number if error is None else f"{number} ± {error:.2g}"

    def change(self, before: Figure) -> str:
        """By how much it is more than before, in words: points of a share, of anything else the part of what it was."""
        if self.value is None or before.value is None or self.name != before.name:
            return ""
        if self.unit == "%":
            return f"{100 * (self.value - before.value):+.1f} points"
        return f"{self.value / before.value - 1:+.1%}" if before.value > 0 else ""

    def beside(self, before: Figure) -> str:
        """In words, beside what it was before; of a perplexity only itself."""
        change = "" if self.name == PERPLEXITY else self.change(before)
        return str(self) + (f" ({change})" if change else "")

    def better(self, other: Figure) -> bool:
        """Is it better than another one?"""
        if self.value is None or other.value is None:
            return False
        return self.value > other.value if self.higher else self.value < other.value

    def __str__(self) -> str:
        return self.say(self.value, self.error)


def more_of(side: Mapping[str, Any]) -> dict[str, str]:
    """The other scores that a table shows, {name: value in words}, as `more` says with their units."""
    return {
        name: Figure(name, unit=unit).say(side[name])
        for name, unit in side.get("more", {}).items()
        if side.get(name) is not None
    }


def label(side: Mapping[str, Any]) -> str:
    """The figure of a side and on what it was measured: the first cell of its row."""
    figure = Figure.of(side)
    if figure.value is None:
        return figure.name
    source = Path(side["source"]).name if side["source"] else ""
    count = f"{side['samples']} samples" if "figure" in side else f"{side['windows']} windows of {side['length']}"
    said = filter(None, (source, count, bos_words(side.get("bos"))))
    return f"{figure.name} ({', '.join(said)})"


def bos_words(bos: bool | None) -> str:
    """How the windows of a perplexity begin, in words; none for an older report, which does not say."""
    return "" if bos is None else "each with BOS" if bos else "without BOS"
