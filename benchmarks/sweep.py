"""Cells a minute: one `prunella sweep` beside one `prunella prune` for each of its cells.

    python benchmarks/sweep.py --steps magnitude wanda sparsegpt --sparsity 0.5 0.6

Both prune the same model on the same windows and measure the same perplexities; seconds are wall clock, CPU-seconds
are those of the processes. Prints a table, and the perplexities that differ, if any do.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table


def timed(*arguments: str) -> tuple[str, float, float]:
    """Run the command line: what it printed, seconds, CPU-seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", "from prunella.cli import main; main()", *arguments]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return result.stdout, time.perf_counter() - start, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", nargs="+", default=["magnitude", "wanda", "sparsegpt"], help="such as wanda+update")
    parser.add_argument("--sparsity", nargs="+", default=["0.5", "0.6"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    args = parser.parse_args()
    cells = [(step, share) for share in args.sparsity for step in args.steps]
    shared = [f"calibration.samples={args.samples}", f"calibration.length={args.length}"]
    shared = [part for setting in (*shared, f"evaluate.windows={args.windows}") for part in ("--set", setting)]
    with tempfile.TemporaryDirectory() as scratch:
        single, alone, alone_cpu = [], 0.0, 0.0
        for step, share in cells:
            out = str(Path(scratch) / f"{step}-{share}")
            steps = [part for name in step.split("+") for part in ("--step", name)]
            command = ["prune", args.model, "-o", out, *steps, "--sparsity", share, *shared, "--json"]
            text, seconds, cpu = timed(*command)
            alone, alone_cpu = alone + seconds, alone_cpu + cpu
            single.append(json.loads(text)["pruned"]["perplexity"])
        axes = [part for step in args.steps for part in ("--step", step)]
        axes += [part for share in args.sparsity for part in ("--sparsity", share)]
        text, together, together_cpu = timed("sweep", args.model, "-o", f"{scratch}/sweep", *axes, *shared, "--json")
    found = [next(iter(row["perplexity"].values())) for row in json.loads(text)[1:]]
    table = Table(title=f"{len(cells)} cells of {args.model}")
    for column in ("", "one by one", "sweep", "times as fast"):
        table.add_column(column, justify="right" if column else "left")
    for name, one, all_ in (("seconds", alone, together), ("CPU-seconds", alone_cpu, together_cpu)):
        table.add_row(name, f"{one:.1f}", f"{all_:.1f}", f"{one / all_:.2f}")
    rates = (f"{60 * len(cells) / seconds:.2f}" for seconds in (alone, together))
    table.add_row("cells a minute", *rates, f"{alone / together:.2f}")
    Console().print(table)
    for cell, one, other in zip(cells, single, found, strict=True):
        if one != other:
            print(f"{cell}: perplexity {one} alone, {other} in the sweep")


if __name__ == "__main__":
    main()
