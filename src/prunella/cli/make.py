"""Commands that make a model: prune, heal, sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import command, say
from .app import MAKING, app
from .console import print_table, track, watcher
from .options import (
    HEAL,
    MAIN,
    MEASURE,
    RUN,
    TEXT,
    WHAT,
    Bos,
    Calibration,
    Evaluate,
    Format,
    Json,
    KeepZeros,
    Length,
    ModelName,
    Order,
    Out,
    OwnDevice,
    Pickle,
    RecipeBits,
    RecipeDtype,
    RecipeGroup,
    RecipeHead,
    RecipeName,
    Resume,
    Revision,
    Samples,
    Seed,
    Set,
    Skip,
    Steps,
    Tokenizer,
    Train,
    Trust,
    Windows,
    complete_from,
    flag,
    methods_of,
    of,
    patterns,
    settings_of,
    share_of,
    source,
)

if TYPE_CHECKING:
    from ..report import Report


@app.command(rich_help_panel=MAKING)
def prune(
    model: ModelName,
    output: Out,
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    step: Steps = None,
    sparsity: Annotated[
        list[str] | None,
        of(
            WHAT,
            metavar="SHARE",
            help="Share to prune, or LAYERS=SHARE for some layers; repeat.",
            default="0.5",
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        of(
            WHAT,
            metavar="PATTERN",
            help="unstructured, N:M (N kept of M) or RxC blocks.",
            default="unstructured",
            autocompletion=patterns,
        ),
    ] = None,
    skip: Skip = None,
    keep_zeros: KeepZeros = None,
    allocate: Annotated[
        str | None,
        of(
            WHAT,
            metavar="NAME",
            help="How sparsity is spread over layers.",
            default="uniform",
            autocompletion=methods_of("allocation"),
        ),
    ] = None,
    order: Order = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    heal: Train = None,
    evaluate: Evaluate = None,
    windows: Windows = None,
    bos: Bos = None,
    format_: Format = None,
    bits: RecipeBits = None,
    group: RecipeGroup = None,
    round_head: RecipeHead = None,
    dtype: RecipeDtype = None,
    recipe: RecipeName = None,
    set_: Set = None,
    device: OwnDevice = None,
    seed: Seed = None,
    resume: Resume = False,
    json_: Json = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Prune MODEL in one shot and save what is left, measured."""
    from .. import prune as run
    from ..recipe import Recipe, only_dense, override

    values = Recipe.read(recipe) if recipe else {}
    flags: dict[str, Any] = {
        "model": model,
        "steps": step,
        "pattern": pattern,
        "skip": skip,
        "keep_zeros": keep_zeros,
        "allocate": allocate,
        "order": order,
        "bos": bos,
        "format": format_,
        "bits": bits,
        "group": group,
        "round_head": round_head,
        "dtype": dtype,
        "device": device,
        "seed": seed,
    }
    values |= {key: value for key, value in flags.items() if value is not None}
    if pattern is not None and ":" in pattern:  # it fixes what each layer loses, whatever the recipe had
        if not sparsity:
            values["sparsity"] = only_dense(values.get("sparsity"))
        if allocate is None:
            values.pop("allocate", None)
    settings = settings_of(
        {
            "calibration.source": calibration,
            "calibration.samples": samples,
            "calibration.length": length,
            "heal.train": heal,
            "evaluate.source": evaluate,
            "evaluate.windows": windows,
        }
    )
    settings += [f"sparsity.{item}" if "=" in item else f"sparsity.*={item}" for item in sparsity or []]
    wanted = Recipe.of(override(values, [*settings, *(set_ or [])]))
    with watcher() as watch:
        report = run(
            model,
            wanted,
            output=output,
            tokenizer=tokenizer,
            revision=revision,
            resume=resume,
            track=track,
            watch=watch,
            remote_code=trust_remote_code,
            pickles=allow_pickle,
        )
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
def heal(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A pruned model.")],
    output: Out,
    train: Annotated[
        list[str] | None,
        of(
            HEAL,
            metavar="NAME",
            help="What trains; repeat. `prunella methods` lists it.",
            default="mask-lora",
            autocompletion=methods_of("healing"),
        ),
    ] = None,
    way: Annotated[
        str | None,
        of(
            HEAL,
            metavar="retrain|reconstruct",
            help="retrain: the whole model on text; reconstruct: block by block, to the dense one.",
            default="retrain",
            autocompletion=complete_from("retrain", "reconstruct"),
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        of(
            HEAL,
            metavar="TEXT",
            help="What to train on, as for --calibration of prune; repeat.",
            default="the calibration's",
            autocompletion=source,
        ),
    ] = None,
    tokens: Annotated[int | None, of(HEAL, metavar="N", help="Tokens to train on in all.", default="250000")] = None,
    length: Annotated[int | None, of(HEAL, metavar="TOKENS", help="Tokens in a window.", default="512")] = None,
    rate: Annotated[float | None, of(HEAL, metavar="RATE", help="Learning rate.", default="each method's own")] = None,
    distill: Annotated[
        float | None,
        of(
            HEAL,
            metavar="SHARE",
            help="Share of the loss that follows the dense model's predictions.",
            default="0",
        ),
    ] = None,
    dense: Annotated[
        str | None, of(HEAL, metavar="MODEL", help="The dense model.", default="the one that was pruned")
    ] = None,
    calibration: Annotated[
        str | None,
        of(
            TEXT,
            metavar="TEXT",
            help="Text for reconstruct and new-biases.",
            default="the pruning's",
            autocompletion=source,
        ),
    ] = None,
    samples: Annotated[int | None, of(TEXT, metavar="N", help="Windows of that text.", default="the pruning's")] = None,
    evaluate: Evaluate = None,
    windows: Windows = None,
    bos: Bos = None,
    recipe: Annotated[
        str | None,
        of(RUN, metavar="RECIPE", help="A named recipe or a YAML file; its `heal` section counts."),
    ] = None,
    set_: Set = None,
    device: OwnDevice = None,
    seed: Seed = None,
    resume: Resume = False,
    json_: Json = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Retrain a pruned model, the mask held, and save it exactly as sparse."""
    from ..heal.run import calibrated
    from ..heal.run import heal as run
    from ..recipe import Recipe, override

    values = calibrated(directory, Recipe.read(recipe) if recipe else {})
    settings = settings_of(
        {
            "heal.train": train,
            "heal.way": way,
            "heal.text": text,
            "heal.tokens": tokens,
            "heal.length": length,
            "heal.rate": rate,
            "heal.distill": distill,
            "heal.dense": dense,
            "calibration.source": calibration,
            "calibration.samples": samples,
            "evaluate.source": evaluate,
            "evaluate.windows": windows,
            "bos": bos,
            "device": device,
            "seed": seed,
        }
    )
    wanted = Recipe.of(override(values, [*settings, *(set_ or [])]))
    with watcher() as watch:
        report = run(
            directory,
            wanted,
            output=output,
            resume=resume,
            track=track,
            watch=watch,
            remote_code=trust_remote_code,
            pickles=allow_pickle,
        )
    if not report.healing:
        return  # one of several processes, and not the first
    if json_:
        print(json.dumps(report.plain()))
        return
    _print_healing(report)
    _print_saved(output, report)


def _print_saved(output: Path, report: Report) -> None:
    print(f"saved to {output}")
    if report.apart:  # which does not fit on packed weights
        print(f"the adapter lies in {output / 'adapter'}: PeftModel.from_pretrained(model, …) puts it on that model")
    elif report.recipe.get("format", "dense") == "dense":
        print(f"its zeros still take room and time: {command('pack', output)} -o DIR leaves them out")


def _print_healing(report: Report) -> None:
    print_table(("", "pruned", "healed"), report.healing_rows(), "healing")


@app.command(rich_help_panel=MAKING)
def sweep(
    model: ModelName,
    output: Annotated[
        Path,
        of(MAIN, "--output", "-o", metavar="DIR", help="Directory for the results; cells in it are kept."),
    ],
    revision: Revision = None,
    tokenizer: Tokenizer = None,
    step: Annotated[
        list[str] | None,
        of(
            WHAT,
            metavar="NAME[+NAME]",
            help="Steps of some cells, such as wanda+update; repeat for more cells.",
            default="sparsegpt",
            autocompletion=methods_of("step"),
        ),
    ] = None,
    sparsity: Annotated[
        list[str] | None,
        of(
            WHAT,
            metavar="SHARE",
            help="Share to prune; repeat for more cells. LAYERS=SHARE holds for some layers of all cells.",
            default="0.5",
        ),
    ] = None,
    pattern: Annotated[
        list[str] | None,
        of(
            WHAT,
            metavar="PATTERN",
            help="unstructured, N:M (N kept of M) or RxC blocks; repeat for more cells.",
            default="unstructured",
            autocompletion=patterns,
        ),
    ] = None,
    allocate: Annotated[
        list[str] | None,
        of(
            WHAT,
            metavar="NAME",
            help="How sparsity is spread over layers; repeat for more cells.",
            default="uniform",
            autocompletion=methods_of("allocation"),
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        of(WHAT, metavar="KEY=[VALUE, …]", help="Values for any other recipe key; repeat."),
    ] = None,
    skip: Skip = None,
    keep_zeros: KeepZeros = None,
    order: Order = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    heal: Train = None,
    text: Annotated[
        list[str] | None,
        of(
            MEASURE,
            "--text",
            "--evaluate",
            metavar="TEXT",
            help="Text to measure perplexity on, as for --calibration; repeat.",
            default="pydoc",
            autocompletion=source,
        ),
    ] = None,
    windows: Windows = None,
    bos: Bos = None,
    speed: Annotated[bool, flag(MEASURE, "--speed", help="Measure how fast each cell decodes packed, too.")] = False,
    format_: Format = None,
    bits: RecipeBits = None,
    group: RecipeGroup = None,
    round_head: RecipeHead = None,
    dtype: RecipeDtype = None,
    recipe: Annotated[
        str | None,
        of(RUN, metavar="FILE", help="A YAML file: a recipe, and under `grid` lists of values for its keys."),
    ] = None,
    set_: Annotated[
        list[str] | None, of(RUN, "--set", metavar="KEY=VALUE", help="A recipe key, for all cells; repeat.")
    ] = None,
    device: OwnDevice = None,
    seed: Seed = None,
    resume: Annotated[
        bool, flag(RUN, "--resume", help="What a sweep always does: make the cells that are missing.")
    ] = False,
    json_: Json = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Prune MODEL in every combination of some choices; run again, it makes the cells that are missing."""
    from ..cells import parse_grid
    from ..cells import sweep as run
    from ..model.names import at_revision
    from ..recipe import Recipe
    from ..report import bos_words

    axes: dict[str, list[Any] | None] = {
        "steps": [item.split("+") for item in step or []],
        "sparsity": [share_of(item) for item in sparsity or [] if "=" not in item],
        "pattern": pattern,
        "allocate": allocate,
    }
    settings = settings_of(
        {
            "skip": skip,
            "keep_zeros": keep_zeros,
            "order": order,
            "calibration.source": calibration,
            "calibration.samples": samples,
            "calibration.length": length,
            "heal.train": heal,
            "evaluate.windows": windows,
            "bos": bos,
            "format": format_,
            "bits": bits,
            "group": group,
            "round_head": round_head,
            "dtype": dtype,
            "device": device,
            "seed": seed,
        }
    )
    settings += [f"sparsity.{item}" for item in sparsity or [] if "=" in item]
    plan = Recipe.read(recipe) if recipe else {}
    grids = {key: values for key, values in axes.items() if values}
    results = run(
        at_revision(model, revision),
        parse_grid(plan, grids, grid or [], [*settings, *(set_ or [])]),
        output,
        texts=text,
        speed=speed,
        say=say,
        track=track,
        tokenizer=tokenizer,
        remote_code=trust_remote_code,
        pickles=allow_pickle,
    )
    if json_:
        print(json.dumps(results.rows))
    else:
        for name, dense in results.rows[0]["perplexity"].items():
            columns, rows = results.matrix(name)
            begin = bos_words(results.settings.get("bos", False))
            title = f"perplexity on {name}, windows {begin}, dense {dense:.2f}"
            print_table(columns, rows, title, right=columns[1:])
        print(f"saved to {output}")
    if results.failed:
        say(f"{len(results.failed)} cells failed; the same command tries them again")
        raise typer.Exit(2)
