"""Commands that look at what was made and measure it: eval, inspect, report, compare, methods."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import SEEING, app
from .console import print_table, track
from .options import MAIN, MEASURE, OPENING, PLACE, PRUNING, SOURCES, TRUST, Json, ModelName, ask, grouped, of

MEASURING = (
    ask(
        MEASURE,
        "--text TEXT …",
        "texts",
        f"What to measure on: {SOURCES}, or what else the task reads; repeat. [default: pydoc, or the task's own; with"
        " tasks none]",
    ),
    ask(
        MEASURE,
        "--length TOKENS",
        "length",
        "Of text: tokens in a window. [default: 2048, or the model's context]",
        min=2,
    ),
    ask(
        MEASURE,
        "--windows N",
        "windows",
        "The first so many windows, or samples. [default: all; of c4 and hf:… 256]",
        min=1,
    ),
    ask(MEASURE, "--task NAME", "task", "What the network is for. [default: as its files say]"),
    *(option for option in PRUNING if option.key == "bos"),
    ask(MEASURE, "--tasks NAMES", "tasks", "Tasks of lm-eval: arc_easy,piqa …"),
    ask(MEASURE, "--tasks-file FILE …", "files", "JSON lines with query, choices and gold, for lm-eval; repeat."),
    ask(MEASURE, "--limit N", "limit", "The first so many questions of each task. [default: all]", min=1),
    ask(MEASURE, "--beside MODEL", "beside", "Compare with this model, the dense one say."),
)


@app.command("eval", rich_help_panel=SEEING)
@grouped
def evaluate_(
    model: ModelName,
    *,
    opening: Annotated[dict[str, Any], OPENING],
    given: Annotated[dict[str, Any], (*MEASURING, *PLACE)],
    json_: Json = False,
    trust: Annotated[dict[str, Any], TRUST],
) -> None:
    """Measure MODEL: perplexity on texts, in consecutive windows each scored on its own; accuracy on tasks; of what is
    no language model the scores of its task."""
    from ..evaluate.score import score
    from ..model.names import at_revision
    from ..report import bos_words

    tasks = [name.strip() for name in given.pop("tasks", "").split(",") if name.strip()]
    texts = given.pop("texts", None)
    name = at_revision(model, opening.pop("revision", None))
    result = score(name, texts, tasks, track=track, **given, **opening, **trust)
    beside = given.get("beside")
    if json_:
        print(json.dumps(result))
        return
    for found in result.get("sources", ()):
        _print_source(found, beside, result["dtype"])
    for found in result.get("texts", ()):
        cut = f"{found['windows']} windows of {found['length']} tokens {bos_words(found['bos'])}"
        about = f"({found['text']}, {cut}, {result['dtype']})"
        print(f"perplexity {found['perplexity']:.3f}  {about}")
        if beside:
            apart = found["difference"]
            print(
                f"           {found['beside']['perplexity']:.3f}  {beside}: {apart['difference']:+.3f}, 95% between"
                f" {apart['low']:+.3f} and {apart['high']:+.3f}"
            )
    if result.get("tasks"):
        columns = ["task", "questions", "metric", *([Path(beside).name] if beside else []), Path(model).name]
        columns += ["changed"] if beside else []  # answers
        rows = []
        for found in result["tasks"]:
            for metric, value in found["metrics"].items():
                sides = [found["beside"]["metrics"][metric], value] if beside else [value]
                changed = [f"{found['changed']:.1%}"] if beside else []
                shown = [_with_error(side["value"], side["stderr"]) for side in sides]
                rows.append((found["task"], str(found["questions"]), metric, *shown, *changed))
        title = f"accuracy, requests {bos_words(result['tasks'][0]['bos'])}"
        print_table(columns, rows, title, right=[name for name in columns if name not in ("task", "metric")])
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def _print_source(found: Mapping[str, Any], beside: str | None, dtype: str) -> None:
    """What a task says of a model on one source, and of the one beside it: the figure, then what else it counts."""
    from ..report import Figure
    from ..report.figure import more_of

    figure, more = Figure.of(found), more_of(found)
    about = ", ".join(filter(None, (Path(found["source"]).name, f"{found['samples']} samples", dtype)))
    print(f"{figure.name} {figure}  ({about})")
    if beside is not None:
        other, apart = Figure.of(found["beside"]), found.get("difference")
        points = " points" if figure.unit else ""
        values = [figure.scale * apart[key] for key in ("difference", "low", "high")] if apart else []
        form = "+.1f" if figure.unit else "+.4g"
        said = f": {values[0]:{form}}{points}, 95% between {values[1]:{form}} and {values[2]:{form}}" if values else ""
        print(f"{' ' * len(figure.name)} {other}  {beside}{said}")
        theirs = more_of(found["beside"])
        more = {name: value + (f", beside {theirs[name]}" if name in theirs else "") for name, value in more.items()}
    for name, value in more.items():
        print(f"  {name} {value}")


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


@app.command(rich_help_panel=SEEING)
def inspect(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A model directory, pruned or not.")],
    json_: Json = False,
) -> None:
    """Per-layer sparsity, pattern and size, read from the files themselves."""
    from ..inspect import inspect as look

    found = look(directory)
    if json_:
        print(json.dumps([row.plain() for row in found]))
        return
    columns = ("layer", "shape", "zeros", "pattern", "MB", "error", "notes")
    print_table(columns, (row.cells() for row in found), directory, right=("shape", "zeros", "MB", "error"))
    weights, zeros = sum(r.weights for r in found), sum(r.zeros for r in found)
    size, layers = sum(r.nbytes for r in found), sum(not r.why for r in found)
    beside = f" and {len(found) - layers} matrices beside them" if len(found) > layers else ""
    print(f"{layers} layers{beside}, {weights / 1e6:,.1f} M weights, {zeros / weights:.2%} zeros, {size / 1e6:,.1f} MB")


@app.command(rich_help_panel=SEEING)
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned model.")],
    output: Annotated[
        Path | None, of(MAIN, "--output -o FILE", "The page to write. [default: DIR/report.html]")
    ] = None,
) -> None:
    """Write a page of HTML that shows what was done to a pruned model; it needs no network."""
    from ..report.page import write_page

    print(f"saved to {write_page(directory, output)}")


@app.command(rich_help_panel=SEEING)
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Pruned models.")],
    html: Annotated[Path | None, of(MAIN, "--html FILE", "Write a page of HTML as well.")] = None,
    json_: Json = False,
) -> None:
    """Pruned models side by side: what was done to each and what it measured."""
    from ..report.compare import Comparison
    from ..report.page import write_text

    found = Comparison.read(directories)
    if html is not None:
        write_text(html, found.page())
    if json_:
        print(json.dumps(found.plain()))
        return
    print_table(("", "dense", *found.names), found.rows())


@app.command(rich_help_panel=SEEING)
def methods(json_: Json = False) -> None:
    """Every step, allocation, healing method and task, with a line and the options of each."""
    from ..catalogue import entries

    if json_:
        print(json.dumps([asdict(entry) for entry in entries()]))
        return
    rows = (
        (entry.kind, entry.name, entry.summary, ", ".join(f"{key}={value}" for key, value in entry.options.items()))
        for entry in entries()
    )
    print_table(("kind", "name", "what it does", "options"), rows)
