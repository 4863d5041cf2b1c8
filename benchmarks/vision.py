"""EfficientNet-Lite0 on ImageNet's classes: half of its 1 × 1 convolutions pruned, or all of them in 4 bits, by every
method, with batch norm as it was and estimated anew.

    python benchmarks/vision.py --pictures imagenet.zip

The zip (or folder) has `calibration/CLASS/*.jpg` and `test/CLASS/*.jpg`, their classes named by number, name or WordNet
id. The stem, the depthwise convolutions and the classifier stay dense. Every method is calibrated on the same pictures
and measured on the same others; beside the share of right answers stands the difference from the dense network on the
same pictures with its standard error. Rows that are done are in a file of JSON lines (--json) and are not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import prunella
from prunella.recipe import Recipe
from prunella.samples import Samples

MODEL = "efficientnet-lite0"
KEPT = ["conv_stem", "classifier"]  # dense by name; depthwise convolutions are by themselves
ALMOST_NONE = 1e-9  # a share that prunes no weight: layers are only rounded

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"steps": ["magnitude"]},
    "wanda": {"steps": ["wanda"]},
    "sparsegpt": {"steps": ["sparsegpt"]},
    "admm + update": {"steps": ["admm", "update"]},
    "best": {key: value for key, value in Recipe.read("best-images").items() if key != "batch_norm"},
    "2:4 magnitude": {"steps": ["magnitude"], "pattern": "2:4"},
    "2:4 sparsegpt": {"steps": ["sparsegpt"], "pattern": "2:4"},
    "2:4 admm + update": {"steps": ["admm", "update"], "pattern": "2:4"},
    "4 bits, nearest": {"steps": ["magnitude"], "sparsity": ALMOST_NONE, "round": 4},
    "4 bits, gptq": {"steps": [{"gptq": {"bits": 4, "group": 0}}], "sparsity": ALMOST_NONE},
}


def answers(network: nn.Module, samples: Samples) -> Tensor:
    """Is the network right about each picture?"""
    found = []
    network = copy.deepcopy(network).eval().to(memory_format=torch.channels_last)  # three times as fast on a CPU
    with torch.no_grad():
        for batch in samples.batches(4):
            x_BCHW = batch["pixel_values"].contiguous(memory_format=torch.channels_last)
            found.append(network(x_BCHW).argmax(1) == batch["labels"])
    return torch.cat(found)


def nearest(network: nn.Module, bits: int) -> None:
    """Round the 1 × 1 convolutions to the nearest values of a grid for each output channel."""
    from prunella.grid import fit

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and name not in KEPT:
            weight_OI = module.weight.data.flatten(1)
            weight_OI.copy_(fit(weight_OI, bits, 0).round(weight_OI))


def row(right: Tensor, dense: Tensor) -> dict[str, Any]:
    """Percent right, and the paired difference from the dense network with its standard error."""
    change = right.double() - dense.double()
    return {
        "right": 100 * right.double().mean().item(),
        "difference": 100 * change.mean().item(),
        "error": 100 * change.std().item() / math.sqrt(len(change)),
    }


def fresh() -> tuple[Any, Any]:
    """The network in memory, and the model that reads pictures for it."""
    opened = prunella.open_model(MODEL)
    with opened.whole() as network:
        state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    import timm

    network = timm.create_model(f"local-dir:{opened.checkpoint.directory}", pretrained=False)
    network.load_state_dict(state)
    return network.eval(), opened


def measured(method: str, way: str, calibration: Samples, test: Samples, dense: Tensor) -> dict[str, Any]:
    """Prune by a method, once with the batch norms' statistics as they were, once with new ones: blocks are pruned by
    what the norms before them are going to make, so that these are two runs. The seconds are those of the first."""
    found: dict[str, Any] = {}
    for name, norms in {"as it was": "keep", "estimated": way}.items():
        network, _ = fresh()
        given = dict(METHODS[method])
        started = time.perf_counter()
        bits = given.pop("round", None)
        if bits is not None:
            nearest(network, bits)
        recipe = {**given, "task": "images", "skip": KEPT, "evaluate": {"source": None}, "batch_norm": norms}
        report = prunella.prune(network, recipe, calibration=calibration)
        found.setdefault("seconds", time.perf_counter() - started)
        found[name] = {**row(answers(network, test), dense), "way": report.batch_norm.get("taken", "keep")}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, required=True, help="zip or folder with calibration/ and test/")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--samples", type=int, default=250, help="pictures to calibrate on")
    parser.add_argument("--test", type=int, default=500, help="pictures to measure on")
    parser.add_argument("--batch-norm", default="auto", help="how their statistics are estimated [auto]")
    parser.add_argument("--json", type=Path, default=Path("vision.jsonl"), help="where rows that are done are kept")
    given = parser.parse_args()
    done = {}
    if given.json.is_file():
        done = {line["method"]: line for line in map(json.loads, given.json.read_text(encoding="utf-8").splitlines())}
    network, opened = fresh()
    task = opened.task
    calibration = task.samples(opened, str(given.pictures), given.samples)
    test = task.samples(opened, str(given.pictures), given.test, test=True)
    dense = answers(network, test)
    table = Table(title=f"{MODEL}: {len(calibration)} pictures to calibrate on, {len(test)} to measure on")
    for column in ("", "right", "difference", "with batch norm estimated", "difference", "seconds"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("dense", f"{100 * dense.double().mean().item():.1f}", "", "", "", "")
    for method in given.methods:
        if method not in done:
            done[method] = {"method": method, **measured(method, given.batch_norm, calibration, test, dense)}
            with given.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[method]) + "\n")
        was, new = done[method]["as it was"], done[method]["estimated"]
        cells = [
            f"{r['right']:.1f}" if n == 0 else f"{r['difference']:+.1f} ± {r['error']:.1f}"
            for r in (was, new)
            for n in (0, 1)
        ]
        table.add_row(method, *cells, f"{done[method]['seconds']:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
