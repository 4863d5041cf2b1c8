"""Commands that make a model: prune, heal, sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import command, say
from .app import MAKING, app
from .console import meter, print_table, track
from .options import (
    HEALING,
    MAIN,
    MEASURE,
    OPENING,
    PRUNING,
    RUN,
    SWEEPING,
    TRUST,
    Json,
    ModelName,
    Out,
    Resume,
    grouped,
    of,
    settings_of,
    share_of,
)

if TYPE_CHECKING:
    from ..report import Report


@app.command(rich_help_panel=MAKING)
@grouped
def prune(
    model: ModelName,
    output: Out,
    *,
    opening: Annotated[dict[str, Any], OPENING],
    given: Annotated[dict[str, Any], PRUNING],
    resume: Resume = False,
    json_: Json = False,
    trust: Annotated[dict[str, Any], TRUST],
) -> None:
    """Prune MODEL in one shot and save what is left, measured."""
    from .. import prune as run
    from ..recipe import Recipe, only_dense, override

    values, extra = _plan(given)
    sparsity = given.pop("sparsity", [])
    flags = {key: given.pop(key) for key in list(given) if "." not in key}
    values |= {"model": model, **flags}
    if ":" in flags.get("pattern", ""):  # it fixes what each layer loses, whatever the recipe had
        if not sparsity:
            values["sparsity"] = only_dense(values.get("sparsity"))
        if "allocate" not in flags:
            values.pop("allocate", None)
    settings = settings_of(given)
    settings += [f"sparsity.{item}" if "=" in item else f"sparsity.*={item}" for item in sparsity]
    wanted = Recipe.of(override(values, [*settings, *extra]))
    with meter() as tell:
        report = run(model, wanted, output=output, resume=resume, track=track, watch=tell, **opening, **trust)
    if wanted.heal.train and not report.healing:
        return  # one of several processes, and not the first
    if json_:
        print(json.dumps(report.plain()))
        return
    steps = " + ".join(name for item in report.recipe["steps"] for name in item)
    print_table(("", "dense", "pruned"), report.rows(), f"{Path(report.model['name']).name}: {steps}")
    if report.healing:
        _print_healing(report)
    notes = report.notes()
    for note in notes[:10]:
        print(f"note: {note}")
    if len(notes) > 10:
        print(f"… and {len(notes) - 10} more notes: {command('inspect', output)}")
    _print_saved(output, report)


@app.command(rich_help_panel=MAKING)
@grouped
def heal(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="A pruned model, or a dense one of another task than text.")
    ],
    output: Out,
    *,
    given: Annotated[dict[str, Any], HEALING],
    resume: Resume = False,
    json_: Json = False,
    trust: Annotated[dict[str, Any], TRUST],
) -> None:
    """Retrain a pruned model, the mask held, and save it exactly as sparse; or train a dense one for its task."""
    from ..heal.report import calibrated
    from ..heal.run import heal as run
    from ..recipe import Recipe, override

    values, extra = _plan(given)
    wanted = Recipe.of(override(calibrated(directory, values), [*settings_of(given), *extra]))
    with meter() as tell:
        report = run(directory, wanted, output=output, resume=resume, track=track, watch=tell, **trust)
    if not report.healing:
        return  # one of several processes, and not the first
    if json_:
        print(json.dumps(report.plain()))
        return
    _print_healing(report)
    _print_saved(output, report)


@app.command(rich_help_panel=MAKING)
@grouped
def sweep(
    model: ModelName,
    output: Annotated[Path, of(MAIN, "--output -o DIR", "Directory for the results; cells in it are kept.")],
    *,
    opening: Annotated[dict[str, Any], OPENING],
    given: Annotated[dict[str, Any], SWEEPING],
    speed: Annotated[bool, of(MEASURE, "--speed", "Measure how fast each cell decodes packed, too.")] = False,
    resume: Annotated[bool, of(RUN, "--resume", "What a sweep always does: make the cells that are missing.")] = False,
    json_: Json = False,
    trust: Annotated[dict[str, Any], TRUST],
) -> None:
    """Prune MODEL in every combination of some choices; run again, it makes the cells that are missing."""
    from ..cells import complete_plan
    from ..cells import sweep as run
    from ..model.names import at_revision
    from ..report import bos_words

    plan, extra = _plan(given)
    sparsity = given.pop("sparsity", [])
    axes: dict[str, list[Any]] = {
        "steps": [item.split("+") for item in given.pop("steps", [])],
        "sparsity": [share_of(item) for item in sparsity if "=" not in item],
        "pattern": given.pop("pattern", []),
        "allocate": given.pop("allocate", []),
    }
    axes = {key: values for key, values in axes.items() if values}
    lists, texts = given.pop("grid", []), given.pop("evaluate.source", None)
    settings = [*settings_of(given), *(f"sparsity.{item}" for item in sparsity if "=" in item), *extra]
    name = at_revision(model, opening.pop("revision", None))
    plan = complete_plan(plan, axes, lists, settings)
    results = run(name, plan, output, texts=texts, speed=speed, say=say, track=track, **opening, **trust)
    if json_:
        print(json.dumps(results.rows))
    else:
        for text in results.settings["text"]:
            columns, rows = results.matrix(text)
            figure, words = results.figure(text), bos_words(results.settings.get("bos", False))
            begin = "" if "task" in results.settings else f", windows {words}"
            title = f"{figure.name} on {text}{begin}, dense {figure}"
            print_table(columns, rows, title, right=columns[1:])
        print(f"saved to {output}")
    if results.failed:
        say(f"{len(results.failed)} cells failed; the same command tries them again")
        raise typer.Exit(2)


def _plan(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The recipe that the flags change, and the settings of --set, which come last; taken out of what was given."""
    from ..recipe import Recipe

    recipe, settings = given.pop("recipe", None), given.pop("set", [])
    return Recipe.read(recipe) if recipe else {}, settings


def _print_healing(report: Report) -> None:
    print_table(("", "pruned", "healed"), report.healing_rows(), "healing")


def _print_saved(output: Path, report: Report) -> None:
    print(f"saved to {output}")
    if report.apart:  # which does not fit on packed weights
        print(f"the adapter lies in {output / 'adapter'}: PeftModel.from_pretrained(model, …) puts it on that model")
    elif report.recipe.get("format", "dense") == "dense" and not any(":" in task for task in report.recipe["task"]):
        print(f"its zeros still take room and time: {command('pack', output)} -o DIR leaves them out")
