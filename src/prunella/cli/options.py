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
import re
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


def table(text: str) -> tuple[Option, ...]:
    """Options by their groups in the help, `key: words`, two spaces, what it is; a line that is indented goes on."""
    group, found = "", []
    for line in re.sub(r"\n +", "  ", text).strip().splitlines():
        key, colon, rest = line.partition(": -")
        if colon:
            words, _, help = rest.partition("  ")
            found.append(ask(group, "-" + words, key, " ".join(help.split())))
        else:
            group = line
    return tuple(found)


def instead(options: Iterable[Option], *others: Option) -> tuple[Option, ...]:
    """The options, some of them replaced by others with the same keys; those with new keys come last."""
    return tuple(({option.key: option for option in options} | {option.key: option for option in others}).values())


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
    str,
    typer.Argument(
        metavar="MODEL", help="Hub id, directory, .gguf file, or a built-in name: smollm2-135m, minilm-l6 …"
    ),
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

# ---------------------------------------------------------------------------------------------------------
# Of a recipe, for prune, heal and sweep: what is not given is the recipe's

PRUNING = table(f"""
What to prune, and how
steps: --step NAME …
    A step, or your own: file.py:name; repeat for several in a row. `prunella methods` lists them. [default: sparsegpt]
task: --task NAME  What the network is for, or your own: file.py:name. [default: as its files say]
sparsity: --sparsity SHARE …  Share to prune, or LAYERS=SHARE for some layers; repeat. [default: 0.5]
pattern: --pattern PATTERN  unstructured, N:M (N kept of M) or RxC blocks. [default: unstructured]
skip: --skip LAYERS …  Layers that stay dense, by name pattern; repeat.
keep_zeros: --keep-zeros  Zeros that the model comes with stay, and count.
allocate: --allocate NAME  How sparsity is spread over layers. [default: uniform]
order: --order block|layer|back
    block: statistics of the dense block; layer: of what each layer really sees; back: with gradients.
    [default: by memory and steps]
batch_norm: --batch-norm WAY
    Statistics of batch norms: keep, or estimate by reset, momentum, correct, or your own. [default: what is best]
Calibration
calibration.source: --calibration TEXT  Where statistics come from: {SOURCES}; what the task reads. [default: pydoc]
calibration.samples: --samples N
    Windows of calibration text; of another task samples, whose default is its own. [default: 32]
calibration.length: --length TOKENS  Of text: tokens in a window. [default: 2048, or the model's context]
Healing
heal.train: --heal NAME …  Retrain afterwards: what trains; repeat. `prunella methods` lists them. [default: nothing]
Measuring
evaluate.source: --evaluate TEXT
    What to measure on before and after, as for --calibration; or none. [default: pydoc]
evaluate.windows: --windows N  Windows of that text, or samples likewise. [default: 8]
bos: --bos/--no-bos
    Of text: whether each window begins with a BOS where the tokenizer puts one before a text. [default: it does]
What is saved
format: --format dense|packed  packed: saved without the zeros; or a store of your own, FILE.py:NAME. [default: dense]
bits: --bits 8|4  With packed: round weights to so many bits.
group: --group INPUTS  Inputs that share a scale; 0: whole rows. [default: 128]
round_head: --round-head  With packed: embedding and output head in 8 bits.
dtype: --dtype DTYPE  Compute and save in float32, bfloat16 or float16. [default: as stored]
The run
recipe: --recipe RECIPE  fast, balanced, best, best-images, healed-50, or a YAML file; flags go before it.
set: --set KEY=VALUE …  Any recipe key, or an option of a step; repeat.
device: --device DEVICE  cpu, cuda, cuda:1 … [default: cuda where there is one]
seed: --seed N  Seed of everything random. [default: 0]
""")
SWEEPING = instead(
    PRUNING,
    *table("""
What to prune, and how
steps: --step NAME[+NAME] …  Steps of some cells, such as wanda+update; repeat for more cells. [default: sparsegpt]
sparsity: --sparsity SHARE …
    Share to prune; repeat for more cells. LAYERS=SHARE holds for some layers of all cells. [default: 0.5]
pattern: --pattern PATTERN …
    unstructured, N:M (N kept of M) or RxC blocks; repeat for more cells. [default: unstructured]
allocate: --allocate NAME …  How sparsity is spread over layers; repeat for more cells. [default: uniform]
grid: --grid KEY=[VALUE, …] …  Values for any other recipe key; repeat.
Measuring
evaluate.source: --text --evaluate TEXT …
    What to measure on, as for --calibration; repeat. [default: pydoc, or the task's own]
The run
recipe: --recipe FILE  A YAML file: a recipe, and under `grid` lists of values for its keys.
set: --set KEY=VALUE …  A recipe key, for all cells; repeat.
"""),
)
_SHARED = ("evaluate.source", "evaluate.windows", "bos", "recipe", "set", "device", "seed")
HEALING = (
    *table("""
Healing
heal.train: --train NAME …  What trains; repeat. `prunella methods` lists it. [default: mask-lora]
heal.way: --way retrain|reconstruct
    retrain: the whole model on text; reconstruct: block by block, to the dense one. [default: retrain]
task: --task NAME  What the network is for, or your own: file.py:name. [default: as the model's files say]
heal.text: --text --data TEXT …  What to train on, as for --calibration of prune; repeat. [default: the calibration's]
heal.tokens: --tokens N  Of text: tokens to train on in all. [default: 250000]
heal.length: --length TOKENS  Of text: tokens in a window. [default: 512]
heal.epochs: --epochs N  Of other samples, and to reconstruct: how often to go over them. [default: 1]
heal.rate: --rate RATE  Learning rate. [default: each method's own]
heal.distill: --distill SHARE  Share of the loss that follows the dense model's predictions. [default: 0]
heal.dense: --dense MODEL  The dense model. [default: the one that was pruned]
Calibration
calibration.source: --calibration TEXT  Samples for reconstruct and new-biases. [default: the pruning's]
calibration.samples: --samples N  How many: windows of text, or samples. [default: the pruning's]
"""),
    *instead(
        [option for option in PRUNING if option.key in _SHARED],
        *table("The run\nrecipe: --recipe RECIPE  A named recipe or a YAML file; its `heal` section counts."),
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
