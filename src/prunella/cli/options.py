"""What the commands ask: each option of a recipe once, and what several commands share.

A command takes a group of options as one argument, the dict of those that were used:

    @app.command()
    @grouped
    def prune(model: ModelName, given: Annotated[dict[str, Any], PRUNING]) -> None: ...
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import typer

from .. import catalogue

# Groups of options in the help
MAIN, WHAT, TEXT, HEAL, MEASURE, SAVE, RUN = (
    "Options",
    "What to prune, and how",
    "Calibration",
    "Healing",
    "Measuring",
    "What is saved",
    "The run",
)


def of(group: str, words: str, help: str, **settings: Any) -> Any:
    """An option in a group of the help, from its words there: names, and what stands for a value if it takes one."""
    names = [word for word in words.split() if word.startswith("-")]
    metavar = words.removeprefix(" ".join(names)).strip()
    shown = bool(metavar)  # its default
    return typer.Option(*names, rich_help_panel=group, help=help, metavar=metavar, show_default=shown, **settings)


class Option(NamedTuple):
    """An option, the type of its value, and what it sets: a key of a recipe, or an argument of a function."""

    key: str
    kind: Any
    typer: Any
    default: Any = None

    @property
    def parameter(self) -> inspect.Parameter:
        """As typer reads it in the signature of a command."""
        annotation = Annotated[self.kind | None, self.typer]  # type: ignore[name-defined]
        name = self.key.replace(".", "_")
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=annotation)


def ask(group: str, words: str, key: str, help: str, default: Any = None, **settings: Any) -> Option:
    """An option in a group of the help that sets a key. Its words, such as `--samples N` or `--text TEXT …`, say of
    what type a value is, whether it may be repeated (…), and, if the key does not, what completes it."""
    words, repeats, _ = words.partition(" …") if words.endswith(" …") else (words, "", "")
    word = words.split()[-1]
    kind = list[str] if repeats else bool if word.startswith("-") else _KINDS.get(word, str)
    known = _KNOWN.get(key, _KNOWN.get(word))
    return Option(key, kind, of(group, words, help, autocompletion=known, **settings), default)


def instead(options: Iterable[Option], *others: Option) -> tuple[Option, ...]:
    """The options, some of them replaced by others with the same keys."""
    by_key = {option.key: option for option in others}
    return tuple(by_key.get(option.key, option) for option in options)


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """A command: a parameter that is annotated with a tuple of options stands for these, and is given {key: value}."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, tuple[Option, ...]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        _, *asked = get_args(hints[name]) or (None,)
        if asked and isinstance(asked[0], tuple):
            groups[name] = asked[0]
            parameters += [option.parameter for option in asked[0]]
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(function)
    def command(**given: Any) -> None:
        for name, options in groups.items():
            values = {option.key: given.pop(option.parameter.name) for option in options}
            given[name] = {key: value for key, value in values.items() if value is not None}
        function(**given)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def complete_by(known: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completion of a word by names."""

    def complete(incomplete: str) -> list[str]:
        """The names that begin so."""
        return [name for name in known() if name.startswith(incomplete)]

    return complete


def complete_from(*known: str) -> Callable[[str], list[str]]:
    """Completion of a word by names that are known beforehand."""
    return complete_by(lambda: known)


def recipes() -> list[str]:
    """The recipes that come with Prunella."""
    from importlib.resources import files

    shipped = (Path(file.name) for file in (files("prunella") / "recipes").iterdir())
    return sorted(file.stem for file in shipped if file.suffix == ".yaml")


_KINDS = {"N": int, "TOKENS": int, "INPUTS": int, "8|4": int, "SHARE": float, "RATE": float}
_KNOWN = {
    "task": complete_by(lambda: catalogue.names("task")),
    "steps": complete_by(lambda: catalogue.names("step")),
    "allocate": complete_by(lambda: catalogue.names("allocation")),
    "heal.train": complete_by(lambda: catalogue.names("healing")),
    "order": complete_from("auto", "block", "layer", "back"),
    "heal.way": complete_from("retrain", "reconstruct"),
    "format": complete_from("dense", "packed"),
    "RECIPE": complete_by(recipes),
    "TEXT": complete_from("pydoc", "self", "c4", "wikitext2"),
    "DTYPE": complete_from("auto", "float32", "bfloat16", "float16"),
    "PATTERN": complete_from("unstructured", "2:4", "4:8", "1:4", "16x1"),
    "DEVICE": complete_from("auto", "cpu", "cuda"),
}

# ---------------------------------------------------------------------------------------------------------
# Of several commands

SOURCES = "pydoc, self, c4, wikitext2, hf:DATASET:CONFIG:SPLIT, or a file: .txt, .jsonl, .parquet …"

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, directory, .gguf file, or the built-in smollm2-135m.")
]
Out = Annotated[Path, of(MAIN, "--output -o DIR", "Directory for the result.")]
Json = Annotated[bool, of(RUN, "--json", "Print JSON in place of tables.")]
Resume = Annotated[bool, of(RUN, "--resume", "Continue an interrupted run, or begin it.")]
TRUST = (
    ask(RUN, "--trust-remote-code", "remote_code", "Run Python that comes with the model."),
    ask(RUN, "--allow-pickle", "pickles", "Read weights that only come as pickles."),
)
OPENING = (
    ask(MAIN, "--revision REV", "revision", "Of a hub's model: a branch, tag or commit."),
    ask(MAIN, "--tokenizer DIR", "tokenizer", "A directory or hub id with a tokenizer. [default: the model's own]"),
)
PLACE = (
    ask(RUN, "--dtype DTYPE", "dtype", "float32, bfloat16, float16; auto: as the model is stored.", "auto"),
    ask(RUN, "--device DEVICE", "device", "cpu, cuda, cuda:1 …; auto: cuda where there is one.", "auto"),
)
ROUNDING = (
    ask(SAVE, "--bits 8|4", "bits", "Round the kept weights to so many bits."),
    ask(
        SAVE,
        "--group INPUTS",
        "group",
        "With --bits: inputs that share a scale, a multiple of 128; 0: whole rows.",
        128,
    ),
    ask(SAVE, "--round-head", "head", "Round the embedding and the output head to 8 bits."),
)
BOS = ask(
    MEASURE,
    "--bos/--no-bos",
    "bos",
    "Whether each window begins with a BOS where the tokenizer puts one before a text. [default: it does]",
)

# ---------------------------------------------------------------------------------------------------------
# Of a recipe, for prune, heal and sweep: what is not given is the recipe's

_MEASURING = (
    ask(
        MEASURE,
        "--evaluate TEXT",
        "evaluate.source",
        "Text for the perplexities before and after, as for --calibration; or none. [default: pydoc]",
    ),
    ask(MEASURE, "--windows N", "evaluate.windows", "Windows of that text. [default: 8]"),
    BOS,
)
_RUNNING = (
    ask(RUN, "--recipe RECIPE", "recipe", "fast, balanced, best, healed-50, or a YAML file; flags go before it."),
    ask(RUN, "--set KEY=VALUE …", "set", "Any recipe key, or an option of a step; repeat."),
    ask(RUN, "--device DEVICE", "device", "cpu, cuda, cuda:1 … [default: cuda where there is one]"),
    ask(RUN, "--seed N", "seed", "Seed of everything random. [default: 0]"),
)
PRUNING = (
    ask(
        WHAT,
        "--step NAME …",
        "steps",
        "A step, or your own: file.py:name; repeat for several in a row. `prunella methods` lists them."
        " [default: sparsegpt]",
    ),
    ask(
        WHAT,
        "--task NAME",
        "task",
        "What the network is for, or your own: file.py:name. [default: text, a causal language model]",
    ),
    ask(
        WHAT,
        "--sparsity SHARE …",
        "sparsity",
        "Share to prune, or LAYERS=SHARE for some layers; repeat. [default: 0.5]",
    ),
    ask(WHAT, "--pattern PATTERN", "pattern", "unstructured, N:M (N kept of M) or RxC blocks. [default: unstructured]"),
    ask(WHAT, "--skip LAYERS …", "skip", "Layers that stay dense, by name pattern; repeat."),
    ask(WHAT, "--keep-zeros", "keep_zeros", "Zeros that the model comes with stay, and count."),
    ask(WHAT, "--allocate NAME", "allocate", "How sparsity is spread over layers. [default: uniform]"),
    ask(
        WHAT,
        "--order block|layer|back",
        "order",
        "block: statistics of the dense block; layer: of what each layer really sees; back: with gradients."
        " [default: by memory and steps]",
    ),
    ask(TEXT, "--calibration TEXT", "calibration.source", f"Where statistics come from: {SOURCES}. [default: pydoc]"),
    ask(TEXT, "--samples N", "calibration.samples", "Windows of calibration text. [default: 32]"),
    ask(TEXT, "--length TOKENS", "calibration.length", "Tokens in a window. [default: 2048, or the model's context]"),
    ask(
        HEAL,
        "--heal NAME …",
        "heal.train",
        "Retrain afterwards: what trains; repeat. `prunella methods` lists them. [default: nothing]",
    ),
    *_MEASURING,
    ask(
        SAVE,
        "--format dense|packed",
        "format",
        "packed: saved without the zeros; or a store of your own, FILE.py:NAME. [default: dense]",
    ),
    ask(SAVE, "--bits 8|4", "bits", "With packed: round weights to so many bits."),
    ask(SAVE, "--group INPUTS", "group", "Inputs that share a scale; 0: whole rows. [default: 128]"),
    ask(SAVE, "--round-head", "round_head", "With packed: embedding and output head in 8 bits."),
    ask(SAVE, "--dtype DTYPE", "dtype", "Compute and save in float32, bfloat16 or float16. [default: as stored]"),
    *_RUNNING,
)
SWEEPING = (
    *instead(
        PRUNING,
        ask(
            WHAT,
            "--step NAME[+NAME] …",
            "steps",
            "Steps of some cells, such as wanda+update; repeat for more cells. [default: sparsegpt]",
        ),
        ask(
            WHAT,
            "--sparsity SHARE …",
            "sparsity",
            "Share to prune; repeat for more cells. LAYERS=SHARE holds for some layers of all cells. [default: 0.5]",
        ),
        ask(
            WHAT,
            "--pattern PATTERN …",
            "pattern",
            "unstructured, N:M (N kept of M) or RxC blocks; repeat for more cells. [default: unstructured]",
        ),
        ask(
            WHAT,
            "--allocate NAME …",
            "allocate",
            "How sparsity is spread over layers; repeat for more cells. [default: uniform]",
        ),
        ask(
            MEASURE,
            "--text --evaluate TEXT …",
            "evaluate.source",
            "Text to measure perplexity on, as for --calibration; repeat. [default: pydoc]",
        ),
        ask(RUN, "--recipe FILE", "recipe", "A YAML file: a recipe, and under `grid` lists of values for its keys."),
        ask(RUN, "--set KEY=VALUE …", "set", "A recipe key, for all cells; repeat."),
    ),
    ask(WHAT, "--grid KEY=[VALUE, …] …", "grid", "Values for any other recipe key; repeat."),
)
HEALING = (
    ask(HEAL, "--train NAME …", "heal.train", "What trains; repeat. `prunella methods` lists it. [default: mask-lora]"),
    ask(
        HEAL,
        "--way retrain|reconstruct",
        "heal.way",
        "retrain: the whole model on text; reconstruct: block by block, to the dense one. [default: retrain]",
    ),
    ask(
        HEAL,
        "--text TEXT …",
        "heal.text",
        "What to train on, as for --calibration of prune; repeat. [default: the calibration's]",
    ),
    ask(HEAL, "--tokens N", "heal.tokens", "Tokens to train on in all. [default: 250000]"),
    ask(HEAL, "--length TOKENS", "heal.length", "Tokens in a window. [default: 512]"),
    ask(HEAL, "--rate RATE", "heal.rate", "Learning rate. [default: each method's own]"),
    ask(
        HEAL,
        "--distill SHARE",
        "heal.distill",
        "Share of the loss that follows the dense model's predictions. [default: 0]",
    ),
    ask(HEAL, "--dense MODEL", "heal.dense", "The dense model. [default: the one that was pruned]"),
    ask(
        TEXT,
        "--calibration TEXT",
        "calibration.source",
        "Text for reconstruct and new-biases. [default: the pruning's]",
    ),
    ask(TEXT, "--samples N", "calibration.samples", "Windows of that text. [default: the pruning's]"),
    *_MEASURING,
    *instead(
        _RUNNING, ask(RUN, "--recipe RECIPE", "recipe", "A named recipe or a YAML file; its `heal` section counts.")
    ),
)


def settings_of(given: Mapping[str, Any]) -> list[str]:
    """Options as KEY=VALUE settings of a recipe; `evaluate.source` may be none."""
    values = {**given, "evaluate.source": None} if given.get("evaluate.source") == "none" else given
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def share_of(text: str) -> float:
    """A sparsity as a recipe reads it. Raises InputError."""
    from ..recipe import Recipe

    return Recipe.of({"sparsity": {"*": text}}).sparsity["*"]
