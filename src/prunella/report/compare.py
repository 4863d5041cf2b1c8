"""Finished runs side by side, from their reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .page import render, title_of_steps, worst
from .report import Report, trained_on


@dataclass(frozen=True)
class Comparison:
    """Reports and the names they go by."""

    names: tuple[str, ...]
    reports: tuple[Report, ...]

    @classmethod
    def read(cls, directories: Sequence[str | Path]) -> Comparison:
        """Raises ModelError for a directory without a report."""
        reports = tuple(Report.read(directory) for directory in directories)
        paths = [Path(directory).resolve() for directory in directories]
        short = [path.name for path in paths]
        names = [n if short.count(n) == 1 else str(d) for n, d in zip(short, directories, strict=True)]
        return cls(tuple(names), reports)

    def rows(self) -> list[tuple[str, ...]]:
        """What each run was, then what it measured: (what, dense, a value for each run). The dense column holds
        what all runs agree on; where they do not, each value says its own dense one."""
        out: list[tuple[str, ...]] = [
            ("model", "", *(Path(r.model["name"]).name for r in self.reports)),
            ("steps", "", *(title_of_steps(r.recipe["steps"]) for r in self.reports)),
            ("pattern", "", *(r.recipe["pattern"] for r in self.reports)),
            ("allocation", "", *(" + ".join(r.recipe["allocate"]) for r in self.reports)),
            ("calibration", "", *(self._calibration(r) for r in self.reports)),
        ]
        if any(r.healing for r in self.reports):
            out.append(("healing", "", *(self._healing(r) for r in self.reports)))
        measured = [{what: (dense, value) for what, dense, value in r.outcome()} for r in self.reports]
        for what in dict.fromkeys(what for found in measured for what in found):
            pairs = [found.get(what, ("", "")) for found in measured]
            dense = {before for before, after in pairs if after}
            if len(dense) == 1:
                out.append((what, *dense, *(after for _, after in pairs)))
            else:
                out.append((what, "", *(f"{after} (dense {before})" if before else after for before, after in pairs)))
        lost = [worst(r.layers)[:1] for r in self.reports]
        out.append(("layer that lost most", "", *(f"{la[0].name}: {la[0].error:.4f}" if la else "" for la in lost)))
        return out

    @staticmethod
    def _calibration(report: Report) -> str:
        wanted = report.recipe["calibration"]
        length = f" x {wanted['length']}" if wanted["length"] else ""
        return f"{report.calibration()[1] or 'handed over'}, {wanted['samples']}{length}"

    @staticmethod
    def _healing(report: Report) -> str:
        did = report.healing
        if not did:
            return ""
        what, _, many = trained_on(did)
        return f"{title_of_steps(did['recipe']['train'])}, {many} {what}"

    def plain(self) -> list[dict[str, Any]]:
        """The reports without their layers."""
        out = []
        for name, report in zip(self.names, self.reports, strict=True):
            data = report.plain()
            del data["layers"]
            out.append({"name": name, **data})
        return out

    def page(self) -> str:
        """As HTML."""
        return render("compare.html", names=self.names, rows=self.rows())
