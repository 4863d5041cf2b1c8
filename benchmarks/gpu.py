"""Everything that runs on a GPU, checked and timed by one command, in one table.

    python benchmarks/gpu.py [--json FILE] [--only check --only run ...] [--minutes 8] [--model llama-1b] [--tune]
    python benchmarks/gpu.py --interpret     # without a GPU: the checks and whole runs, small, in Triton's interpreter
    python benchmarks/gpu.py --simulate      # without a GPU: whole runs, small, on the simulated accelerator of tests

    check     products with packed weights against float64, column passes and swaps against torch's, a packed model's
              logits against the dense one's, masks that are pruned here against those of the CPU
    run       whole runs on random weights of a 7B shape in bfloat16, which are made on the spot (13.5 GB in --folder):
              SparseGPT and Wanda on 128 and on 32 windows of 2,048 tokens, `best` on a few blocks; healing, packing,
              decoding; each phase beside an estimate and its reasoning; the built-in model's perplexities
    decode    one and a few tokens, 11008x4096, beside torch's dense bfloat16
    prefill   many tokens, packed, dense and 2:4 on sparse tensor cores
    model     tokens per second of a whole random model, dense beside packed, as it is and as a CUDA graph
    prune     the column pass and DSnoT's swaps, torch beside Triton; a block of a 7B shape

Where to look first, if something fails that no test without a GPU can find, in this order:

    check     Triton: a kernel that does not compile says so at its first launch (gpu.py and columns_gpu.py, whose loads
              through pointers cast to 64-bit words and whose scans the interpreter takes more lightly). Masks unlike
              the CPU's by more than 0.5%: products in TF32 (`machine.exact_products`)
    run       "statistics" ten times the estimate: torch.mm(…, out_dtype=…) was refused, and `fast._sums_in_float32`
              says no; "solve": the sort of one long row in `pattern._lowest`, eigh and Cholesky of cuSOLVER, whose
              first call loads it (the first part pays for that); "load": memory that is not pinned (`walk.ReadAhead`);
              "write": the thread waits for the disk (`save.Output`); "forward": attention that is not flash
    heal      more than a step's 1.2: masked weights are put together anew for each micro batch (train/parts.py)
    decode    a CUDA graph that cannot be captured: something asks the device, see `accelerator.count` of the tests,
              which finds none in a step with a static cache
    prefill   2:4 needs cuSPARSELt on compute capability 9.0: CUTLASS's kernels in torch are for 8.x

It needs no network and no model. Products are timed as replays of a CUDA graph over several copies of the weight
that together are larger than the cache, so neither launches nor the cache count. What matters most comes first, and no
part begins after --minutes; each row is printed and appended to the file at once, a JSON object a line, and a second
call with the same file goes on with what is not done there. Exits with 1 if a check fails or anything raises.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
INTERPRET, SIMULATE = "--interpret" in sys.argv, "--simulate" in sys.argv
if INTERPRET:
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are defined

import torch  # noqa: E402
import transformers  # noqa: E402
import triton  # noqa: E402
from _whole import Runs, estimates  # noqa: E402
from decode import random_packed  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

import prunella  # noqa: E402
from prunella import columns as passes  # noqa: E402
from prunella import columns_gpu  # noqa: E402
from prunella.linalg import InverseFactor  # noqa: E402
from prunella.sparse import bench, gpu, linear, semi  # noqa: E402
from prunella.sparse.format import Packed, pack, round_weight, unpack  # noqa: E402
from prunella.sparse.linear import SparseLinear  # noqa: E402
from prunella.steps import dsnot  # noqa: E402
from prunella.types import Pattern  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRET or SIMULATE else "cuda")
if INTERPRET:  # which takes as long for a program of many rows as for one of few
    gpu.ROWS, columns_gpu.TILE_ROWS = 64, 64
GIB = 1 << 30


@dataclass(frozen=True)
class Row:
    """A line of the table. part: of what it was found by; ok: of a check; None: it is a figure."""

    part: str
    section: str
    what: str
    value: str
    beside: str = ""
    ok: bool | None = None


class Report:
    """What was found so far, said and written down as it comes. done: parts that an earlier call ended."""

    def __init__(self, out: Console, path: Path | None = None):
        self.out, self.path = out, path
        self.rows: list[Row] = []
        self.part = ""
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.is_file() else []
        found = [entry for entry in map(json.loads, lines) if entry.pop("on") == title()]
        self.done = {entry["done"] for entry in found if "done" in entry}
        self.rows += [Row(**entry) for entry in found if entry.get("part") in self.done]

    def add(self, section: str, what: str, value: str, beside: str = "", ok: bool | None = None) -> None:
        self.rows.append(Row(self.part, section, what, value, beside, ok))
        self._write(asdict(self.rows[-1]))
        mark = "" if ok is None else " ok" if ok else " FAILED"
        self.out.print(f"{section}: {what}: {value} {beside}{mark}", highlight=False, markup=False)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"on": title(), **entry}) + "\n")

    def run(self, part: str, section: str, work: Callable[[], None]) -> None:
        """Do a part, unless it is done. One that raises is not, and is tried again by the next call."""
        if part in self.done:
            return
        self.part = part
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            self.add(section, f"{part} stopped", f"{type(error).__name__}: {error}"[:100], ok=False)
        else:
            self._write({"done": part})

    def check(self, what: str, error: float, limit: float) -> None:
        self.add("check", what, f"{error:.1e}", f"at most {limit:.0e}", ok=error <= limit)  # NaN fails

    def table(self) -> Table:
        table = Table("", "what", "", "", "", title=title())
        last = ""
        for row in self.rows:
            mark = "" if row.ok is None else "ok" if row.ok else "[bold red]FAILED"
            table.add_row(row.section if row.section != last else "", row.what, row.value, row.beside, mark)
            last = row.section
        return table


def title() -> str:
    name = "Triton's interpreter" if INTERPRET else "simulated" if SIMULATE else torch.cuda.get_device_name()
    return f"{name}; torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}"


# ---------------------------------------------------------------------------------------------------------
# Checks


def moved(p: Packed) -> Packed:
    scales = None if p.scales is None else p.scales.to(DEVICE)
    return Packed(p.mask.to(DEVICE), p.offsets.to(DEVICE), p.values.to(DEVICE), scales, p.columns, p.group)


def product(x: Tensor, p: Packed) -> Tensor:
    operator = gpu.sparse_linear if INTERPRET else torch.ops.prunella.sparse_linear
    y: Tensor = operator(x, p.mask, p.offsets, p.values, p.scales, p.columns, p.group)
    return y


def distance(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30))


def check_products(report: Report) -> None:
    some = [(1, 1), (7, 5), (9, 300)] if INTERPRET else [(1, 1), (7, 5), (70, 129), (5, 2113)]
    kinds = [(torch.float32, None), (torch.float16, None), (torch.bfloat16, None)]
    kinds += [(dtype, bits) for dtype in (torch.float32, torch.bfloat16) for bits in (8, 4)]
    generator = torch.Generator().manual_seed(0)
    for dtype, bits in kinds:
        for group in (128,) if bits is None else (128, 0):
            worst = 0.0
            # A large one takes seconds to pack: once for each kind of values.
            large = dtype == torch.bfloat16 and group == 128 and not INTERPRET
            for rows, columns in [*some, *([(4096, 11008)] if large else [])]:
                density_O1 = torch.rand(rows, 1, generator=generator)
                density_O1[::5], density_O1[1::5] = 0.0, 1.0  # empty rows and full ones
                mask_OI = torch.rand(rows, columns, generator=generator) < density_O1
                weight_OI = (torch.randn(rows, columns, generator=generator) * mask_OI).to(dtype)
                p = moved(pack(weight_OI, mask_OI, bits, group))
                exact_OI = unpack(p, torch.float32 if bits else None).double()
                for tokens in (1, 3, gpu.FEW + 1) if INTERPRET else (1, 2, 3, gpu.FEW, gpu.FEW + 1, 100):
                    x = torch.randn(tokens, columns, generator=generator).to(dtype).to(DEVICE)
                    worst = max(worst, distance(product(x, p), x.double() @ exact_OI.T))
            limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}[dtype]
            name = str(dtype).removeprefix("torch.")
            values = "" if bits is None else f" x {bits} bits, {f'groups of {group}' if group else 'a scale a row'}"
            report.check(f"product, {name}{values}", worst, limit)
    for dtype in (torch.float32, torch.bfloat16):
        worst = 0.0
        for rows, columns in some if INTERPRET else [*some, (4096, 11008)]:
            rounded = round_weight(torch.randn(rows, columns, generator=generator))
            values, scales = rounded.values.to(DEVICE), rounded.scales.to(DEVICE)
            for tokens in (1, 3, gpu.FEW, gpu.FEW + 1):
                x = torch.randn(tokens, columns, generator=generator).to(dtype).to(DEVICE)
                operator = gpu.rounded_linear if INTERPRET else torch.ops.prunella.rounded_linear
                exact_OI = rounded.dense(torch.float64 if tokens <= gpu.FEW else dtype).double().to(DEVICE)
                found = operator(x, values, scales, rounded.group)
                worst = max(worst, distance(found, x.double() @ exact_OI.T))
        name = str(dtype).removeprefix("torch.")
        report.check(f"product, {name} x 8 bits, nothing left out", worst, 1e-5 if dtype == torch.float32 else 8e-3)


def factor(width: int) -> InverseFactor:
    generator = torch.Generator().manual_seed(1)
    x_TI = torch.randn(2 * width, width, generator=generator).to(DEVICE)
    hessian_II = (x_TI.T @ x_TI / len(x_TI)).double()
    upper_II = torch.linalg.cholesky(torch.linalg.inv(hessian_II), upper=True).float().contiguous()
    return InverseFactor(upper_II, torch.zeros(width, dtype=torch.bool, device=DEVICE), 0.01)


def swept(kernel: Callable[..., Tensor], weight_OI: Tensor, of: InverseFactor, *rest: Any, **options: Any) -> Any:
    before = passes.tiles.get(DEVICE.type)
    passes.tiles[DEVICE.type] = kernel
    try:
        return passes.column_pass(weight_OI, of, None, *rest, **options)
    finally:
        if before is not None:
            passes.tiles[DEVICE.type] = before


def check_passes(report: Report) -> None:
    rows, columns, tile = (12, 48, 16) if INTERPRET else (1024, 1024, 128)
    generator = torch.Generator().manual_seed(2)
    weight_OI = torch.randn(rows, columns, generator=generator).to(DEVICE)
    of = factor(columns)
    for text in ("unstructured", "2:4", "4:8"):
        for bits in (None, 4):
            options = (0.5, Pattern.parse(text))
            wanted, mask_OI, _ = swept(passes.plain_tile, weight_OI, of, *options, tile=tile, bits=bits)
            found, kept_OI, _ = swept(columns_gpu.tile_pass, weight_OI, of, *options, tile=tile, bits=bits)
            what = f"column pass, {text}{'' if bits is None else f', {bits} bits'}"
            report.check(f"{what}: masks that differ", float((mask_OI != kept_OI).float().mean()), 2e-3)
            same_O = (mask_OI == kept_OI).all(1)
            if bits is None:  # rounding makes a large difference of a small one, as it should
                report.check(f"{what}: weights", distance(found[same_O], wanted[same_O]), 1e-3)
    for span in (0, 4):
        arguments = swap_case(rows, columns, span)
        wanted, found = (run(*arguments, 20, 1e-4, span > 0, span) for run in (dsnot.plain_swap, columns_gpu.swap))
        report.check(f"DSnoT's swaps, span {span}: masks that differ", float((wanted != found).float().mean()), 1e-4)


def swap_case(rows: int, columns: int, span: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    d_OI = (torch.randn(rows, columns, generator=generator) + 0.1).to(DEVICE)
    wanda_OI = torch.rand(rows, columns, generator=generator).to(DEVICE)
    pattern = Pattern("nm", span // 2, span) if span else Pattern()
    mask_OI = prunella.keep(wanda_OI, 0.5, pattern, group="row")
    return mask_OI, d_OI, d_OI.clone(), wanda_OI, (d_OI * ~mask_OI).sum(1)


def small(**changes: Any) -> Any:
    """A small random LLaMA on the device, in float32."""
    shape = bench.SHAPES["tiny"] | changes
    if INTERPRET:
        shape |= {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**shape)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().to(DEVICE)


def check_model(report: Report) -> None:
    for bits in (None, 8, 4):
        dense = small()
        packed = copy.deepcopy(dense)
        head = packed.get_output_embeddings()
        for name, module in list(packed.named_modules()):
            if type(module) is nn.Linear and module is not head:
                mask_OI = torch.rand(module.weight.shape, device=DEVICE) >= 0.5
                weight_OI = (module.weight * mask_OI).detach().cpu()
                p = moved(pack(weight_OI, mask_OI.cpu(), bits))
                packed.set_submodule(name, SparseLinear(p))
                dense.get_submodule(name).weight.data.copy_(unpack(p, torch.float32))
        prompt = torch.randint(3, dense.config.vocab_size, (1, 4 if INTERPRET else 40), device=DEVICE)
        before = linear.sparse_linear
        linear.sparse_linear = gpu.sparse_linear if INTERPRET else before
        try:
            with torch.inference_mode():
                for ids in (prompt, prompt[:, :1]):
                    error = distance(packed(ids).logits, dense(ids).logits)
                    what = f"logits of a packed model, {bits or 32} bits, {ids.shape[1]} tokens"
                    report.check(what, error, 1e-4)
        finally:
            linear.sparse_linear = before


def check_pruning(report: Report) -> None:
    """The masks of the same model, pruned on this device and on the CPU (in the interpreter: with and without
    Triton)."""
    ids_NL = torch.randint(3, 64, (4, 32), generator=torch.Generator().manual_seed(0))
    for steps, pattern in (
        (["magnitude"], "unstructured"),
        (["wanda"], "2:4"),
        (["sparsegpt"], "unstructured"),
        (["sparsegpt"], "2:4"),
        (["wanda", "dsnot"], "unstructured"),
    ):
        recipe = {"steps": steps, "pattern": pattern, "sparsity": 0.5}
        here, there = small(), small().cpu()
        before = passes.tiles["cpu"], dsnot.swaps["cpu"]
        if INTERPRET:
            passes.tiles["cpu"], dsnot.swaps["cpu"] = columns_gpu.tile_pass, columns_gpu.swap
        try:
            prunella.prune(here, recipe, calibration=ids_NL)
        finally:
            passes.tiles["cpu"], dsnot.swaps["cpu"] = before
        prunella.prune(there, recipe, calibration=ids_NL)
        differ = total = 0
        for a, b in zip(here.parameters(), there.parameters(), strict=True):
            if a.ndim == 2:
                differ += int(((a == 0).cpu() != (b == 0)).sum())
                total += a.numel()
        report.check(f"pruned with {' + '.join(steps)}, {pattern}: masks unlike the CPU's", differ / total, 5e-3)


# ---------------------------------------------------------------------------------------------------------
# Times


def milliseconds(runs: list[Callable[[], Any]], replays: int = 30) -> float:
    """The median time of one of these, as they run one after the other in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for run in runs * 2:
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / len(runs))
    return sorted(times)[len(times) // 2]


def seconds(run: Callable[[], Any], repeats: int = 3) -> float:
    """The least wall-clock time, the GPU's work included."""
    best = float("inf")
    for _ in range(repeats + 1):  # the first compiles
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.ones(GIB, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * GIB / (milliseconds([lambda: target.copy_(source)]) / 1e3)


def copies(nbytes: int) -> int:
    """How many weights of this size no cache holds."""
    return max(4, -(-(1 << 28) // nbytes))


def products(p: Packed, tokens: int) -> list[Callable[[], Any]]:
    x = torch.randn(tokens, p.columns, device=DEVICE).bfloat16()
    again = [moved_copy(p) for _ in range(copies(p.nbytes))]
    return [lambda q=q: product(x, q) for q in again]


def moved_copy(p: Packed) -> Packed:
    q = moved(p)
    scales = None if q.scales is None else q.scales.clone()
    return Packed(q.mask.clone(), q.offsets.clone(), q.values.clone(), scales, q.columns, q.group)


def dense_products(weight_OI: Tensor, tokens: int) -> list[Callable[[], Any]]:
    x = torch.randn(tokens, weight_OI.shape[1], device=DEVICE).bfloat16()
    again = [weight_OI.clone() for _ in range(copies(weight_OI.nbytes))]
    return [lambda w=w: functional.linear(x, w) for w in again]


CASES: dict[str, tuple[float, int | None, bool]] = {
    "bfloat16 50%": (0.5, None, False),
    "bfloat16 70%": (0.7, None, False),
    "bfloat16 2:4": (0.5, None, True),
    "int8 50%": (0.5, 8, False),
    "int4 50%": (0.5, 4, False),
}


def time_decode(report: Report, rows: int = 11008, columns: int = 4096) -> None:
    peak = bandwidth()
    report.add("decode", "a copy reads and writes", f"{peak / 1e9:.0f} GB/s")
    dense_OI = torch.randn(rows, columns, device=DEVICE).bfloat16()
    packed = {name: random_packed(rows, columns, *case) for name, case in CASES.items()}
    for tokens in (1, 2, 4, gpu.FEW, 2 * gpu.FEW):
        base = milliseconds(dense_products(dense_OI, tokens))
        share = dense_OI.nbytes / base * 1e3 / peak
        report.add("decode", f"{tokens} tokens, torch dense", f"{base * 1e3:.1f} us", f"{share:.2f} of bandwidth")
        for name, p in packed.items():
            if tokens == 1 or name in ("bfloat16 50%", "int8 50%"):
                taken = milliseconds(products(p, tokens))
                share = p.nbytes / taken * 1e3 / peak
                beside = f"{share:.2f} of bandwidth, {base / taken:.2f}x dense"
                report.add("decode", f"{tokens} tokens, {name}", f"{taken * 1e3:.1f} us", beside)


def tune(report: Report, rows: int = 11008, columns: int = 4096) -> None:
    """One token with other shapes of a tile."""
    before = gpu.ROWS, gpu.BYTES, gpu.WARPS
    for name in ("bfloat16 50%", "int8 50%", "int4 50%"):
        p = random_packed(rows, columns, *CASES[name])
        for shape in ((1, 32, 1), (2, 32, 2), (4, 32, 4), (8, 32, 8), (2, 64, 4), (1, 128, 4), (4, 64, 8), (4, 64, 4)):
            gpu.ROWS, gpu.BYTES, gpu.WARPS = shape
            taken = milliseconds(products(p, 1))
            report.add("tune", f"{name}, rows, bytes, warps {shape}", f"{taken * 1e3:.1f} us")
    gpu.ROWS, gpu.BYTES, gpu.WARPS = before


def time_prefill(report: Report, rows: int = 11008, columns: int = 4096) -> None:
    dense_OI = torch.randn(rows, columns, device=DEVICE).bfloat16()
    packed = {name: random_packed(rows, columns, *CASES[name]) for name in ("bfloat16 2:4", "int8 50%")}
    layer = SparseLinear(moved(packed["bfloat16 2:4"]))
    extra = semi.add_semi_structured(nn.Sequential(layer))
    if not extra:
        report.add("prefill", "2:4 on sparse tensor cores", "torch cannot on this GPU")
    for tokens in (64, 512, 2048, 8192):
        base = milliseconds(dense_products(dense_OI, tokens))
        report.add("prefill", f"{tokens} tokens, torch dense", f"{base:.3f} ms")
        for name, p in packed.items():
            taken = milliseconds(products(p, tokens))
            report.add("prefill", f"{tokens} tokens, {name}", f"{taken:.3f} ms", f"{base / taken:.2f}x dense")
        if extra:
            x = torch.randn(tokens, columns, device=DEVICE).bfloat16()
            with torch.inference_mode():
                exact = x.double() @ unpack(moved(packed["bfloat16 2:4"])).double().T
                report.check(f"2:4 on sparse tensor cores, {tokens} tokens", distance(layer(x), exact), 8e-3)
                try:
                    taken = milliseconds([lambda x=x: layer(x)] * 4)
                except RuntimeError as error:  # a library that no graph can hold; the others go on
                    torch.cuda.synchronize()
                    report.add(
                        "prefill", f"{tokens} tokens, 2:4 on sparse cores", "cannot be captured", str(error)[:80]
                    )
                    continue
            beside = f"{base / taken:.2f}x dense, {extra / dense_OI.nbytes:.2f} of its memory more"
            report.add("prefill", f"{tokens} tokens, 2:4 on sparse tensor cores", f"{taken:.3f} ms", beside)


def decoded(network: Any, tokens: int) -> tuple[float, float | None, str]:
    """Tokens a second after a prompt of 512: as the model runs, and as a CUDA graph (or why not)."""
    ids = torch.randint(3, network.config.vocab_size, (1, 512), device=DEVICE)
    with torch.inference_mode():
        cache = network(ids, use_cache=True).past_key_values
        bench._generate(network, cache, ids[:, :1], 8)
        plain = tokens / seconds(lambda: bench._generate(network, cache, ids[:, :1], tokens), 1)
        try:
            return plain, tokens / seconds(graphed(network, ids, tokens), 2), ""
        except Exception as error:
            torch.cuda.synchronize()
            return plain, None, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"


def graphed(network: Any, ids: Tensor, tokens: int) -> Callable[[], None]:
    """Decoding with a cache of fixed size, one token's work captured as a graph."""
    cache = transformers.StaticCache(config=network.config, max_cache_len=1024)
    place = torch.arange(512, device=DEVICE)
    network(ids, past_key_values=cache, position_ids=place[None], use_cache=True)
    token, place = ids[:, :1].clone(), torch.tensor([512], device=DEVICE)

    def step() -> None:
        out = network(token, past_key_values=cache, position_ids=place[None], use_cache=True)
        token.copy_(out.logits[:, -1:].argmax(-1))
        place.add_(1)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def run() -> None:
        place.fill_(512)
        for layer in cache.layers:  # each counts for itself, on the device: beyond the end a replay would stop the card
            layer.cumulative_length.fill_(512)
        for _ in range(tokens):
            graph.replay()

    return run


def time_model(report: Report, shape: str, tokens: int = 128) -> None:
    bases: tuple[float, float | None] | None = None
    for bits, head in ((None, False), (8, False), (8, True), (4, False)):
        dense, packed = bench._pair(None, shape, 0.5, bits, 128, head)
        networks = ({"dense bfloat16": dense} if bases is None else {}) | {
            f"packed 50%{'' if bits is None else f', {bits} bits'}{', head too' if head else ''}": packed
        }
        for name, network in networks.items():
            network = network.to(DEVICE)
            plain, graph, why = decoded(network, tokens)
            size = f"{bench.held_bytes(network) / 1e9:.2f} GB"
            beside = "" if bases is None else f"{plain / bases[0]:.2f}x dense"
            report.add("model", f"{shape}, {name}, as it runs", f"{plain:.1f} tokens/s", f"{beside} {size}".strip())
            if graph is None:
                report.add("model", f"{shape}, {name}, CUDA graph", "cannot be captured", why)
            else:
                beside = "" if bases is None or bases[1] is None else f"{graph / bases[1]:.2f}x dense"
                report.add("model", f"{shape}, {name}, CUDA graph", f"{graph:.1f} tokens/s", beside)
            bases = bases or (plain, graph)
            del network
        del dense, packed, networks
        torch.cuda.empty_cache()


def time_prune(report: Report, rows: int = 11008, columns: int = 4096) -> None:
    weight_OI = torch.randn(rows, columns, device=DEVICE)
    of = factor(columns)
    for text in ("unstructured", "2:4"):
        taken = {}
        for name, tile in (("torch", passes.plain_tile), ("Triton", columns_gpu.tile_pass)):
            run = lambda tile=tile, text=text: swept(tile, weight_OI, of, 0.5, Pattern.parse(text))  # noqa: E731
            taken[name] = seconds(run)
            beside = f"{taken['torch'] / taken[name]:.1f}x torch" if name != "torch" else ""
            what = f"column pass, {rows}x{columns}, {text}, {name}"
            report.add("prune", what, f"{taken[name] * 1e3:.0f} ms", beside)
    arguments = swap_case(rows, columns, 0)
    base = seconds(lambda: dsnot.plain_swap(*arguments, 50, 0.0, False, 0))
    taken_by_us = seconds(lambda: columns_gpu.swap(*arguments, 50, 0.0, False, 0))
    report.add("prune", f"DSnoT's swaps, {rows}x{columns}, torch", f"{base * 1e3:.0f} ms")
    beside = f"{base / taken_by_us:.1f}x torch"
    report.add("prune", f"DSnoT's swaps, {rows}x{columns}, Triton", f"{taken_by_us * 1e3:.0f} ms", beside)
    shape = bench.SHAPES["llama-1b"] | {"hidden_size": columns, "intermediate_size": rows, "head_dim": 128}
    shape |= {"num_key_value_heads": 32, "num_hidden_layers": 1, "vocab_size": 32000}
    config = transformers.AutoConfig.for_model(**shape)
    ids_NL = torch.randint(3, 32000, (32, 2048), generator=torch.Generator().manual_seed(0))
    for steps in (["wanda"], ["sparsegpt"], ["wanda", "dsnot"]):
        for _ in range(2):  # the first compiles
            torch.manual_seed(0)
            network = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(DEVICE)
            torch.cuda.reset_peak_memory_stats()
            result = prunella.prune(network, {"steps": steps, "sparsity": 0.5}, calibration=ids_NL)
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        what = f"a block of 7B shape, 32 x 2048 tokens, {' + '.join(steps)}"
        report.add("prune", what, f"{result.run['seconds']['prune']:.2f} s", memory)


def as_it_runs(network: Any, tokens: int) -> tuple[float, str]:
    plain, graph, why = decoded(network, tokens)
    return plain, f"{why}, as a CUDA graph" if graph is None else f"{graph:.1f} tokens/s as a CUDA graph"


def simulated() -> contextlib.AbstractContextManager[torch.device]:
    """The second device of the tests."""
    sys.path.insert(0, str(ROOT / "tests"))
    import accelerator

    accelerator.meet()
    return accelerator.plugged_in()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = ("check", "run", "prune", "decode", "prefill", "model")
    parser.add_argument("--only", action="append", choices=sections, help="repeat it for several")
    parser.add_argument("--interpret", action="store_true", help="checks and whole runs, small, without a GPU")
    parser.add_argument("--simulate", action="store_true", help="whole runs, small, on a device that is simulated")
    parser.add_argument("--estimate", metavar="CARD", help="say what pruning should take on a card, H100 say; no more")
    parser.add_argument("--minutes", type=float, default=8, help="begin no part after so many")
    parser.add_argument("--folder", type=Path, help="for models: 45 GB at most, of which 14 stay for the next call")
    parser.add_argument("--model", default="llama-1b", help="the shape of the whole model")
    parser.add_argument("--tune", action="store_true", help="time other shapes of a tile too")
    parser.add_argument("--json", type=Path, help="append what is found, and skip what is done")
    arguments = parser.parse_args()
    if arguments.estimate:
        Console(width=140).print(estimates(arguments.estimate))
        return
    small = INTERPRET or SIMULATE
    if not small and not torch.cuda.is_available():
        sys.exit("this PyTorch sees no CUDA device; --interpret and --simulate do without one, small")
    start = time.perf_counter()
    out = Console(width=140)
    report = Report(out, arguments.json)
    device, place = DEVICE, arguments.folder or Path(tempfile.gettempdir()) / "prunella-gpu"
    with contextlib.ExitStack() as stack:
        if SIMULATE:
            device = stack.enter_context(simulated())
        if small and arguments.folder is None:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def add(*what: Any) -> None:
            report.add("run", *what)

        runs = Runs(add, device, place, small, None if small else as_it_runs)
        checks = (check_products, check_passes, check_model, check_pruning)
        parts: dict[str, dict[str, Callable[[], None]]] = {
            "check": {check.__name__: lambda check=check: check(report) for check in checks},
            "run": runs.parts(),
            "prune": {"columns and swaps": lambda: time_prune(report)},
            "decode": {"decode": lambda: time_decode(report)}
            | ({"tune": lambda: tune(report)} if arguments.tune else {}),
            "prefill": {"prefill": lambda: time_prefill(report)},
            "model": {arguments.model: lambda: time_model(report, arguments.model)},
        }
        for section in arguments.only or (("run",) if SIMULATE else ("check", "run") if INTERPRET else sections):
            for part, work in parts[section].items():
                if time.perf_counter() - start > 60 * arguments.minutes:
                    out.print(f"{section}: {part}: for another call", highlight=False, markup=False)
                else:
                    report.run(part, section, work)
    out.print(report.table())
    failed = [row for row in report.rows if row.ok is False]
    if failed:
        sys.exit(f"{len(failed)} of {sum(row.ok is not None for row in report.rows)} checks failed")


if __name__ == "__main__":
    main()
