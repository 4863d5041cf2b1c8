"""What came out of a sweep, as tables and plots: CSV, HTML, PNG and SVG."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..rows import Row
from . import charts
from .charts import Mark
from .figure import Figure
from .page import Drawing, render, write_text


@dataclass(frozen=True)
class Results:
    """The rows of a sweep, the dense one first."""

    settings: Mapping[str, Any]
    rows: tuple[Row, ...]

    @property
    def done(self) -> list[Row]:
        return [row for row in self.rows[1:] if "failed" not in row]

    @property
    def failed(self) -> list[Row]:
        return [row for row in self.rows[1:] if "failed" in row]

    def figure(self, text: str) -> Figure:
        """What is measured on a text or other source, of the dense model."""
        return figure_of(self.rows[0], text)

    def matrix(self, text: str) -> tuple[list[str], list[list[str]]]:
        """The figure on a source, methods by cells: the column names, and a line for each method."""
        methods = dict.fromkeys(row["method"] for row in self.rows[1:])
        columns = list(dict.fromkeys(row["cell"] for row in self.rows[1:]))
        found = {(row["method"], row["cell"]): row for row in self.rows[1:]}

        def value(row: Row | None) -> str:
            return "" if row is None else "failed" if "failed" in row else str(figure_of(row, text))

        return ["method", *columns], [[m, *(value(found.get((m, c))) for c in columns)] for m in methods]

    def marks(self, text: str, speed: bool = False) -> list[Mark]:
        """The figure against MB of packed weights, or against tokens decoded a second, dense and all cells."""
        dense, marks = self.rows[0], []

        def height(row: Row) -> float:
            figure = figure_of(row, text)
            return figure.scale * (figure.value or 0.0)

        measured = next((row["speed"]["dense"]["decode"] for row in self.done if "speed" in row), None)
        first = measured if speed else dense.get("size", 0) / 1e6
        if first:
            marks.append(Mark("dense", "dense", first, height(dense)))
        for row in self.done:
            at = row.get("speed", {}).get("packed", {}).get("decode") if speed else row.get("size", 0) / 1e6
            if at:
                marks.append(Mark(f"{row['method']}, {row['cell']}", row["method"], at, height(row)))
        return marks

    def plots(self) -> list[tuple[Drawing, list[Mark], list[Mark]]]:
        """Each Pareto plot, with its marks and those that no other beats."""
        out = []
        for text in self.settings["text"]:
            figure = self.figure(text)
            y = " ".join(filter(None, (figure.name, figure.unit)))
            for speed, x in ((False, "MB of weights, packed"), (True, "tokens decoded a second, packed")):
                marks = self.marks(text, speed)
                if len(marks) > 1:
                    best = charts.front(marks, more_is_better=speed, higher=figure.higher)
                    title = f"{figure.title} on {text} against {x}"
                    svg = charts.scatter(title, marks, best, x, y, log=not figure.higher)
                    legend = charts.legend(dict.fromkeys(mark.group for mark in marks))
                    out.append((Drawing(f"{text}: {figure.name} against {x.split(',')[0]}", svg, legend), marks, best))
        return out

    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Every number: the column names, and a line a cell."""
        texts = self.settings["text"]
        speeds = any("speed" in row for row in self.rows)
        head = ["method", "cell", *(f"{self.figure(text).name} {text}" for text in texts)]
        head += ["sparsity", "size_bytes", "error", "seconds", "cpu_seconds"]
        head += [*(["decode_tokens_per_second"] if speeds else []), "failed"]
        lines = []
        for row in self.rows:
            line = [row["method"], row["cell"], *(figure_of(row, text).value for text in texts)]
            line += [row.get(key) for key in ("sparsity", "size", "error", "seconds", "cpu_seconds")]
            line += [row.get("speed", {}).get("packed", {}).get("decode")] if speeds else []
            lines.append([*line, row.get("failed")])
        return head, lines

    def write(self, directory: Path) -> None:
        """table.csv, sweep.html and, where matplotlib is installed, each Pareto plot as PNG and SVG."""
        head, lines = self.table()
        text = io.StringIO()
        csv.writer(text).writerows([head, *lines])
        write_text(directory / "table.csv", text.getvalue())
        plots = self.plots()
        page = render(
            "sweep.html",
            settings=self.settings,
            name=Path(self.settings["model"]).name,
            measured={text: (self.figure(text).name, str(self.figure(text))) for text in self.settings["text"]},
            drawings=[drawing for drawing, _, _ in plots],
            matrices=[(self.figure(name), name, *self.matrix(name)) for name in self.settings["text"]],
            head=[name.replace("_", " ") for name in head[:-1]],
            lines=[[_shown(value) for value in line[:-1]] for line in lines if line[-1] is None],
            failed=[(f"{row['method']}, {row['cell']}", row["failed"]) for row in self.failed],
        )
        write_text(directory / "sweep.html", page)
        with contextlib.suppress(ImportError):
            for number, (drawing, marks, best) in enumerate(plots):
                _draw(drawing.title, marks, best, directory / f"pareto{number or ''}")


def figure_of(row: Row, text: str) -> Figure:
    """What a cell has on a text or other source."""
    if "scores" in row:
        return Figure.of(row["scores"].get(text, {}))
    return Figure.of({"perplexity": row.get("perplexity", {}).get(text)})


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 1 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else value or ""


def _draw(title: str, marks: Sequence[Mark], best: Sequence[Mark], path: Path) -> None:
    """The plot as PNG and SVG, for papers and other pages. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for group in dict.fromkeys(mark.group for mark in marks):
        own = [mark for mark in marks if mark.group == group]
        axes.plot([mark.x for mark in own], [mark.y for mark in own], "o", label=group)
    axes.plot([mark.x for mark in best], [mark.y for mark in best], ":", color="grey", zorder=0)
    for mark in best:
        axes.annotate(mark.label, (mark.x, mark.y), xytext=(5, 5), textcoords="offset points", fontsize=8)
    if max(mark.y for mark in marks) > 5 * min(mark.y for mark in marks):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(title)
    axes.set_xlabel(title.rpartition("against ")[2])
    axes.set_ylabel(title.rpartition(" against ")[0].rpartition(": ")[2])
    longest = max(len(mark.group) for mark in marks)
    figure.legend(fontsize=8, loc="outside lower center", ncols=max(1, 110 // (longest + 6)))
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix), dpi=150)
