"""Commands that look at what was made and measure it: eval, inspect, report, compare, methods."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .app import SEEING, app
from .console import print_table, track
from .options import (
    MAIN,
    MEASURE,
    SOURCES,
    Bos,
    Device,
    Dtype,
    Json,
    ModelName,
    Pickle,
    Revision,
    Tokenizer,
    Trust,
    of,
    source,
)


@app.command("eval", rich_help_panel=SEEING)
def evaluate_(
    model: ModelName,
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    text: Annotated[
        list[str] | None,
        of(
            MEASURE,
            metavar="TEXT",
            help=f"What to measure perplexity on: {SOURCES}; repeat.",
            default="pydoc, or with tasks none",
            autocompletion=source,
        ),
    ] = None,
    length: Annotated[
        int | None,
        of(MEASURE, metavar="TOKENS", min=2, help="Tokens in a window.", default="2048, or the model's context"),
    ] = None,
    windows: Annotated[
        int | None,
        of(MEASURE, metavar="N", min=1, help="The first so many windows.", default="all; of c4 and hf:… 256"),
    ] = None,
    bos: Bos = None,
    tasks: Annotated[str | None, of(MEASURE, metavar="NAMES", help="Tasks of lm-eval: arc_easy,piqa …")] = None,
    tasks_file: Annotated[
        list[Path] | None,
        of(MEASURE, metavar="FILE", help="JSON lines with query, choices and gold, for lm-eval; repeat."),
    ] = None,
    limit: Annotated[
        int | None,
        of(MEASURE, metavar="N", min=1, help="The first so many questions of each task.", default="all"),
    ] = None,
    beside: Annotated[
        str | None, of(MEASURE, metavar="MODEL", help="Compare with this model, the dense one say.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_: Json = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Measure MODEL: perplexity on texts, in consecutive windows each scored on its own; accuracy on tasks."""
    from ..evaluate.score import score
    from ..model.names import at_revision
    from ..report import bos_words

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    result = score(
        at_revision(model, revision),
        text or ([] if names or tasks_file else ["pydoc"]),
        names,
        tasks_file or [],
        beside=beside,
        length=length,
        windows=windows,
        limit=limit,
        bos=bos is not False,
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
        remote_code=trust_remote_code,
        pickles=allow_pickle,
        track=track,
    )
    if json_:
        print(json.dumps(result))
        return
    for found in result["texts"]:
        cut = f"{found['windows']} windows of {found['length']} tokens {bos_words(found['bos'])}"
        about = f"({found['text']}, {cut}, {result['dtype']})"
        print(f"perplexity {found['perplexity']:.3f}  {about}")
        if beside:
            apart = found["difference"]
            print(
                f"           {found['beside']['perplexity']:.3f}  {beside}: {apart['difference']:+.3f}, 95% between"
                f" {apart['low']:+.3f} and {apart['high']:+.3f}"
            )
    if result["tasks"]:
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
        Path | None,
        of(MAIN, "--output", "-o", metavar="FILE", help="The page to write.", default="DIR/report.html"),
    ] = None,
) -> None:
    """Write a page of HTML that shows what was done to a pruned model; it needs no network."""
    from ..page import write_page

    print(f"saved to {write_page(directory, output)}")


@app.command(rich_help_panel=SEEING)
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Pruned models.")],
    html: Annotated[Path | None, of(MAIN, metavar="FILE", help="Write a page of HTML as well.")] = None,
    json_: Json = False,
) -> None:
    """Pruned models side by side: what was done to each and what it measured."""
    from ..compare import Comparison
    from ..page import write_text

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
