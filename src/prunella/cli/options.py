"""What several commands are asked in the same words, in the groups that their help shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

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


def of(group: str, *names: str, help: str, default: str = "", **settings: Any) -> Any:
    """An option in a group of the help; `default` says what holds where it is not given."""
    if default:
        help, settings["show_default"] = f"{help} [default: {default}]", False
    return typer.Option(*names, rich_help_panel=group, help=help, **settings)


def flag(group: str, name: str, help: str) -> Any:
    """An option without a value."""
    return of(group, name, help=help, metavar="", show_default=False)


def complete_by(known: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completion of a word by names."""

    def complete(incomplete: str) -> list[str]:
        """The names that begin so."""
        return [name for name in known() if name.startswith(incomplete)]

    return complete


def complete_from(*known: str) -> Callable[[str], list[str]]:
    """Completion of a word by names that are known beforehand."""
    return complete_by(lambda: known)


def methods_of(kind: str) -> Callable[[str], list[str]]:
    """Completion of a word by the built-in methods of a kind."""
    return complete_by(lambda: catalogue.names(kind))


def recipes() -> list[str]:
    """The recipes that come with Prunella."""
    from importlib.resources import files

    shipped = (Path(file.name) for file in (files("prunella") / "recipes").iterdir())
    return sorted(file.stem for file in shipped if file.suffix == ".yaml")


SOURCES = "pydoc, self, c4, wikitext2, hf:DATASET:CONFIG:SPLIT, or a file: .txt, .jsonl, .parquet …"
source = complete_from("pydoc", "self", "c4", "wikitext2")
dtypes = complete_from("auto", "float32", "bfloat16", "float16")
patterns = complete_from("unstructured", "2:4", "4:8", "1:4", "16x1")
devices = complete_from("auto", "cpu", "cuda")

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, directory, .gguf file, or the built-in smollm2-135m.")
]
Revision = Annotated[str | None, of(MAIN, metavar="REV", help="Of a hub's model: a branch, tag or commit.")]
Tokenizer = Annotated[
    str | None,
    of(MAIN, metavar="DIR", help="A directory or hub id with a tokenizer.", default="the model's own"),
]
Bos = Annotated[
    bool | None,
    of(
        MEASURE,
        "--bos/--no-bos",
        metavar="",
        help="Whether each window begins with a BOS where the tokenizer puts one before a text.",
        default="it does",
    ),
]
Json = Annotated[bool, flag(RUN, "--json", help="Print JSON in place of tables.")]
Trust = Annotated[bool, flag(RUN, "--trust-remote-code", help="Run Python that comes with the model.")]
Pickle = Annotated[bool, flag(RUN, "--allow-pickle", help="Read weights that only come as pickles.")]
Dtype = Annotated[
    str,
    of(
        RUN,
        metavar="DTYPE",
        help="float32, bfloat16, float16; auto: as the model is stored.",
        autocompletion=dtypes,
    ),
]
Device = Annotated[
    str, of(RUN, metavar="DEVICE", help="cpu, cuda, cuda:1 …; auto: cuda where there is one.", autocompletion=devices)
]
Bits = Annotated[int | None, of(SAVE, metavar="8|4", help="Round the kept weights to so many bits.")]
Group = Annotated[
    int, of(SAVE, metavar="INPUTS", help="With --bits: inputs that share a scale, a multiple of 128; 0: whole rows.")
]
Head = Annotated[bool, flag(SAVE, "--round-head", help="Round the embedding and the output head to 8 bits.")]
Out = Annotated[Path, of(MAIN, "--output", "-o", metavar="DIR", help="Directory for the result.")]

# Of prune, heal and sweep: what is not given is the recipe's.
Steps = Annotated[
    list[str] | None,
    of(
        WHAT,
        "--step",
        metavar="NAME",
        help="A step, or your own: file.py:name; repeat for several in a row. `prunella methods` lists them.",
        default="sparsegpt",
        autocompletion=methods_of("step"),
    ),
]
Skip = Annotated[list[str] | None, of(WHAT, metavar="LAYERS", help="Layers that stay dense, by name pattern; repeat.")]
KeepZeros = Annotated[bool | None, flag(WHAT, "--keep-zeros", help="Zeros that the model comes with stay, and count.")]
Order = Annotated[
    str | None,
    of(
        WHAT,
        metavar="block|layer|back",
        help="block: statistics of the dense block; layer: of what each layer really sees; back: with gradients.",
        default="by memory and steps",
        autocompletion=complete_from("auto", "block", "layer", "back"),
    ),
]
Calibration = Annotated[
    str | None,
    of(
        TEXT,
        metavar="TEXT",
        help=f"Where statistics come from: {SOURCES}.",
        default="pydoc",
        autocompletion=source,
    ),
]
Samples = Annotated[int | None, of(TEXT, metavar="N", help="Windows of calibration text.", default="32")]
Length = Annotated[
    int | None, of(TEXT, metavar="TOKENS", help="Tokens in a window.", default="2048, or the model's context")
]
Train = Annotated[
    list[str] | None,
    of(
        HEAL,
        "--heal",
        metavar="NAME",
        help="Retrain afterwards: what trains; repeat. `prunella methods` lists them.",
        default="nothing",
        autocompletion=methods_of("healing"),
    ),
]
Evaluate = Annotated[
    str | None,
    of(
        MEASURE,
        metavar="TEXT",
        help="Text for the perplexities before and after, as for --calibration; or none.",
        default="pydoc",
        autocompletion=source,
    ),
]
Windows = Annotated[int | None, of(MEASURE, metavar="N", help="Windows of that text.", default="8")]
Format = Annotated[
    str | None,
    of(
        SAVE,
        "--format",
        metavar="dense|packed",
        help="packed: saved without the zeros; or a store of your own, FILE.py:NAME.",
        default="dense",
        autocompletion=complete_from("dense", "packed"),
    ),
]
RecipeBits = Annotated[
    int | None, of(SAVE, "--bits", metavar="8|4", help="With packed: round weights to so many bits.")
]
RecipeGroup = Annotated[
    int | None,
    of(SAVE, "--group", metavar="INPUTS", help="Inputs that share a scale; 0: whole rows.", default="128"),
]
RecipeHead = Annotated[
    bool | None, flag(SAVE, "--round-head", help="With packed: embedding and output head in 8 bits.")
]
RecipeDtype = Annotated[
    str | None,
    of(
        SAVE,
        "--dtype",
        metavar="DTYPE",
        help="Compute and save in float32, bfloat16 or float16.",
        default="as stored",
        autocompletion=dtypes,
    ),
]
RecipeName = Annotated[
    str | None,
    of(
        RUN,
        "--recipe",
        metavar="RECIPE",
        help="fast, balanced, best, healed-50, or a YAML file; flags go before it.",
        autocompletion=complete_by(recipes),
    ),
]
Set = Annotated[
    list[str] | None, of(RUN, "--set", metavar="KEY=VALUE", help="Any recipe key, or an option of a step; repeat.")
]
OwnDevice = Annotated[
    str | None,
    of(
        RUN,
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1 …",
        default="cuda where there is one",
        autocompletion=devices,
    ),
]
Seed = Annotated[int | None, of(RUN, metavar="N", help="Seed of everything random.", default="0")]
Resume = Annotated[bool, flag(RUN, "--resume", help="Continue an interrupted run, or begin it.")]


def settings_of(flags: Mapping[str, Any]) -> list[str]:
    """Flags that were given, as KEY=VALUE settings of a recipe; `evaluate.source` may be none."""
    given = {key: value for key, value in flags.items() if value is not None}
    if given.get("evaluate.source") == "none":
        given["evaluate.source"] = None
    return [f"{key}={json.dumps(value)}" for key, value in given.items()]


def share_of(text: str) -> float:
    """A sparsity as a recipe reads it. Raises InputError."""
    from ..recipe import Recipe

    return Recipe.of({"sparsity": {"*": text}}).sparsity["*"]
