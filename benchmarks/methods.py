"""Every method at 50%, 60%, 70%, 2:4 and 4:8: perplexity, seconds and reconstruction error.

    python benchmarks/methods.py --calibration c4.jsonl --text wikitext2-test.txt --text c4-other.jsonl

A sweep (src/prunella/cells.py) whose cells are methods of a choosing that no grid gives: finished cells are in a file
of JSON lines (--json) and are not made again. Prints one table a text; --plot draws the first text's.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prunella.calibrate import windows
from prunella.cells import Cell, Sweep
from prunella.heap import keep_freed_memory
from prunella.recipe import Recipe
from prunella.rows import Key, Rows
from prunella.samples import Samples
from prunella.tasks.text import load_model
from prunella.texts import same_text

CELLS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "70%": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"steps": ["magnitude"]},
    "wanda": {"steps": ["wanda"]},
    "ria": {"steps": ["ria"]},
    "sparsegpt": {"steps": ["sparsegpt"]},
    "magnitude + dsnot": {"steps": ["magnitude", "dsnot"]},
    "wanda + dsnot": {"steps": ["wanda", "dsnot"]},
    "wanda + dsnot, attention only": {"steps": ["wanda", {"dsnot": {"skip": ["mlp"]}}]},
    "sparsegpt + dsnot": {"steps": ["sparsegpt", "dsnot"]},
    "wanda + swap": {"steps": ["wanda", "swap"]},
    "besa, rows": {"steps": ["besa"]},
    "besa, layers": {"steps": [{"besa": {"per": "layer"}}]},
    "wanda + update": {"steps": ["wanda", "update"]},
    "sparsegpt + update": {"steps": ["sparsegpt", "update"]},
    "wanda + swap + update": {"steps": ["wanda", "swap", "update"]},
    "besa + update": {"steps": ["besa", "update"]},
    "admm": {"steps": ["admm"]},
    "admm + update": {"steps": ["admm", "update"]},
    "alps": {"steps": ["alps"]},
    "alps + swap + update": {"steps": ["alps", {"swap": {"restore": "fit"}}, "update"]},
    "owl, wanda": {"allocate": "owl", "steps": ["wanda"]},
    "dlp, wanda": {"allocate": "dlp", "steps": ["wanda"]},
    "ramp, wanda": {"allocate": "ramp", "steps": ["wanda"]},
    "owl, alps": {"allocate": "owl", "steps": ["alps"]},
    "ramp, alps": {"allocate": "ramp", "steps": ["alps"]},
    "recipe fast": Recipe.read("fast"),
    "recipe balanced": Recipe.read("balanced"),
    "recipe best": Recipe.read("best"),
}


def recipe_of(method: str, cell: str) -> dict[str, Any] | None:
    """The recipe of a cell, or None where the method does not exist for the pattern."""
    recipe = {**METHODS[method], **CELLS[cell], "evaluate": {"source": None}}
    if "pattern" in CELLS[cell]:
        if method.startswith("recipe"):
            recipe.pop("allocate", None)  # as --recipe NAME --pattern N:M does
        if "allocate" in recipe or method.startswith("besa"):
            return None
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="pydoc", help="text to calibrate on")
    parser.add_argument("--text", action="append", help="text to measure perplexity on; repeat [pydoc]")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, nargs="+", default=[20], help="of each text, or one number for all")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--order", default="auto", choices=["auto", "block", "layer"])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), metavar="CELL")
    parser.add_argument("--json", type=Path, default=Path("methods.jsonl"), help="finished cells, one a line")
    parser.add_argument("--plot", type=Path, help="draw the first text's perplexities here")
    args = parser.parse_args()
    texts = args.text or ["pydoc"]
    names = [Path(text).name for text in texts]
    counts = args.windows * len(texts) if len(args.windows) == 1 else args.windows
    if len(counts) != len(texts):
        parser.error(f"--windows gives {len(counts)} numbers for {len(texts)} texts")

    keep_freed_memory()
    settings = {
        key: Path(value).name if key == "calibration" else value
        for key, value in vars(args).items()
        if key in ("model", "calibration", "samples", "length", "windows", "dtype", "order")
    } | {"text": names}
    opened = load_model(args.model, dtype=args.dtype, device=args.device)
    calibration = windows(opened, args.calibration, args.samples, args.length)
    held_out = {
        name: Samples.of(
            windows(
                opened, text, count, args.length, skip=args.samples * same_text(args.calibration, text), split="test"
            )
        )
        for name, text, count in zip(names, texts, counts, strict=True)
    }
    cells = [
        Cell(method, cell, recipe | {"order": order(recipe, args.order)})
        for cell in args.cells
        for method in args.methods
        if (recipe := recipe_of(method, cell)) is not None
    ]
    log = Console(stderr=True)
    groups: dict[int, list[Cell]] = {}
    for cell in cells:
        groups.setdefault(own_length(cell.recipe, args.length), []).append(cell)
    tokens, rows = calibration.flatten(), dict[Key, Any]()
    for length, same in groups.items():
        windows_NL = tokens[: len(tokens) // length * length].view(-1, length)
        sweep = Sweep(opened, Samples.of(windows_NL), held_out, Rows(args.json, settings))
        rows |= sweep.run(same, say=lambda message: log.print(message, markup=False))
    done = {key: row for key, row in rows.items() if "failed" not in row}
    for name in names:
        Console().print(table(done, name, args))
    if args.plot:
        plot(done, names[0], args)


def own_length(recipe: Mapping[str, Any], usual: int) -> int:
    """Tokens in a calibration window: some recipes want shorter ones, cut from the same tokens."""
    return min(usual, recipe.get("calibration", {}).get("length", usual))


def order(recipe: Mapping[str, Any], wanted: str) -> str:
    """The order asked for, where every step can work in it."""
    steps = Recipe.of(recipe).make_steps()
    return wanted if all(step.per_layer for step in steps) else "auto"


def table(done: Mapping[tuple[str, str], Mapping[str, Any]], name: str, args: argparse.Namespace) -> Table:
    """Methods by cells: perplexity, then CPU seconds and mean relative error of the first cell that has them."""
    dense = done["dense", ""]["perplexity"][name]
    out = Table(title=f"perplexity on {name}; {Path(args.model).name} dense: {dense:.2f}")
    out.add_column("method", no_wrap=True)
    for column in (*args.cells, f"CPU seconds ({args.cells[0]})", f"error ({args.cells[0]})"):
        out.add_column(column, justify="right")
    for method in args.methods:
        rows = [done.get((method, cell)) for cell in args.cells]
        if not any(rows):
            continue
        cells = ["" if row is None else f"{row['perplexity'][name]:.2f}" for row in rows]
        first = rows[0]
        cells += ["", ""] if first is None else [f"{first['cpu_seconds']:.0f}", f"{first['error']:.4f}"]
        out.add_row(method, *cells)
    return out


def plot(done: Mapping[tuple[str, str], Mapping[str, Any]], name: str, args: argparse.Namespace) -> None:
    """Perplexity over cells, one line a method, on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    colors = plt.get_cmap("tab20")
    for number, method in enumerate(args.methods):
        points = {c: done[method, c]["perplexity"][name] for c in args.cells if (method, c) in done}
        look: dict[str, Any] = {"marker": "o", "ms": 4, "color": colors(number % 20), "label": method}
        for style, inside in (("-" if number < 20 else "--", "%"), ("", ":")):  # a pattern is no next sparsity
            here = {cell: value for cell, value in points.items() if inside in cell}
            if here:
                axes.plot(list(here), list(here.values()), style, **look)
                look["label"] = None
    axes.axhline(done["dense", ""]["perplexity"][name], color="grey", ls=":", label="dense")
    axes.set_yscale("log")
    axes.set_ylabel(f"perplexity on {name}")
    axes.set_title(f"{Path(args.model).name}, calibrated on {args.samples} windows of {args.length} tokens")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(args.plot, dpi=150)


if __name__ == "__main__":
    main()
