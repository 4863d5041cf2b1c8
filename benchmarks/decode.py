"""One token at a time: packed products against the memory's speed, and whole models, dense beside packed.

    python benchmarks/decode.py [--threads N] [--rows 11008 --columns 4096] [--model llama-1b] [--tokens 128]

A perfect dense product is one that reads its bfloat16 weights at the measured read bandwidth. Everything is timed
in turns, and the lower quartile of each counts, so that a busy machine shows ratios that hold.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prunella.sparse.bench import bench, random_packed
from prunella.sparse.kernels import dense_linear, instructions, read_bandwidth, sparse_linear


def kernels(rows: int, columns: int, turns: int, out: Console) -> None:
    cases: dict[str, tuple[float, int | None, bool]] = {
        "bfloat16 50%": (0.5, None, False),
        "bfloat16 70%": (0.7, None, False),
        "bfloat16 2:4": (0.5, None, True),
        "int8 50%": (0.5, 8, False),
        "int4 50%": (0.5, 4, False),
    }
    packed = {name: random_packed(rows, columns, *case) for name, case in cases.items()}
    dense_OI = torch.randn(rows, columns).to(torch.bfloat16)
    x = torch.randn(1, columns).to(torch.bfloat16)
    # Pieces about as large as a packed weight: a longer read would be interrupted more often on a busy machine than
    # the products it is compared with, and flatter them. Each piece has left the cache when its turn comes again.
    pieces = itertools.cycle(torch.ones(1 << 28, dtype=torch.uint8).split(1 << 25))
    runs: dict[str, Callable[[], Any]] = {"read": lambda: read_bandwidth(next(pieces))}
    for name, p in packed.items():
        runs[name] = lambda p=p: sparse_linear(x, p.mask, p.offsets, p.values, p.scales, columns, p.group)
    runs["dense"] = lambda: dense_linear(x, dense_OI)
    runs["torch dense"] = lambda: torch.nn.functional.linear(x, dense_OI)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(turns):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    quartile = {name: sorted(values)[len(values) // 4] for name, values in times.items()}
    bandwidth = (1 << 25) / quartile["read"]
    dense_bytes = 2 * rows * columns
    perfect = dense_bytes / bandwidth
    title = f"{rows}x{columns}, one token; reads {bandwidth / 1e9:.1f} GB/s, perfect dense {perfect * 1e3:.2f} ms"
    table = Table("product", "size", "ms", "GB/s", "of read", "× perfect dense", "× torch dense", title=title)
    for name in (*packed, "dense", "torch dense"):
        nbytes = packed[name].nbytes if name in packed else dense_bytes
        seconds = quartile[name]
        table.add_row(
            name,
            f"{nbytes / dense_bytes:.3f}",
            f"{seconds * 1e3:.2f}",
            f"{nbytes / seconds / 1e9:.1f}",
            f"{nbytes / seconds / bandwidth:.2f}",
            f"{perfect / seconds:.2f}",
            f"{quartile['torch dense'] / seconds:.2f}",
        )
    out.print(table)


def models(shape: str, prompt: int, tokens: int, rounds: int, out: Console) -> None:
    table = Table("weights", "GB", "prefill t/s", "decode t/s", "of read", "× prefill", "× decode")
    table.title = f"{shape}, random weights: prompt of {prompt}, {tokens} tokens generated"
    for name, bits in (("packed 50%", None), ("packed 50% int8", 8)):
        result = bench(random=shape, bits=bits, prompt=prompt, tokens=tokens, rounds=rounds)
        for side in ("dense", "packed"):
            row = result[side]
            table.add_row(
                name if side == "packed" else "dense bfloat16",
                f"{row['bytes'] / 1e9:.2f}",
                f"{row['prefill']:.1f}",
                f"{row['decode']:.2f}",
                f"{row['bandwidth']:.2f}",
                "" if side == "dense" else f"{result['speedup']['prefill']:.2f}",
                "" if side == "dense" else f"{result['speedup']['decode']:.2f}",
            )
    out.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--model", default="llama-1b", help="a shape, or none")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out = Console(width=120)
    out.print(f"instructions: {', '.join(instructions()) or 'none compiled'}; threads: {arguments.threads}")
    kernels(arguments.rows, arguments.columns, arguments.turns, out)
    if arguments.model != "none":
        models(arguments.model, arguments.prompt, arguments.tokens, arguments.rounds, out)


if __name__ == "__main__":
    main()
