"""One token at a time: packed products against the memory's speed, and whole models, dense beside packed beside
llama.cpp.

    python benchmarks/decode.py [--threads 1 2] [--rows 11008 --columns 4096] [--model llama-1b] [--tokens 128]
                                [--llama DIRECTORY]

A perfect dense product is one that reads its bfloat16 weights at the measured read bandwidth. Everything is timed
in turns; of the products the lower quartile counts, of the models the median, so that a busy machine shows ratios
that hold. llama.cpp (llama-cpp-python from PyPI) is built into an environment of its own, once: that takes long.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _peer import Peer
from rich.console import Console
from rich.table import Table

from prunella.machine import cache_directory
from prunella.sparse.bench import measure, packed_copy, random_network
from prunella.sparse.format import Packed, pack
from prunella.sparse.kernels import dense_linear, instructions, read_bandwidth, resident, sparse_linear


def random_packed(rows: int, columns: int, sparsity: float, bits: int | None = None, nm: bool = False) -> Packed:
    """A random bfloat16 weight at this sparsity (or 2:4), packed: something to time kernels on."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(rows, columns, generator=generator).to(torch.bfloat16)
    if nm:
        order = torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1).argsort(-1)
        mask_OI = (order < 2).view(rows, columns)
    else:
        mask_OI = torch.rand(rows, columns, generator=generator) >= sparsity
    return pack(weight_OI * mask_OI, mask_OI, bits)


def kernels(rows: int, columns: int, turns: int, out: Console) -> None:
    cases: dict[str, tuple[float, int | None, bool]] = {
        "bfloat16 50%": (0.5, None, False),
        "bfloat16 70%": (0.7, None, False),
        "bfloat16 2:4": (0.5, None, True),
        "int8 50%": (0.5, 8, False),
        "int4 50%": (0.5, 4, False),
    }
    packed = {name: _resident(random_packed(rows, columns, *case)) for name, case in cases.items()}
    (dense_OI,) = resident([torch.randn(rows, columns).to(torch.bfloat16)])
    x = torch.randn(1, columns).to(torch.bfloat16)
    # Pieces about as large as a packed weight: a longer read would be interrupted more often on a busy machine than
    # the products it is compared with, and flatter them. Each piece has left the cache when its turn comes again.
    (memory,) = resident([torch.ones(1 << 28, dtype=torch.uint8)])
    pieces = itertools.cycle(memory.split(1 << 25))
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


def _resident(p: Packed) -> Packed:
    """As `settle` places it in a model."""
    mask, offsets, values, *scales = resident(list(p.parts().values()))
    return Packed(mask, offsets, values, scales[0] if scales else None, p.columns, p.group)


def llama_of(directory: Path, network: Any, threads: int) -> Peer:
    """llama.cpp with random weights of a network's shape."""
    config = network.config
    shape = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_hidden_layers)
    heads = (config.num_attention_heads, config.num_key_value_heads)
    packages = ("llama-cpp-python", "gguf")
    return Peer(directory, packages, "_llama_worker.py", directory, *shape, *heads, threads)


def models(shape: str, prompt: int, tokens: int, rounds: int, llama: Path | None, threads: int, out: Console) -> None:
    dense = random_network(shape)
    networks = {
        "dense bfloat16": dense,
        "packed 50%": packed_copy(dense, 0.5),
        "packed 50% int8": packed_copy(dense, 0.5, 8),
        "the same, head too": packed_copy(dense, 0.5, 8, round_head=True),
    }
    beside: dict[str, Callable[[int], None]] = {}
    peer = None
    if llama is not None:
        try:
            peer = llama_of(llama, dense, threads)
            beside = {
                "llama.cpp BF16": lambda count: peer.ask("BF16", count),
                "llama.cpp Q8_0": lambda count: peer.ask("Q8_0", count),
            }
        except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
            out.print(f"without llama.cpp, which could not be built or run: {error}")
    try:
        result = measure(networks, prompt, tokens, rounds, beside)
    finally:
        if peer is not None:
            peer.close()
    table = Table("weights", "GB", "prefill t/s", "decode t/s", "of read", "× prefill", "× decode", "× BF16", "× Q8_0")
    read = result["read_bandwidth"] / 1e9
    table.title = f"{shape}, random weights: prompt of {prompt}, {tokens} tokens generated; reads {read:.1f} GB/s"
    first = result["dense bfloat16"]

    def ratio(row: dict[str, float], key: str, other: dict[str, float] | None) -> str:
        return f"{row[key] / other[key]:.2f}" if other and key in row else ""

    for name in (*networks, *beside):
        row = result[name]
        table.add_row(
            name,
            *(f"{row[key] * unit:.{digits}f}" if key in row else "" for key, unit, digits in _COLUMNS),
            *(ratio(row, key, first) for key in ("prefill", "decode")),
            *(ratio(row, "decode", result.get(f"llama.cpp {kind}")) for kind in ("BF16", "Q8_0")),
        )
    out.print(table)


_COLUMNS = (("bytes", 1e-9, 2), ("prefill", 1, 1), ("decode", 1, 2), ("bandwidth", 1, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--rows", type=int, default=11008)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=40)
    parser.add_argument("--model", default="llama-1b", help="a shape, or none")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--llama", default=str(cache_directory() / "llama.cpp"), help="its environment, or none")
    arguments = parser.parse_args()
    out = Console(width=120)
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        out.print(f"instructions: {', '.join(instructions()) or 'none compiled'}; threads: {threads}")
        kernels(arguments.rows, arguments.columns, arguments.turns, out)
        if arguments.model != "none":
            llama = None if arguments.llama == "none" else Path(arguments.llama)
            models(arguments.model, arguments.prompt, arguments.tokens, arguments.rounds, llama, threads, out)


if __name__ == "__main__":
    main()
