"""Encoders and vision networks on processors: pruned ones in Prunella and in DeepSparse, dense ones in all engines.

    python benchmarks/engines.py [--rows minilm-l6:1,resnet-50:16] [--threads 1 2] [--sparsities 0.7 0.8 0.9]
                                 [--engines onnxruntime …] [--deepsparse DIRECTORY] [--json FILE]

Random weights of the true architecture, each layer pruned by magnitude; pictures of 224 pixels, texts of 128 tokens.
All engines that run one network on one batch take turns; of the times the least and the median are shown, and ratios
are of the least. `taskset -c 1` in front holds all of them on one core. ONNX Runtime and OpenVINO come with the extra
`engines`. DeepSparse (1.8.0; closed source, for measuring only) is put into an environment of its own, once, where
Python is not newer than 3.11.

Rows are appended to the file at once; those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _peer import Peer
from rich.console import Console
from rich.table import Table

from prunella.bench.engines import ENGINES, Case, check_engines, open_engines
from prunella.bench.memory import resident_bytes
from prunella.bench.run import difference, fractions
from prunella.bench.shapes import SHAPES, random_directory
from prunella.bench.sides import open_sides, random_batch
from prunella.bench.turns import in_turns
from prunella.errors import InputError
from prunella.machine import cache_directory, threaded
from prunella.model.network import Model
from prunella.sparse.bench import held_bytes
from prunella.sparse.kernels import instructions
from prunella.tasks import open_model

PACKAGES = ("deepsparse==1.8.0", "numpy<2")
OPSET = 14  # the newest that DeepSparse reads
OURS, THEIRS, TORCH = "prunella", "deepsparse", "torch"
GOALS = {0.8: (1.1, 1.25), 0.9: (1.3, 1.8)}  # times as fast as DeepSparse, and as the fastest dense float32 engine
LEVEL = {0.7: ("minilm-l6", "bert-base")}  # networks that are to be as fast as the fastest dense engine
MEMORY = {0.8: 2.0}  # times as much memory in torch
TWO = 1.7  # times as fast on two threads as on one


class DeepSparse:
    """The engine, in a process of its own."""

    def __init__(self, directory: Path):
        self.peer = Peer(directory, PACKAGES, "_deepsparse_worker.py")

    def open(self, name: str, case: Case, threads: int) -> tuple[Callable[[], float], list[Any]]:
        """What runs a case, and times itself, and what the network puts out. Raises RuntimeError."""
        inputs, found = case.folder / "inputs.npz", case.folder / "outputs.npz"
        np.savez(inputs, **case.feed)
        size = len(next(iter(case.feed.values())))
        self._ask("open", name, case.export(OPSET), inputs, found, size, threads)
        with np.load(found) as arrays:
            return lambda: float(self._ask("run", name)), [arrays[key] for key in arrays.files]

    def close(self, name: str) -> None:
        self._ask("close", name)

    def _ask(self, *words: object) -> str:
        said = self.peer.ask(*words)
        if said.startswith("failed: "):
            raise RuntimeError(said.removeprefix("failed: "))
        return said


def measured(
    shape: str,
    batch: int,
    threads: int,
    sparsities: Sequence[float],
    engines: Sequence[str],
    peer: DeepSparse | None,
    rounds: int,
    seconds: float,
    memory: bool,
) -> dict[str, Any]:
    """A row: {"shape", "batch", "threads", "times": {contender: {"min", "median", …}}, "apart": {contender: how far
    its outputs are from torch's}, "bytes" of weights, and of "memory" if asked for, "left out": {contender: why}}."""
    runs: dict[str, Callable[[], Any]] = {}
    apart: dict[str, float] = {}
    nbytes: dict[str, int] = {}
    held: dict[str, int] = {}
    left: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(threaded(threads))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="prunella-engines-")))

        def of(name: str, model: Model) -> tuple[Case, list[torch.Tensor], Callable[[], Any]]:
            (folder := scratch / name).mkdir()
            case = Case(model, random_batch(model, batch), folder)
            call = case.call(model.network)
            return case, fractions(call()), call

        def theirs(name: str, case: Case, wanted: list[torch.Tensor]) -> None:
            if peer is None:
                return
            try:
                runs[name], found = peer.open(name, case, threads)
            except RuntimeError as error:
                left[name] = str(error)
            else:
                stack.callback(peer.close, name)
                apart[name] = difference(fractions(found), wanted)

        model = stack.enter_context(dense(shape))
        case, wanted, runs[TORCH] = of("dense", model)
        nbytes[TORCH] = held_bytes(model.network)
        more, failed = open_engines(engines, case, threads)
        runs, left = runs | more, left | failed
        apart |= {name: difference(fractions(run()), wanted) for name, run in more.items()}
        theirs(THEIRS, case, wanted)
        for sparsity in sparsities:
            sides = stack.enter_context(open_sides(None, shape, sparsity))
            case, wanted, _ = of(f"pruned-{sparsity:g}", sides.model)
            ours = f"{OURS} {sparsity:.0%}"
            runs[ours] = case.call(sides.packed)
            apart[ours], nbytes[ours] = difference(fractions(runs[ours]()), wanted), held_bytes(sides.packed)
            theirs(f"{THEIRS} {sparsity:.0%}".replace(" ", "-"), case, wanted)
            if memory:
                held[ours] = resident_bytes(sides.directories["packed"], batch, None, threads)
                held[TORCH] = held.get(TORCH) or resident_bytes(sides.directories["dense"], batch, None, threads)
        times = in_turns(runs, rounds, seconds)
    return {
        "shape": shape,
        "batch": batch,
        "threads": threads,
        "instructions": (instructions() or ["none"])[0],
        "times": {name.replace("-", " ") if name.startswith(THEIRS) else name: t.plain() for name, t in times.items()},
        "apart": apart,
        "bytes": nbytes,
        "memory": held,
        "left out": left,
    }


@contextlib.contextmanager
def dense(shape: str) -> Iterator[Model]:
    """A network of which nothing is pruned."""
    with tempfile.TemporaryDirectory(prefix="prunella-engines-") as folder:
        random_directory(shape, 0.0, Path(folder))
        model = open_model(folder, device="cpu")
        with model.whole():
            model.name = shape
            model.give_back()
            model.network.eval()
            yield model


def goals(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, int, int, str, float, float]]:
    """What a row reaches: (shape, batch, threads, what, ratio, goal)."""
    single = {(row["shape"], row["batch"]): row["times"] for row in rows if row["threads"] == 1}
    for row in rows:
        where, least = (row["shape"], row["batch"], row["threads"]), {k: t["min"] for k, t in row["times"].items()}
        floats = [least[name] for name in (TORCH, "onnxruntime", "openvino", THEIRS) if name in least]
        for name in least:
            if not name.startswith(f"{OURS} "):
                continue
            share = name.removeprefix(f"{OURS} ")
            sparsity, other = float(share.rstrip("%")) / 100, f"{THEIRS} {share}"
            beside, above = GOALS.get(sparsity, (0.0, 0.0))
            above = above or float(row["shape"] in LEVEL.get(sparsity, ()))
            if other in least:
                yield *where, f"{share}: × DeepSparse", least[other] / least[name], beside
            yield *where, f"{share}: × the fastest dense", min(floats) / least[name], above
            if name in row["memory"]:
                least_memory = row["memory"][TORCH] / row["memory"][name]
                yield *where, f"{share}: torch's memory over ours", least_memory, MEMORY.get(sparsity, 0.0)
            if row["threads"] == 2 and name in (one := single.get(where[:2], {})):
                yield *where, f"{share}: × one thread", one[name]["min"] / least[name], TWO


def show(rows: Sequence[Mapping[str, Any]], out: Console) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["times"]))
    table = Table(title="milliseconds, the least (the median)")
    for column in ("", *(f"{row['shape']}\n{row['batch']} × {row['threads']} thr." for row in rows)):
        table.add_column(column, justify="right" if column else "left")
    for name in names:
        cells = [
            f"{1e3 * t['min']:,.1f} ({1e3 * t['median']:,.1f})" if (t := row["times"].get(name)) else "" for row in rows
        ]
        table.add_row(name, *cells)
    out.print(table)
    table = Table(title="reached, by the least")
    for column in ("network", "batch", "threads", "", "ratio", "goal", "met"):
        table.add_column(column, justify="left" if column in ("network", "", "met") else "right")
    for shape, batch, threads, what, ratio, goal in goals(rows):
        met = "" if not goal else "yes" if ratio >= goal else "no"
        table.add_row(shape, str(batch), str(threads), what, f"{ratio:.2f}", f"{goal:.2f}" if goal else "", met)
    out.print(table)
    for row in rows:
        for name, why in row["left out"].items():
            out.print(f"{row['shape']}, batch {row['batch']}: {name} is left out: {why}")
        for name, apart in row["apart"].items():
            if not apart < 1e-4 and name not in ("torch-bfloat16", "onnxruntime-int8", "openvino-int8"):
                out.print(f"{row['shape']}, batch {row['batch']}: outputs of {name} are {apart:.1e} off")


def peer_of(directory: str) -> DeepSparse | None:
    if directory == "none":
        return None
    try:
        if sys.version_info[:2] > (3, 11) and not (Path(directory) / "ready").exists():
            raise RuntimeError("it takes Python 3.11")
        return DeepSparse(Path(directory))
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"without DeepSparse, which could not be installed or run: {error}", file=sys.stderr)
        return None


def main() -> None:
    every = [f"{shape}:{batch}" for shape in SHAPES for batch in (1, 16)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(every), help="network:batch, by commas")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.7, 0.8, 0.9])
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--deepsparse", default=str(cache_directory() / "deepsparse"), help="its environment, or none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn, at least")
    parser.add_argument("--memory", action="store_true", help="measure it too, in a process for each")
    parser.add_argument("--json", type=Path, default=Path("engines.jsonl"), help="where rows that are done are kept")
    given = parser.parse_args()
    asked = [(*row.rpartition(":")[::2], threads) for threads in given.threads for row in given.rows.split(",")]
    for shape, batch, _ in asked:
        if shape not in SHAPES or not batch.isdigit() or int(batch) < 1:
            parser.error(f"no row '{shape}:{batch}': networks are {', '.join(SHAPES)}, batches 1, 16, …")
    engines = []
    for name in given.engines:
        try:
            check_engines([name])
            engines.append(name)
        except InputError as error:
            print(f"without {name}: {error}", file=sys.stderr)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < max(given.threads):
        print(f"{max(given.threads)} threads share {cores} cores: ratios between threads say nothing", file=sys.stderr)
    done = []
    if given.json.is_file():
        done = [json.loads(line) for line in given.json.read_text(encoding="utf-8").splitlines()]
    peer = peer_of(given.deepsparse)
    rows, out = [], Console(width=200)
    for shape, batch, threads in asked:
        where = (shape, int(batch), threads)
        row = next((row for row in done if (row["shape"], row["batch"], row["threads"]) == where), None)
        if row is None:
            row = measured(*where, given.sparsities, engines, peer, given.rounds, given.seconds, given.memory)
            with given.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        rows.append(row)
        if len(asked) > 1:
            show([row], out)
    show(rows, out)
    if peer is not None:
        peer.peer.close()


if __name__ == "__main__":
    main()
