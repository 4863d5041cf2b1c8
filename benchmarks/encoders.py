"""MiniLM as a classifier of SST-2's phrases: fine-tuned, then pruned in one shot.

    python benchmarks/encoders.py --train sst2-train.jsonl --test sst2-test.jsonl --out runs

The dense model is fine-tuned once by `heal` (`--share` of the training rows, `--epochs` passes) and kept in OUT/dense;
one that is given as `--dense` takes its place. Each way of pruning calibrates on the first `--samples` rows of the
training data and is measured on all test rows. A row for each is printed and appended to OUT/encoders.jsonl at once;
rows that are there are not made again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

import prunella
from prunella.evaluate.measure import measure
from prunella.progress import no_track
from prunella.tasks import make_task

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"steps": ["magnitude"]},
    "wanda": {"steps": ["wanda"]},
    "sparsegpt": {"steps": ["sparsegpt"]},
    "admm + update": {"steps": ["admm", "update"]},
    "best": {"allocate": "probe", "steps": ["admm", "update", {"reconstruct": {"epochs": 2}}]},
}

HEALED = "best, healed"  # that, then one pass over some training rows, distilled from the dense model


def trained(args: argparse.Namespace) -> Path:
    """The dense model: a new head, then all weights trained together, on texts as long as they are."""
    folder: Path = args.dense or args.out / "dense"
    if not (folder / "config.json").is_file():
        rows = sum(1 for line in args.train.open(encoding="utf-8") if line.strip())
        training = {
            "train": {"all": {"rate": args.rate}},
            "text": str(args.train),
            "samples": int(rows * args.share),
            "epochs": args.epochs,
            "batch": args.batch,
            "held_out": 0,
        }
        recipe = {"task": {"classify": {"length": args.length}}, "seed": args.seed, "evaluate": {"source": None}}
        prunella.heal(args.model, {**recipe, "heal": training}, output=folder, resume=True, watch=shown)
    return folder


def shown(step: int, steps: int, loss: float) -> None:
    print(f"{step}/{steps} {loss:.3f}", end="\r", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="minilm-l6")
    parser.add_argument("--dense", type=Path)
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--methods", nargs="+", default=[*METHODS, HEALED], choices=[*METHODS, HEALED])
    parser.add_argument("--healing", type=int, default=2048, help="training rows of the healed one")
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    dense = trained(args)
    rows = args.out / "encoders.jsonl"
    done = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.is_file() else []
    answers = args.out / "dense.answers"
    task: Any = make_task("classify", {"length": args.length})
    tested = sum(1 for line in args.test.open(encoding="utf-8") if line.strip())

    def measured(folder: Path, beside: Any) -> tuple[dict[str, Any], Any]:
        model = task.open(str(folder), dtype="float32")
        return measure(
            model, str(args.test), task.samples(model, str(args.test), tested, test=True), None, no_track, beside
        )

    def note(method: str, sparsity: float, found: dict[str, Any], **more: Any) -> None:
        kept = ("accuracy", "error", "loss", "samples", "agreement", "changed", "lost", "gained")
        row = {"method": method, "sparsity": sparsity, **{key: found[key] for key in kept if key in found}, **more}
        done.append(row)
        with rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        Console(stderr=True).print(row)

    def wanted(method: str, sparsity: float) -> bool:
        return not any((row["method"], row["sparsity"]) == (method, sparsity) for row in done)

    if wanted("dense", 0.0):
        found, theirs = measured(dense, {})
        save_file(theirs, answers)
        note("dense", 0.0, found)
    for sparsity, method in ((sparsity, method) for method in args.methods for sparsity in args.sparsities):
        if not wanted(method, sparsity):
            continue
        folder = args.out / f"{method.replace(' + ', '-').replace(', ', '-')}-{sparsity:g}"
        if method == HEALED:
            training = {"train": {"all": {"rate": args.rate / 2}}, "text": str(args.train), "samples": args.healing}
            training |= {"distill": 0.9, "epochs": 1, "batch": args.batch, "held_out": 0, "dense": str(dense)}
            recipe = {"task": {"classify": {"length": args.length}}, "seed": args.seed, "evaluate": {"source": None}}
            healed = prunella.heal(args.out / f"best-{sparsity:g}", {**recipe, "heal": training}, output=folder)
            found, _ = measured(folder, load_file(answers))
            note(method, sparsity, found, reached=healed.sparsity, seconds=healed.healing["seconds"])
            continue
        report = prunella.prune(
            str(dense),
            {
                "sparsity": sparsity,
                **METHODS[method],
                "calibration": {"source": str(args.train), "samples": args.samples, "length": args.length},
                "evaluate": {"source": None},
                "seed": args.seed,
            },
            output=folder,
        )
        found, _ = measured(folder, load_file(answers))
        note(method, sparsity, found, reached=report.sparsity, seconds=report.run["seconds"]["prune"])
    first = next(row for row in done if row["method"] == "dense")
    about = f"dense {first['accuracy']:.2%} ± {first['error']:.2%} on {first['samples']} texts"
    table = Table(title=f"{args.model}, {args.samples} calibration texts; {about}")
    for column in ("method", "sparsity", "accuracy", "difference", "lost", "gained", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in sorted((row for row in done if row is not first), key=lambda row: float(row["sparsity"])):
        table.add_row(
            str(row["method"]),
            f"{row['sparsity']:.0%}",
            f"{row['accuracy']:.2%}",
            f"{100 * (row['accuracy'] - first['accuracy']):+.2f}",
            str(row["lost"]),
            str(row["gained"]),
            f"{row['seconds']:.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
