"""One-shot pruning, Prunella beside llm-compressor: same model, tokens and cores, in turns.

    python benchmarks/prune.py --calibration c4.jsonl --text wikitext2-test.txt --cores 1

Every run is a process of its own, import, loading and saving included. llm-compressor lives in an environment
that this script makes (--peers DIR). Prints wall seconds, CPU-seconds, peak resident memory and perplexity.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import prunella
from prunella.calibrate import windows
from prunella.model.names import find_directory
from prunella.tasks.text import load_model
from prunella.texts import same_text

HERE = Path(__file__).parent
PEER = "llmcompressor==0.14.0.1"


def peer_python(directory: Path) -> str:
    """The interpreter of an environment with llm-compressor, made on first use."""
    python = directory / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", directory], check=True)
        for package in ("torch==2.13.0", PEER):
            subprocess.run([python, "-m", "pip", "install", "--quiet", package], check=True)
    return str(python)


def measure(command: list[str], cores: int) -> dict[str, float]:
    """Run one process on `cores` cores: wall and CPU seconds, peak resident bytes."""
    env = dict(os.environ, OMP_NUM_THREADS=str(cores), MKL_NUM_THREADS=str(cores), HF_HUB_OFFLINE="1")
    chosen = set(sorted(os.sched_getaffinity(0))[:cores])
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, chosen),
    )
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{errors[-3000:]}")
    return {
        "seconds": time.perf_counter() - started,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--calibration", default="pydoc")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--steps", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--orders", nargs="+", default=["layer", "block"])
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peers", type=Path, default=Path(".cache/llmcompressor"))
    parser.add_argument("--no-peer", action="store_true", help="Prunella alone")
    parser.add_argument("--json", type=Path, help="append each run here as a line")
    args = parser.parse_args()

    model = load_model(args.model, dtype="bfloat16")
    directory = str(find_directory(args.model))
    calibration = windows(model, args.calibration, args.samples, args.length)
    skip = args.samples if same_text(args.calibration, args.text) else 0
    text = windows(model, args.text, args.windows, args.length, skip=skip, split="test")
    runs = [("prunella", step, order) for step in args.steps for order in args.orders]
    if not args.no_peer:
        runs += [("llm-compressor", step, "") for step in args.steps]

    table = Table(title=f"{args.model}, 50%, {args.samples} windows of {args.length}, bfloat16, {args.cores} core(s)")
    for column in ("tool", "step", "order", "seconds", "CPU-seconds", "peak GB", "perplexity"):
        table.add_column(column, justify="left" if column in ("tool", "step", "order") else "right")
    with tempfile.TemporaryDirectory() as scratch:
        tokens = f"{scratch}/tokens.npy"
        np.save(tokens, calibration.numpy())
        for turn in range(args.rounds):
            for tool, step, order in runs:
                out = f"{scratch}/{tool}-{step}-{order}-{turn}"
                if tool == "prunella":
                    command = [sys.executable, str(HERE / "_prunella_worker.py"), directory, tokens, step, out, order]
                else:
                    python = peer_python(args.peers)
                    command = [python, str(HERE / "_llmcompressor_worker.py"), directory, tokens, step, out]
                result = measure(command, args.cores)
                result["perplexity"] = prunella.perplexity(load_model(out), text).perplexity
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps({"tool": tool, "step": step, "order": order, **result}) + "\n")
                table.add_row(
                    tool,
                    step,
                    order,
                    f"{result['seconds']:.0f}",
                    f"{result['cpu_seconds']:.0f}",
                    f"{result['memory'] / 1e9:.2f}",
                    f"{result['perplexity']:.2f}",
                )
                Console(stderr=True).print(table)
    Console().print(table)


if __name__ == "__main__":
    main()
