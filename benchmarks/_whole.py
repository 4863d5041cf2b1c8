"""Whole runs on random weights of a 7B shape, made on the spot: how long each phase takes, beside what it should.

`Runs.parts` are what gpu.py calls, most important first. No part needs another one's files: what is missing it makes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

import prunella
from prunella.machine import most_memory
from prunella.packing import pack_model
from prunella.phases import Clock, measured
from prunella.sparse import bench

LINKS = 25e9  # bytes a second between main memory and the card, pinned: PCIe 5 has 64e9, and half is common
DISK = 2e9  # bytes a second to and from the disk, where nothing was measured
SHARE = 0.6  # of the card's rate that large products reach
# Of a card: bytes of memory a second, operations a second in bfloat16 with float32 sums, in float32, in float64.
RATES = {
    "H200": (4.8e12, 989e12, 67e12, 67e12),
    "H100": (3.35e12, 989e12, 67e12, 67e12),
    "A100": (2.0e12, 312e12, 19.5e12, 19.5e12),
}
# What one command gives on a CPU, LOG.md, 2026-11-27: `make prune`, dense and pruned on pydoc.
SMOLLM2 = {"dense": 11.09, "pruned": 16.39}


@dataclass(frozen=True)
class Size:
    """How large all of it is. few, many: windows of calibration; some: blocks where all would take too long."""

    width: int
    inner: int
    blocks: int
    heads: int
    vocabulary: int
    few: int
    many: int
    length: int
    some: int
    steps: int
    batch: int  # windows of healing in a step
    window: int  # tokens in each
    tokens: int  # that are generated

    @property
    def config(self) -> dict[str, Any]:
        return {
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": max(2 * self.length, 1024),
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }

    @property
    def weights(self) -> int:
        """In the layers of a block."""
        return 4 * self.width**2 + 3 * self.width * self.inner

    @property
    def grams(self) -> int:
        """Numbers in the Gram matrices of a block: three inputs of its width, one of its MLP's."""
        return 3 * self.width**2 + self.inner**2


LARGE = Size(4096, 11008, 32, 32, 32000, 32, 128, 2048, 2, 64, 8, 512, 128)
SMALL = Size(32, 64, 2, 4, 259, 2, 4, 32, 1, 2, 2, 32, 4)
Estimate = dict[str, tuple[float, str]]  # of a phase, its seconds, and why


def estimated(size: Size, steps: str, windows: int, card: str, blocks: int, disk: float = DISK) -> Estimate:
    """What the phases of pruning take when nothing waits for anything else: bytes and operations over the card's rates,
    of which large products reach SHARE."""
    memory, half, single, double = next((rates for name, rates in RATES.items() if name in card), RATES["H100"])
    tokens = windows * size.length
    stored = 2 * size.weights * blocks
    last = size.width * size.inner  # whose product the pass for statistics leaves out
    work = blocks * (2 * tokens * (2 * size.weights - last) + 2 * 2 * tokens * size.length * size.width)
    beside = blocks * 2 * tokens * (10 * size.width + 6 * size.inner) * 2
    found: Estimate = {
        "load": (
            stored / LINKS + 2 * size.weights / disk,
            f"{stored / 1e9:.3g} GB over {LINKS / 1e9:.0f} GB/s; a thread reads them while blocks are computed, all but"
            " the first",
        ),
        "forward": (
            work / (SHARE * half) + beside / memory,
            f"two passes, the first without its last product: {work / 1e12:.3g} TFLOP at {SHARE:.0%} of"
            f" {half / 1e12:.3g} a second; norms, activations, rotations: {beside / 1e9:.3g} GB of memory traffic",
        ),
    }
    masks = size.weights * blocks / 8
    if steps == "wanda":
        read = blocks * tokens * (3 * size.width + size.inner) * 10
        sort = blocks * size.weights * 100
        found["statistics"] = read / memory, f"inputs read, widened and squared: {read / 1e9:.3g} GB of memory traffic"
        found["solve"] = (
            sort / memory,
            f"some hundred bytes a weight (scores, a sort, errors, histograms): {sort / 1e9:.3g} GB",
        )
    else:
        gram = blocks * 2 * tokens * size.grams
        sums = blocks * (tokens // 2048) * 12 * size.grams
        factor = blocks * 2 * (3 * size.width**3 + size.inner**3)
        sweep = blocks * (4 * size.width**3 + 2 * size.inner * size.width**2 + size.width * size.inner**2)
        found["statistics"] = (
            gram / (SHARE * half) + sums / memory,
            f"Gram products in bfloat16 with float32 sums: {gram / 1e12:.3g} TFLOP; added up every 2,048 tokens:"
            f" {sums / 1e9:.3g} GB",
        )
        found["solve"] = (
            factor / (0.3 * double) + sweep / (0.5 * single),
            f"factors in float64, {factor / 1e12:.3g} TFLOP at 30% of {double / 1e12:.3g}; columns in float32,"
            f" {sweep / 1e12:.3g} TFLOP at half of {single / 1e12:.3g}",
        )
    write, beside = (stored + masks) / disk, sum(found[phase][0] for phase in ("forward", "statistics", "solve"))
    found["write"] = (
        max(write - beside, write / blocks),
        f"{(stored + masks) / 1e9:.3g} GB, masks too, at {disk / 1e9:.2g} GB/s are {write:.1f} s; a thread does that"
        " while the next block is computed, and only what is left, or the last block, is waited for",
    )
    return found


def healing(size: Size, card: str) -> Estimate:
    """What a step of healing takes: torch's dense pass, and with masked weights put together."""
    memory, half, *_ = next((rates for name, rates in RATES.items() if name in card), RATES["H100"])
    tokens, layers = size.batch * size.window, size.weights * size.blocks
    work, more = 6 * tokens * (layers + size.vocabulary * size.width), 20 * layers
    dense = work / (SHARE * half)
    return {
        "a dense pass": (
            dense,
            f"forward and backward on {tokens} tokens: {work / 1e12:.3g} TFLOP at {SHARE:.0%} of {half / 1e12:.3g}",
        ),
        "a step": (
            dense + more / memory,
            "that, and masked weights put together forward and back, some 20 bytes a weight:"
            f" {more / 1e9:.3g} GB, {more / memory * 1e3:.0f} ms",
        ),
    }


def estimates(card: str) -> Table:
    """What the large runs should take on a card."""
    table = Table("", "phase", "seconds", "why", title=f"{card}, 7B, as estimated")
    for steps in ("sparsegpt", "wanda"):
        for windows in (LARGE.many, LARGE.few):
            found = estimated(LARGE, steps, windows, card, LARGE.blocks)
            for phase, (seconds, why) in found.items():
                table.add_row(f"{steps}, {windows} windows", phase, f"{seconds:.2f}", why)
            table.add_row("", "all", f"{sum(seconds for seconds, _ in found.values()):.1f}", "one after the other")
    for phase, (seconds, why) in healing(LARGE, card).items():
        table.add_row("mask-lora", phase, f"{seconds:.3f}", why)
    return table


class Runs:
    """The parts, on a device. add(what, value, beside, ok): writes a row; decoded(network, tokens): tokens a second."""

    def __init__(
        self,
        add: Callable[..., None],
        device: torch.device,
        folder: Path,
        small: bool,
        decoded: Callable[[Any, int], tuple[float, str]] | None = None,
    ):
        self.add, self.device, self.folder, self.small = add, device, folder, small
        self.size = SMALL if small else LARGE
        self.card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.disk = DISK
        self.decoded = decoded or self._decoded
        self.windows_NL = torch.randint(
            3, 259, (self.size.many, self.size.length), generator=torch.Generator().manual_seed(0)
        )

    def parts(self) -> dict[str, Callable[[], None]]:
        few, many = self.size.few, self.size.many
        parts = {
            "sparsegpt, many": partial(self.prune, "sparsegpt", many, goal=60),
            "wanda, many": partial(self.prune, "wanda", many, goal=25, keep="wanda"),
            "heal": self.heal,
            "smollm2": self.smollm2,
            "packed": self.packed,
            "sparsegpt, few": partial(self.prune, "sparsegpt", few),
            "wanda, few": partial(self.prune, "wanda", few),
            "best, few": partial(self.prune, "best", few, blocks=self.size.some, keep="best"),
            "best, many": partial(self.prune, "best", many, blocks=self.size.some),
            "pack": self.pack,
        }
        if self.small:
            del parts["smollm2"]
        return parts

    # --- what the parts work on

    def source(self, blocks: int | None = None) -> Path:
        """The model, random, or one of its first blocks alone: the same shards."""
        whole, size = self.folder / "dense", self.size
        if not (whole / "config.json").is_file():
            self._make(whole)
        if blocks in (None, size.blocks):
            return whole
        part = self.folder / f"dense-{blocks}"
        if not (part / "config.json").is_file():
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            index = json.loads((whole / "model.safetensors.index.json").read_text())
            kept = {
                name: file
                for name, file in index["weight_map"].items()
                if ".layers." not in name or int(name.split(".")[2]) < blocks
            }
            for file in set(kept.values()) | {"tokenizer.json", "tokenizer_config.json"}:
                os.link(whole / file, part / file)
            (part / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": kept}))
            config = json.loads((whole / "config.json").read_text()) | {"num_hidden_layers": blocks}
            (part / "config.json").write_text(json.dumps(config))
        return part

    def _make(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        config = transformers.AutoConfig.for_model(**self.size.config, dtype="bfloat16")
        with torch.device("meta"):
            network = transformers.AutoModelForCausalLM.from_config(config)
        shards: dict[str, dict[str, torch.Size]] = {}
        for name, tensor in network.state_dict().items():
            number = int(name.split(".")[2]) if ".layers." in name else "outside"
            shards.setdefault(f"model-{number}.safetensors", {})[name] = tensor.shape
        start = time.perf_counter()
        for file, shapes in shards.items():
            made = {
                name: torch.ones(shape, dtype=torch.bfloat16)
                if len(shape) == 1
                else torch.empty(shape, dtype=torch.bfloat16, device=self.device).normal_(0, 0.02).cpu()
                for name, shape in shapes.items()
            }
            save_file(made, path / file, metadata={"format": "pt"})
        where = {name: file for file, shapes in shards.items() for name in shapes}
        nbytes = sum((path / file).stat().st_size for file in shards)
        index = {"metadata": {"total_size": nbytes}, "weight_map": where}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
        _write_tokenizer(path)
        config.save_pretrained(path)  # last: it says that all is there
        taken = time.perf_counter() - start
        self.disk = nbytes / taken
        self.add("weights made and written", f"{taken:.1f} s", f"{nbytes / 1e9:.1f} GB, {self.disk / 1e9:.1f} GB/s")

    def pruned(self, name: str, blocks: int | None = None) -> Path:
        """What an earlier part left, or else a model pruned by magnitude."""
        path = self.folder / name
        if not (path / "prunella.json").is_file():
            self._prune({"steps": ["magnitude"]}, path, blocks)
        return path

    def _prune(self, recipe: dict[str, Any], out: Path, blocks: int | None = None, windows: int = 2) -> Any:
        source = str(self.source(blocks))
        for path in (out, out.with_name(out.name + ".partial")):
            shutil.rmtree(path, ignore_errors=True)
        settings = {"evaluate": {"source": None}, "device": str(self.device)}
        return prunella.prune(source, {**recipe, **settings}, output=out, calibration=self.windows_NL[:windows])

    @contextlib.contextmanager
    def clock(self) -> Iterator[Clock]:
        """Phases by events in the GPU's stream, for which nothing has to wait."""
        if self.device.type != "cuda":
            with measured() as clock:
                yield clock
            return
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with measured(_event, lambda begin, end: begin.elapsed_time(end) / 1e3) as clock:
            yield clock
        torch.cuda.synchronize()

    # --- the parts

    def prune(
        self,
        name: str,
        windows: int,
        blocks: int | None = None,
        goal: float | None = None,
        keep: str | None = None,
        **settings: Any,
    ) -> None:
        """Prune, and say where the time went, beside what it should be."""
        recipe: dict[str, Any] = {"steps": [name], "order": "block"}
        if name == "best":
            recipe = {key: value for key, value in prunella.Recipe.read(name).items() if key != "calibration"}
        out = self.folder / (keep or "out")
        self.source(blocks)  # not on the clock
        with self.clock() as clock:
            report = self._prune({**recipe, **settings}, out, blocks, windows)
        what = f"{name}, {windows} x {self.size.length} tokens"
        if blocks is not None:
            what += f", {blocks} of {self.size.blocks} blocks"
        self._tell(what, name, report, clock.seconds(), windows, blocks or self.size.blocks, goal)
        if not keep:
            shutil.rmtree(out)

    def _tell(
        self, what: str, name: str, report: Any, spent: dict[str, float], windows: int, blocks: int, goal: float | None
    ) -> None:
        seconds = report.run["seconds"]
        taken = seconds["allocate"] + seconds["prune"]
        beside = f"{report.recipe['order']} order, GPU memory {most_memory(self.device) / 1e9:.1f} GB"
        if seconds["allocate"] > 0.1 * taken:
            beside += f", {seconds['allocate']:.1f} s of it to allocate"
        if blocks != self.size.blocks:
            beside += f"; all blocks would take {taken * self.size.blocks / blocks:.0f} s"
        self.add(what, f"{taken:.2f} s", beside, None if goal is None or self.small else taken <= goal)
        if goal is not None and self.device.type == "cuda":
            self.add(
                f"{what}: fits 24 GB", f"{most_memory(self.device) / 1e9:.1f} GB", "", most_memory(self.device) < 24e9
            )
        expected = estimated(self.size, name, windows, self.card, blocks, self.disk) if name != "best" else {}
        for phase in ("load", "forward", "statistics", "solve", "write", "other"):
            said, why = expected.get(phase, (None, ""))
            beside = "" if said is None else f"estimate {said:.2f} s: {why}"
            self.add(f"{what}: {phase}", f"{spent.get(phase, 0.0):.2f} s", beside)
        if expected:
            whole = sum(value for value, _ in expected.values())
            self.add(f"{what}: all phases", f"{sum(spent.values()):.2f} s", f"estimate {whole:.1f} s")

    def packed(self) -> None:
        """Prune into packed files of 8 bits, on the device, and decode from them beside the dense model."""
        self.prune("wanda", self.size.few, keep="packed", format="packed", bits=8)
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        base = None
        for name in ("packed", "dense"):
            path = self.folder / name
            model = prunella.load_model(str(path), device=str(self.device), packed=name == "packed")
            with model.whole() as network:
                rate, beside = self.decoded(network, self.size.tokens)
                nbytes = bench.held_bytes(network)
            base = base or rate
            times = f", packed {base / rate:.2f}x" if name == "dense" else ""
            self.add(f"decode, {name}", f"{rate:.1f} tokens/s", f"{nbytes / 1e9:.2f} GB{times} {beside}".strip())
            del model, network
        shutil.rmtree(self.folder / "packed")

    def heal(self) -> None:
        """Steps of mask-lora beside torch's own forward and backward pass of the dense model."""
        size, pruned = self.size, self.pruned("wanda")
        windows = torch.randint(3, 259, (size.batch, size.window)).to(self.device)
        base = self._dense_step(windows)
        times: list[float] = []
        settings = {
            "train": ["mask-lora"],
            "text": ["pydoc"],
            "length": size.window,
            "batch": size.batch,
            "micro": size.batch,
            "tokens": size.steps * size.batch * size.window,
            "held_out": 0,
        }
        recipe = {"heal": settings, "evaluate": {"source": None}, "device": str(self.device)}
        recipe["calibration"] = {"source": "pydoc", "length": size.window}
        out = self.folder / "healed"
        for path in (out, out.with_name("healed.partial")):
            shutil.rmtree(path, ignore_errors=True)
        with self.clock() as clock:
            report = prunella.heal(
                pruned, recipe, output=out, watch=lambda step, steps, loss: times.append(time.perf_counter())
            )
        steady = times[len(times) // 4 :]
        step = (steady[-1] - steady[0]) / max(1, len(steady) - 1)
        what = f"mask-lora, {size.steps} steps of {size.batch} x {size.window} tokens"
        memory = f"GPU memory {most_memory(self.device) / 1e9:.1f} GB, training {report.healing['seconds']:.1f} s"
        spent = clock.seconds()
        self.add(what, f"{sum(spent.values()):.1f} s", f"{memory}, load {spent.get('load', 0):.1f} s")
        beside = f"{step / base:.2f} times a dense forward and backward pass, {base * 1e3:.0f} ms; goal 1.2"
        self.add(f"{what}: a step", f"{step * 1e3:.0f} ms", beside, None if self.small else step <= 1.2 * base)
        for phase, (seconds, why) in healing(size, self.card).items():
            self.add(f"{what}: estimate of {phase}", f"{seconds * 1e3:.0f} ms", why)
        for path in (out, pruned):
            shutil.rmtree(path)

    def _dense_step(self, windows: Tensor) -> float:
        with prunella.load_model(str(self.source()), device=str(self.device)).whole() as network, torch.enable_grad():
            for parameter in network.parameters():
                parameter.requires_grad_()
            best = float("inf")
            for _ in range(4):
                self._wait()
                start = time.perf_counter()
                network(windows, labels=windows).loss.backward()
                self._wait()
                best = min(best, time.perf_counter() - start)
                network.zero_grad(set_to_none=True)
            for parameter in network.parameters():
                parameter.requires_grad_(False)
        return best

    def smollm2(self) -> None:
        """The built-in model, as `make prune` prunes it: perplexities within 0.5% of the CPU's."""
        out = self.folder / "smollm2"
        for path in (out, out.with_name("smollm2.partial")):
            shutil.rmtree(path, ignore_errors=True)
        report = prunella.prune("smollm2-135m", {"sparsity": 0.5, "device": str(self.device)}, output=out)
        for side, known in SMOLLM2.items():
            found = getattr(report, side)["perplexity"]
            what = f"smollm2-135m, sparsegpt, perplexity {side}"
            self.add(what, f"{found:.2f}", f"{known} on a CPU", abs(found / known - 1) <= 0.005)
        shutil.rmtree(out)

    def pack(self) -> None:
        """`prunella pack`, which works on the CPU, on a few blocks."""
        pruned = self.pruned("best", self.size.some)
        for bits in (None, 8):
            out = self.folder / "packed"
            shutil.rmtree(out, ignore_errors=True)
            start = time.perf_counter()
            pack_model(str(pruned), out, bits)
            taken = time.perf_counter() - start
            beside = f"on the CPU; all blocks would take {taken * self.size.blocks / self.size.some:.0f} s"
            self.add(
                f"pack, {bits or 16} bits, {self.size.some} of {self.size.blocks} blocks", f"{taken:.2f} s", beside
            )
            shutil.rmtree(out)
        shutil.rmtree(pruned)

    def _decoded(self, network: Any, tokens: int) -> tuple[float, str]:
        ids = torch.randint(3, 259, (1, 8), generator=torch.Generator().manual_seed(0)).to(self.device)
        with torch.inference_mode():
            cache = network(ids, use_cache=True).past_key_values
            start = time.perf_counter()
            bench._generate(network, cache, ids[:, :1], tokens)
            self._wait()
        return tokens / (time.perf_counter() - start), ""

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _write_tokenizer(path: Path) -> None:
    """A token for each byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {
        token: number for number, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(path)
