"""What healing brings back: {magnitude, sparsegpt} x {50%, 2:4} x what trains, all on the same tokens.

    python benchmarks/heal.py --text c4.jsonl --text c4-more.jsonl --test wikitext2-test.txt

Each cell prunes once (kept in --folder) and heals in a process of its own, so that its peak memory is its own; it is
appended to a file of JSON lines (--json) as soon as it is done, and a cell that the file already holds, made with the
same settings, is not made again. `recovered` is the share of the loss in log-perplexity that full retraining on the
same tokens wins back.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import prunella

CELLS: dict[str, dict[str, Any]] = {"50%": {"sparsity": 0.5}, "2:4": {"pattern": "2:4"}}
STEPS = ("magnitude", "sparsegpt", "wanda")
METHODS: dict[str, dict[str, Any]] = {
    "norms": {"train": ["norms"]},
    "new biases": {"train": ["new-biases"]},
    "mask-lora": {"train": ["mask-lora"]},
    "scale-lora": {"train": ["scale-lora"]},
    "scale-lora, constant start": {"train": [{"scale-lora": {"start": "constant"}}]},
    "lora-prune": {"train": ["lora-prune"]},
    "mask-lora, norms, head": {"train": ["mask-lora", "norms", "head"]},
    "reconstruct": {"train": ["all"], "way": "reconstruct"},
    "reconstruct, sub-blocks": {"train": ["all"], "way": "reconstruct", "part": "sub-block"},
    "all": {"train": ["all"]},
}
TABLE = ("norms", "new biases", "mask-lora", "scale-lora", "lora-prune", "reconstruct", "all")
WORKER = """
import json, sys, prunella
from prunella.heap import keep_freed_memory
keep_freed_memory()
job = json.loads(sys.argv[1])
report = prunella.heal(job["source"], job["recipe"], output=job["output"])
print(json.dumps(report.healing))
"""
Key = tuple[str, str, str]


def read(path: Path, settings: Mapping[str, Any]) -> dict[Key, dict[str, Any]]:
    """The finished cells of a file that were made with these settings."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # half a line of a run that was killed
            continue
        if row["settings"] == settings:
            found[row["step"], row["cell"], row["method"]] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", action="append", help="text to train on; repeat. The first calibrates too [pydoc]")
    parser.add_argument("--test", default="pydoc", help="text to measure perplexity on")
    parser.add_argument("--windows", type=int, default=20, help="windows of it")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--calibration-length", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rate", type=float, help="learning rate of everything [each method's own]")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the heal section")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=["magnitude", "sparsegpt"], metavar="STEP")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), metavar="CELL")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(TABLE), metavar="METHOD")
    parser.add_argument("--folder", type=Path, default=Path("heal-models"), help="for the pruned models")
    parser.add_argument("--json", type=Path, default=Path("heal.jsonl"), help="finished cells, one a line")
    args = parser.parse_args()
    texts = args.text or ["pydoc"]
    settings = {
        "text": [Path(text).name for text in texts],
        "test": Path(args.test).name,
        **{
            key: getattr(args, key)
            for key in ("model", "windows", "samples", "calibration_length", "tokens", "length", "rate", "set")
        },
    }
    extra = dict(json_value(item) for item in args.set)
    shared: dict[str, Any] = {
        "calibration": {"source": texts[0], "samples": args.samples, "length": args.calibration_length},
        "evaluate": {"source": args.test, "windows": args.windows, "length": args.calibration_length},
    }
    log = Console(stderr=True)
    done = read(args.json, settings)

    def finish(row: dict[str, Any]) -> None:
        with args.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"settings": settings, **row}) + "\n")
        done[row["step"], row["cell"], row["method"]] = row
        log.print(f"{row['step']}, {row['cell']}, {row['method']}: {row['perplexity']:.2f}", markup=False)

    for step in args.steps:
        for cell in args.cells:
            pruned = args.folder / f"{step}-{cell}".replace(":", "-").replace("%", "")
            if not (pruned / "prunella.json").is_file():
                prunella.prune(args.model, {**shared, **CELLS[cell], "steps": [step]}, output=pruned)
            said = prunella.Report.read(pruned)
            if any(said.recipe["calibration"][key] != value for key, value in shared["calibration"].items()):
                raise SystemExit(f"'{pruned}' was pruned on other text: choose another --folder, or delete it.")
            if (step, cell, "nothing") not in done:
                finish(
                    {
                        "step": step,
                        "cell": cell,
                        "method": "nothing",
                        "perplexity": said.pruned["perplexity"],
                        "dense": said.dense["perplexity"],
                    }
                )
            for method in args.methods:
                if (step, cell, method) in done:
                    continue
                given = {"text": texts, "tokens": args.tokens, "length": args.length, **extra}
                if METHODS[method].get("way") == "reconstruct":  # on windows of its own, those of the calibration
                    given = {key: value for key, value in extra.items() if key in ("rate", "epochs")}
                heal = {**given, **METHODS[method]}
                if args.rate is not None:
                    heal["rate"] = args.rate
                output = args.folder / "healed"
                for leftover in args.folder.glob("healed*"):  # of a run that was killed
                    shutil.rmtree(leftover)
                job = {"source": str(pruned), "recipe": {**shared, "heal": heal}, "output": str(output)}
                ran = subprocess.run([sys.executable, "-c", WORKER, json.dumps(job)], capture_output=True, text=True)
                if ran.returncode:
                    last = (ran.stderr.strip().splitlines() or ["nothing was said"])[-1]
                    log.print(f"{step}, {cell}, {method}: {last}", markup=False)
                    continue
                did = json.loads(ran.stdout.strip().splitlines()[-1])
                shutil.rmtree(output)
                finish(
                    {
                        "step": step,
                        "cell": cell,
                        "method": method,
                        "perplexity": did["after"]["perplexity"],
                        **{
                            key: did[key]
                            for key in ("trained", "tokens", "seconds", "cpu_seconds", "peak_memory", "losses")
                        },
                        "held_out": did.get("held_out"),
                    }
                )
    for step in args.steps:
        for cell in args.cells:
            Console().print(table(done, step, cell, args.methods))


def json_value(item: str) -> tuple[str, Any]:
    key, _, value = item.partition("=")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def table(done: Mapping[Key, Mapping[str, Any]], step: str, cell: str, methods: list[str]) -> Table:
    """One pruned model's healings."""
    start = done[step, cell, "nothing"]
    out = Table(title=f"{step}, {cell}; dense {start['dense']:.2f}")
    for column in ("trained", "perplexity", "recovered", "parameters", "seconds", "CPU-seconds", "peak GB"):
        out.add_column(column, justify="left" if column == "trained" else "right", no_wrap=True)
    out.add_row("nothing", f"{start['perplexity']:.2f}", *[""] * 5)
    full = done.get((step, cell, "all"))
    for method in methods:
        row = done.get((step, cell, method))
        if row is None:
            continue
        won = math.log(start["perplexity"] / row["perplexity"])
        whole = math.log(start["perplexity"] / full["perplexity"]) if full else 0.0
        out.add_row(
            method,
            f"{row['perplexity']:.2f}",
            f"{won / whole:.0%}" if whole else "",
            f"{row['trained']:.3%}",
            f"{row['seconds']:.0f}",
            f"{row['cpu_seconds']:.0f}" if "cpu_seconds" in row else "",
            f"{row['peak_memory'] / 1e9:.2f}",
        )
    return out


if __name__ == "__main__":
    main()
