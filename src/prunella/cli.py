"""The command line: parse, call, print."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .native import keep_freed_memory

if TYPE_CHECKING:
    from rich.progress import Progress

    from .report import Report

app = typer.Typer(
    name="prunella",
    help="Prune a language model, and see what is left of it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, directory, .gguf file, or the built-in smollm2-135m.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …; auto: cuda where there is one.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: as the model is stored.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON in place of tables.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python that comes with the model.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read weights that only come as pickles.")]
# Of prune and heal: what is not given is the recipe's.
Evaluate = Annotated[str | None, typer.Option(help="Text for the perplexities, or none.")]
Windows = Annotated[int | None, typer.Option(help="Windows of that text.")]
Bos = Annotated[
    bool | None,
    typer.Option("--bos/--no-bos", help="Begin every window with a BOS where the tokenizer does. [default: --bos]"),
]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe key.")]
OwnDevice = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"prunella {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    if debug:
        os.environ["PRUNELLA_DEBUG"] = "1"


def track(items: Iterable[int], description: str, total: int) -> Iterator[int]:
    """A progress bar over blocks."""
    with _progress("blocks") as progress:
        yield from progress.track(items, total=total, description=f"{description:<12}")


@app.command()
def prune(
    model: ModelName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the pruned model.")],
    step: Annotated[
        list[str] | None,
        typer.Option(help="A step; repeat for several in a row. See `prunella methods`. [default: sparsegpt]"),
    ] = None,
    sparsity: Annotated[
        list[str] | None,
        typer.Option(help="Share to prune, or LAYERS=SHARE for some layers; repeat. [default: 0.5]"),
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="unstructured, N:M (N kept of M) or RxC blocks.")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Layers that stay dense, by name pattern; repeat.")] = None,
    allocate: Annotated[str | None, typer.Option(help="How sparsity is spread over layers.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="pydoc, self, c4, wikitext2, hf:…, or a file: .txt, .jsonl, .parquet …")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Windows of calibration text.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    order: Annotated[
        str | None, typer.Option(help="block: statistics of the dense block; layer: of what each layer really sees.")
    ] = None,
    heal: Annotated[
        list[str] | None, typer.Option(help="Retrain afterwards: what trains; repeat. See `prunella methods`.")
    ] = None,
    evaluate: Evaluate = None,
    windows: Windows = None,
    bos: Bos = None,
    format_: Annotated[
        str | None, typer.Option("--format", help="dense, or packed: saved without the zeros. [default: dense]")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="Round packed weights to 8 or 4 bits.")] = None,
    group: Annotated[int | None, typer.Option(help="Inputs that share a scale; 0: whole rows. [default: 128]")] = None,
    round_head: Annotated[
        bool | None, typer.Option("--round-head", help="With packed: embedding and output head in 8 bits.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Compute and save in this dtype. [default: as stored]")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="fast, balanced, best, healed-50, or a YAML file; flags go before it.")
    ] = None,
    set_: Set = None,
    device: OwnDevice = None,
    seed: Seed = None,
    resume: Resume = False,
    json_: Json = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Prune MODEL in one shot and save what is left, measured."""
    from . import prune as run
    from .recipe import Recipe, only_dense, override

    values = Recipe.read(recipe) if recipe else {}
    flags: dict[str, Any] = {
        "model": model,
        "steps": step,
        "pattern": pattern,
        "skip": skip,
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
    settings = _settings(
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
    table = Table(title=f"{Path(report.model['name']).name}: {steps}")
    table.add_column("")
    table.add_column("dense", overflow="fold")
    table.add_column("pruned", overflow="fold")
    for row in report.rows():
        table.add_row(*row)
    out.print(table)
    if report.healing:
        _print_healing(report)
    notes = report.notes()
    for note in notes[:10]:
        print(f"note: {note}")
    if len(notes) > 10:
        print(f"… and {len(notes) - 10} more notes: prunella inspect {output}")
    _print_saved(output, packed=wanted.packing is not None)


def _progress(units: str) -> Progress:
    """A progress bar with the time left on stderr; nothing where stderr is no terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{units}, elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=err,
        disable=not err.is_terminal,
    )


def _settings(flags: Mapping[str, Any]) -> list[str]:
    """Flags that were given, as KEY=VALUE settings of a recipe; `evaluate.source` may be none."""
    given = {key: value for key, value in flags.items() if value is not None}
    if given.get("evaluate.source") == "none":
        given["evaluate.source"] = None
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


@contextlib.contextmanager
def watcher() -> Iterator[Callable[[int, int, float | None], None]]:
    """A progress bar over training steps, with the loss."""
    with _progress("steps, loss {task.fields[loss]}") as progress:
        task = progress.add_task(f"{'healing':<12}", total=None, loss="", visible=False)

        def watch(step: int, steps: int, loss: float | None) -> None:
            shown = "" if loss is None else f"{loss:.3f}"
            progress.update(task, completed=step, total=steps, loss=shown, visible=True)

        yield watch


@app.command()
def heal(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A pruned model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the healed model.")],
    train: Annotated[
        list[str] | None,
        typer.Option(help="What trains; repeat. See `prunella methods`. [default: mask-lora]"),
    ] = None,
    way: Annotated[
        str | None,
        typer.Option(help="retrain: the whole model on text; reconstruct: block by block, to the dense one."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="What to train on: pydoc, c4, wikitext2, self, hf:…, or a file; repeat."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on in all. [default: 250000]")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a window. [default: 512]")] = None,
    rate: Annotated[float | None, typer.Option(help="Learning rate. [default: each method's own]")] = None,
    distill: Annotated[
        float | None, typer.Option(help="Share of the loss that follows the dense model's predictions.")
    ] = None,
    dense: Annotated[str | None, typer.Option(help="The dense model. [default: the one that was pruned]")] = None,
    calibration: Annotated[str | None, typer.Option(help="Text for reconstruct and new-biases.")] = None,
    samples: Annotated[int | None, typer.Option(help="Windows of that text.")] = None,
    evaluate: Evaluate = None,
    windows: Windows = None,
    bos: Bos = None,
    recipe: Annotated[
        str | None, typer.Option(help="A named recipe or a YAML file; its `heal` section counts.")
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
    from .heal.run import calibrated
    from .heal.run import heal as run
    from .recipe import Recipe, override

    values = calibrated(directory, Recipe.read(recipe) if recipe else {})
    settings = _settings(
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
    _print_saved(output)
    if (output / "adapter").is_dir():
        print(
            f"the adapter lies in {output / 'adapter'}: PeftModel.from_pretrained(model, …) puts it on the pruned model"
        )


def _print_saved(output: Path, packed: bool = False) -> None:
    print(f"saved to {output}")
    if not packed:
        print(f"its zeros still take room and time: prunella pack {output} -o DIR leaves them out")


def _print_healing(report: Report) -> None:
    table = Table(title="healing")
    for column in ("", "pruned", "healed"):
        table.add_column(column, overflow="fold")
    for row in report.healing_rows():
        table.add_row(*row)
    out.print(table)


@app.command("eval")
def evaluate_(
    model: ModelName,
    text: Annotated[
        list[str] | None,
        typer.Option(help="pydoc, wikitext2, c4, hf:…, or a file; repeat. [default: pydoc, or no text]"),
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in a window. [default: 2048, or the context]")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="The first so many windows. [default: all; of c4 and hf:… 256]")
    ] = None,
    bos: Bos = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval: arc_easy,piqa …")] = None,
    tasks_file: Annotated[
        list[Path] | None, typer.Option(help="JSON lines with query, choices and gold, for lm-eval; repeat.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many questions of each task.")] = None,
    beside: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Compare with this model, the dense one say.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_: Json = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Measure MODEL: perplexity on texts, in consecutive windows each scored on its own; accuracy on tasks."""
    from .report import bos_words
    from .score import score

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    result = score(
        model,
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
        remote_code=trust_remote_code,
        pickles=allow_pickle,
        track=track,
    )
    if json_:
        print(json.dumps(result))
        return
    for found in result["texts"]:
        windows_ = f"{found['windows']} windows of {found['length']} tokens {bos_words(found['bos'])}"
        about = f"({found['text']}, {windows_}, {result['dtype']})"
        print(f"perplexity {found['perplexity']:.3f}  {about}")
        if beside:
            apart = found["difference"]
            print(
                f"           {found['beside']['perplexity']:.3f}  {beside}: {apart['difference']:+.3f}, 95% between"
                f" {apart['low']:+.3f} and {apart['high']:+.3f}"
            )
    if result["tasks"]:
        table = Table(title=f"accuracy, requests {bos_words(result['tasks'][0]['bos'])}")
        for column in ("task", "questions", "metric", *([Path(beside).name] if beside else []), Path(model).name):
            table.add_column(column, justify="left" if column in ("task", "metric") else "right")
        if beside:
            table.add_column("changed", justify="right")  # answers
        for found in result["tasks"]:
            for metric, value in found["metrics"].items():
                sides = [found["beside"]["metrics"][metric], value] if beside else [value]
                changed = [f"{found['changed']:.1%}"] if beside else []
                shown = [_with_error(side["value"], side["stderr"]) for side in sides]
                table.add_row(found["task"], str(found["questions"]), metric, *shown, *changed)
        out.print(table)
    for warning in result["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Argument(help="What to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens.")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    seed: Annotated[int, typer.Option()] = 0,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Continue PROMPT, printing the text as it comes."""
    import torch
    from transformers import TextStreamer

    from .errors import InputError
    from .load import load_model
    from .measure import room

    opened = load_model(
        model, dtype=dtype, device=device, remote_code=trust_remote_code, pickles=allow_pickle, packed=True
    )
    tokenizer = opened.tokenizer
    if tokenizer is None:
        raise InputError(f"model '{model}' has no tokenizer, so it cannot read a prompt.")
    if chat:
        if not tokenizer.chat_template:
            raise InputError(f"model '{model}' has no chat template: leave --chat out.")
        message = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise InputError("the prompt is empty.")
    tokens = room(opened, inputs["input_ids"], tokens)
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with opened.whole() as network, torch.no_grad():
        network.generate(
            inputs["input_ids"].to(opened.device),
            attention_mask=inputs["attention_mask"].to(opened.device),
            max_new_tokens=tokens,
            streamer=TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True),
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            **sampling,
        )


@app.command()
def inspect(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A model directory, pruned or not.")],
    json_: Json = False,
) -> None:
    """Per-layer sparsity, pattern and size, read from the files themselves."""
    from .inspect import inspect as look

    found = look(directory)
    if json_:
        print(json.dumps([row.plain() for row in found]))
        return
    table = Table(title=directory)
    for name in ("layer", "shape", "zeros", "pattern", "MB", "error", "notes"):
        numeric = name in ("shape", "zeros", "MB", "error")
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in found:
        table.add_row(*row.cells())
    out.print(table)
    weights, zeros = sum(r.weights for r in found), sum(r.zeros for r in found)
    size = sum(r.nbytes for r in found)
    print(f"{len(found)} layers, {weights / 1e6:,.1f} M weights, {zeros / weights:.2%} zeros, {size / 1e6:,.1f} MB")


Bits = Annotated[int | None, typer.Option(help="Round the kept weights to 8 or 4 bits.")]
Group = Annotated[int, typer.Option(help="With --bits: inputs that share a scale, a multiple of 128; 0: whole rows.")]
Head = Annotated[bool, typer.Option("--round-head", help="Round the embedding and the output head to 8 bits.")]
Out = Annotated[Path, typer.Option("--output", "-o", help="Directory for the result.")]


@app.command()
def pack(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A pruned model.")],
    output: Out,
    bits: Bits = None,
    group: Group = 128,
    round_head: Head = False,
    trust_remote_code: Trust = False,
) -> None:
    """Store a pruned model without its zeros; transformers loads it after `import prunella`."""
    from .sparse.commands import pack_model

    result = pack_model(model, output, bits, group, head=round_head, remote_code=trust_remote_code)
    out.print(
        f"{result.layers} layers packed: {result.dense / 1e6:,.1f} MB became {result.packed / 1e6:,.1f} MB"
        f" ({result.packed / result.dense:.3f}); saved to {output}",
        markup=False,
    )
    if result.kept:
        out.print(f"note: {len(result.kept)} layers stayed dense, {result.kept[0]} the first of them", markup=False)


@app.command()
def unpack(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A packed model.")],
    output: Out,
) -> None:
    """Make a plain model of a packed one."""
    from .sparse.commands import unpack_model

    out.print(f"{unpack_model(directory, output)} layers unpacked; saved to {output}", markup=False)


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A pruned or packed model.")] = None,
    random: Annotated[
        str | None,
        typer.Option(help="Random weights of a shape: llama-1b, tiny, or a config directory."),
    ] = None,
    sparsity: Annotated[float, typer.Option(help="Of random weights.")] = 0.5,
    bits: Bits = None,
    group: Group = 128,
    round_head: Head = False,
    prompt: Annotated[int, typer.Option(help="Tokens of the prefill.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens generated, one at a time.")] = 32,
    rounds: Annotated[int, typer.Option(help="Turns of dense and packed; medians count.")] = 3,
    threads: Annotated[int | None, typer.Option(help="[default: as PyTorch has them]")] = None,
    json_: Json = False,
) -> None:
    """Measure prefill and decode speed on this machine, dense beside packed."""
    from .sparse.commands import bench as measure

    result = measure(
        model,
        random=random,
        sparsity=sparsity,
        bits=bits,
        group=group,
        head=round_head,
        prompt=prompt,
        tokens=tokens,
        rounds=rounds,
        threads=threads,
    )
    if json_:
        print(json.dumps(result))
        return
    table = Table(title=f"{model or random}: {prompt} tokens of prompt, {tokens} generated")
    for column in ("", "dense", "packed"):
        table.add_column(column, justify="right" if column else "left")
    sides = result["dense"], result["packed"]
    table.add_row("weights, MB", *(f"{side['bytes'] / 1e6:,.1f}" for side in sides))
    table.add_row("prefill, tokens a second", *(f"{side['prefill']:,.1f}" for side in sides))
    table.add_row("decode, tokens a second", *(f"{side['decode']:,.2f}" for side in sides))
    table.add_row("of the read bandwidth", *(f"{side['bandwidth']:.0%}" for side in sides))
    out.print(table)
    speedup = result["speedup"]
    out.print(
        f"packed is {speedup['decode']:.2f} times as fast in decoding, {speedup['prefill']:.2f} times in prefill;"
        f" memory reads at {result['read_bandwidth'] / 1e9:.1f} GB/s"
    )


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A pruned model.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page to write. [default: DIR/report.html]")
    ] = None,
) -> None:
    """Write a page of HTML that shows what was done to a pruned model; it needs no network."""
    from .page import write_page

    print(f"saved to {write_page(directory, output)}")


@app.command()
def compare(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Pruned models.")],
    html: Annotated[Path | None, typer.Option(help="Write a page of HTML as well.")] = None,
    json_: Json = False,
) -> None:
    """Pruned models side by side: what was done to each and what it measured."""
    from .compare import Comparison
    from .page import write_text

    found = Comparison.read(directories)
    if html is not None:
        write_text(html, found.page())
    if json_:
        print(json.dumps(found.plain()))
        return
    table = Table()
    for name in ("", "dense", *found.names):
        table.add_column(name, overflow="fold")
    for row in found.rows():
        table.add_row(*row)
    out.print(table)


@app.command()
def sweep(
    model: ModelName,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the results; cells in it are kept.")],
    recipe: Annotated[
        str | None, typer.Option(help="A YAML file: a recipe, and under `grid` lists of values for its keys.")
    ] = None,
    step: Annotated[list[str] | None, typer.Option(help="Steps of some cells, such as wanda+update; repeat.")] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="Share to prune; repeat.")] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="unstructured, N:M or RxC; repeat.")] = None,
    allocate: Annotated[list[str] | None, typer.Option(help="How sparsity is spread over layers; repeat.")] = None,
    grid: Annotated[
        list[str] | None, typer.Option(metavar="KEY=[VALUE, ...]", help="Values for any other recipe key; repeat.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="Text to measure perplexity on; repeat.")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="Measure how fast each cell decodes packed, too.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A recipe key, for all cells.")
    ] = None,
    json_: Json = False,
    trust_remote_code: Trust = False,
    allow_pickle: Pickle = False,
) -> None:
    """Prune MODEL in every combination of some choices; run again, it makes the cells that are missing."""
    from .cells import parse_grid
    from .cells import sweep as run
    from .recipe import Recipe
    from .report import bos_words

    flags = {
        "steps": [item.split("+") for item in step or []],
        "sparsity": sparsity,
        "pattern": pattern,
        "allocate": allocate,
    }
    plan = Recipe.read(recipe) if recipe else {}
    plan = parse_grid(plan, {key: values for key, values in flags.items() if values}, grid or [], set_ or [])
    results = run(
        model,
        plan,
        output,
        texts=text,
        speed=speed,
        say=lambda message: print(f"prunella: {message}", file=sys.stderr, flush=True),
        track=track,
        remote_code=trust_remote_code,
        pickles=allow_pickle,
    )
    if json_:
        print(json.dumps(results.rows))
    else:
        for name, dense in results.rows[0]["perplexity"].items():
            columns, rows = results.matrix(name)
            begin = bos_words(results.settings.get("bos", False))
            table = Table(title=f"perplexity on {name}, windows {begin}, dense {dense:.2f}")
            for column in columns:
                table.add_column(column, justify="left" if column == columns[0] else "right", overflow="fold")
            for row in rows:
                table.add_row(*row)
            out.print(table)
        print(f"saved to {output}")
    if results.failed:
        print(f"prunella: {len(results.failed)} cells failed; the same command tries them again", file=sys.stderr)
        raise typer.Exit(2)


@app.command()
def methods(json_: Json = False) -> None:
    """Every step, allocation and healing method, with a line and the options of each."""
    from .allocate import allocations
    from .heal import groups
    from .registry import steps

    rows = [
        (kind, method.name, method.summary, {key: p.default for key, p in method.options.items()})
        for kind, known in (("step", steps), ("allocation", allocations), ("healing", groups))
        for _, method in sorted(known.items())
    ]
    if json_:
        print(json.dumps([dict(zip(("kind", "name", "summary", "options"), row, strict=True)) for row in rows]))
        return
    table = Table()
    for column in ("kind", "name", "what it does", "options"):
        table.add_column(column, overflow="fold")
    for kind, name, summary, options in rows:
        table.add_row(kind, name, summary, ", ".join(f"{key}={value}" for key, value in options.items()))
    out.print(table)


def main() -> None:
    """Entry point: what the user can mend is one line and exit code 2, a defect of ours exit code 1."""
    keep_freed_memory()
    sys.exit(_guard(lambda: app(standalone_mode=False, prog_name="prunella")))


def _guard(call: Callable[[], Any]) -> int:
    try:
        result = call()
        if result == 130:  # typer catches Ctrl-C itself, and says nothing
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        return 0
    except (Exception, KeyboardInterrupt) as error:
        message, code = _explain(error)
        if "--debug" in sys.argv or os.environ.get("PRUNELLA_DEBUG"):
            traceback.print_exc()
    print(f"prunella: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    """What to say about an error, and the exit code."""
    import click

    from .errors import PrunellaError

    if isinstance(error, PrunellaError):
        return str(error), 2
    if isinstance(error, click.ClickException | typer.TyperException):  # type: ignore[attr-defined]
        return error.format_message(), 2
    if isinstance(error, KeyboardInterrupt | click.Abort | typer.Abort):
        kept = {
            "prune": " Finished blocks are kept: continue with the same command and --resume.",
            "sweep": " Finished cells are kept: continue with the same command.",
        }
        return f"interrupted.{kept.get(next((word for word in sys.argv if word in kept), ''), '')}", 130
    text = str(error)
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return "out of memory: use fewer or shorter windows (--samples, --length), or --order block.", 2
    first = text.splitlines()[0] if text else ""
    return f"internal error, please report it: {type(error).__name__}: {first} (--debug shows where)", 1
