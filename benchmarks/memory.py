"""Peak memory of pruning a model larger than it: a random LLaMA of 7B shape, pruned block by block.

    python benchmarks/memory.py --blocks 32 --prune 2

Writes the model (32 blocks, 4096 wide, 11008 in the MLP, bfloat16, one shard a block, 13.5 GB) to --directory once
and prunes its first --prune blocks with each step; every run is a process of its own. A model with fewer blocks
(--blocks 4) shows that the peak does not grow with their number.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import LlamaConfig

WORKER = """
import json, sys, torch, prunella
directory, out, step, blocks, windows, length, order = sys.argv[1:]
torch.manual_seed(0)
chosen = {f"model.layers.{i}": 0.5 for i in range(int(blocks))}
report = prunella.prune(
    directory,
    {"steps": [step], "sparsity": {"*": 0.0, **chosen}, "order": order, "evaluate": {"source": None}},
    output=out,
    calibration=torch.randint(0, 32000, (int(windows), int(length))),
)
errors = [la.error for la in report.layers if la.error is not None]
print(json.dumps({"seconds": report.run["seconds"]["prune"], "sparsity": report.sparsity, "layers": len(errors)}))
"""


def write_model(directory: Path, blocks: int) -> None:
    """A random LLaMA-7B of `blocks` blocks, written shard by shard."""
    if (directory / "config.json").exists():
        return
    directory.mkdir(parents=True)
    config = LlamaConfig(num_hidden_layers=blocks, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    width, inner, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    where: dict[str, str] = {}

    def shard(number: int, tensors: dict[str, torch.Tensor]) -> None:
        name = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, directory / name)
        where.update(dict.fromkeys(tensors, name))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.bfloat16) * 0.02

    for block in range(blocks):
        torch.manual_seed(block)
        base = f"model.layers.{block}"
        tensors = {f"{base}.self_attn.{name}_proj.weight": random(width, width) for name in "qkvo"}
        tensors |= {f"{base}.mlp.{name}_proj.weight": random(inner, width) for name in ("gate", "up")}
        tensors[f"{base}.mlp.down_proj.weight"] = random(width, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{base}.{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        shard(block, tensors)
    outside = {"model.embed_tokens.weight": random(vocabulary, width), "lm_head.weight": random(vocabulary, width)}
    shard(blocks, {**outside, "model.norm.weight": torch.ones(width, dtype=torch.bfloat16)})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(".cache/memory"))
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--prune", type=int, default=2)
    parser.add_argument("--steps", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--orders", nargs="+", default=["layer", "block"])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--keep", action="store_true", help="keep the models")
    args = parser.parse_args()
    table = Table(title=f"LLaMA-7B shape, {args.prune} blocks pruned, {args.windows} windows of {args.length}")
    for column in ("blocks", "model GB", "step", "order", "seconds", "peak GB"):
        table.add_column(column, justify="left" if column in ("step", "order") else "right")
    for blocks in args.blocks:
        directory = args.directory / f"llama-7b-{blocks}"
        write_model(directory, blocks)
        size = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        for step in args.steps:
            for order in args.orders:
                out = args.directory / "out"
                shutil.rmtree(out, ignore_errors=True)
                numbers = [str(n) for n in (args.prune, args.windows, args.length)]
                command = [sys.executable, "-c", WORKER, str(directory), str(out), step, *numbers, order]
                started = time.perf_counter()
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
                assert process.stdout is not None
                process.stdout.read()
                _, status, usage = os.wait4(process.pid, 0)
                if status:
                    sys.exit(f"{step} failed with status {status}")
                shutil.rmtree(out, ignore_errors=True)
                seconds = time.perf_counter() - started
                peak = usage.ru_maxrss * 1024 / 1e9
                table.add_row(str(blocks), f"{size / 1e9:.1f}", step, order, f"{seconds:.0f}", f"{peak:.2f}")
                Console(stderr=True).print(table)
        if not args.keep:
            shutil.rmtree(directory)
    Console().print(table)


if __name__ == "__main__":
    main()
