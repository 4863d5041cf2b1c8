"""ResNet-20 on CIFAR-10: one shot, by every method, with batch norm as it was and estimated anew; and healed.

    python benchmarks/cifar.py --weights resnet20-cifar10.safetensors --pictures cifar10.zip

The weights are a state dict under the names below; the zip has pictures of 32 by 32 in `train/CLASS` and `test/CLASS`.
Calibrated on 1,000 of the training pictures, 100 of each class, measured on all test pictures. Cells that are done are
in a file of JSON lines (--json) and are not made again. `--heal 0.8` prunes so many of the weights and trains what is
left on all training pictures and their mirror images, distilled from the dense network, by `prunella heal`.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import prunella
from prunella.samples import Samples

BATCH = 128  # pictures in a step of healing
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    """Two convolutions and a shortcut without weights: every second pixel, channels of zeros on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        beside = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return F.relu(out + beside)


class ResNet20(nn.Module):
    """He et al., "Deep Residual Learning for Image Recognition", 2015, section 4.2, shortcuts of option A."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for number, (inputs, outputs) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = Block(inputs, outputs, 1 if number == 1 else 2)
            setattr(
                self, f"layer{number}", nn.Sequential(first, Block(outputs, outputs, 1), Block(outputs, outputs, 1))
            )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        out: Tensor = self.linear(x.mean((2, 3)))
        return out


def load(weights: Path) -> ResNet20:
    network = ResNet20()
    network.load_state_dict(load_file(weights))
    return network.eval()


def pictures(path: Path, split: str, each: int | None = None) -> Samples:
    """The first so many pictures of each class, class after class in turn, normalized; `y` is the class."""
    with zipfile.ZipFile(path) as file:
        names = sorted(name for name in file.namelist() if name.startswith(f"{split}/") and name.endswith(".jpg"))
        classes = sorted({name.split("/")[1] for name in names})
        mine = [[name for name in names if name.split("/")[1] == label][:each] for label in classes]
        found = [(name, label) for row in zip(*mine, strict=True) for label, name in enumerate(row)]
        raw = [torch.frombuffer(bytearray(_pixels(file.read(name))), dtype=torch.uint8) for name, _ in found]
    x = torch.stack(raw).view(-1, 32, 32, 3).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)
    return Samples.of({"x": x.contiguous(), "y": torch.tensor([label for _, label in found])})


def _pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def accuracy(network: nn.Module, samples: Samples) -> float:
    """In percent."""
    right = count = 0
    with torch.no_grad():
        for batch in samples.batches(500):
            right += int((network.eval()(batch["x"]).argmax(1) == batch["y"]).sum())
            count += len(batch["y"])
    return 100 * right / count


METHODS: dict[str, list[Any]] = {
    "magnitude": ["magnitude"],
    "wanda": ["wanda"],
    "sparsegpt": ["sparsegpt"],
    "admm + update": ["admm", "update"],
    "admm + update + reconstruct": ["admm", "update", {"reconstruct": {"epochs": 1}}],
}
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
NORMS = ("keep", "reset", "auto")


def prune(network: nn.Module, steps: list[Any], share: float, allocate: str, norm: str, samples: Samples) -> Any:
    """Prune it in place; the report."""
    recipe = {
        "calibration": {"samples": len(samples)},
        "steps": steps,
        "sparsity": share,
        "allocate": allocate,
        "batch_norm": norm,
        "evaluate": {"source": None},
    }
    (group,) = samples.groups
    batches = list(zip(group["x"].split(100), group["y"].split(100), strict=True))
    return prunella.prune(network, recipe, calibration=batches, loss=losses)


def losses(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1], reduction="none")


# ---------------------------------------------------------------------------------------------------------
# Healing

TASK = '''"""ResNet-20, and all training pictures with their mirror images."""

from pathlib import Path

import cifar

loss = cifar.losses


def network():
    return cifar.load(Path({weights!r}))


def calibration():
    return cifar.mirrored(Path({pictures!r}))
'''


def mirrored(path: Path) -> list[tuple[Tensor, Tensor]]:
    """All training pictures with their classes, and after them their mirror images."""
    (group,) = pictures(path, "train").groups
    return [(group["x"], group["y"]), (group["x"].flip(3), group["y"])]


def healed(given: argparse.Namespace, folder: Path) -> tuple[nn.Module, nn.Module]:
    """Prune by global magnitude, and train what is left, both from directory to directory as the commands do: the
    pruned network and the healed one."""
    here = Path(__file__).resolve()
    (folder / here.name).symlink_to(here)  # what a task's file imports lies beside it
    task = folder / "task.py"
    task.write_text(TASK.format(weights=str(given.weights.resolve()), pictures=str(given.pictures.resolve())))
    recipe = {
        "task": "module",
        "calibration": {"samples": 1000},
        "steps": ["magnitude"],
        "sparsity": given.heal,
        "allocate": "global",
        "batch_norm": "reset",
        "evaluate": {"source": None},
    }
    prunella.prune(f"{task}:network", recipe, output=folder / "pruned")
    healing = {
        "train": {"all": {"rate": given.rate}},
        "distill": given.distill,
        "epochs": given.epochs,
        "batch": BATCH,
        "micro": BATCH,
        "held_out": 0,
    }
    recipe = {"task": "module", "evaluate": {"source": None}, "heal": healing}
    prunella.heal(folder / "pruned", recipe, output=folder / "healed", watch=_tell)
    pruned, healed = load(given.weights), load(given.weights)
    for network, name in ((pruned, "pruned"), (healed, "healed")):
        network.load_state_dict(load_file(folder / name / "model.safetensors"))
    return pruned, healed


def _tell(step: int, steps: int, loss: float) -> None:
    if step % 20 == 0:
        print(f"step {step} of {steps}: loss {loss:.4f}", flush=True)


# ---------------------------------------------------------------------------------------------------------
# The table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--json", type=Path, default=Path("cifar.jsonl"), help="cells that are done")
    parser.add_argument("--method", action="append", choices=list(METHODS), help="repeat [all]")
    parser.add_argument("--sparsity", action="append", type=float, help="repeat [0.5, 0.6, 0.7, 0.8]")
    parser.add_argument("--allocate", action="append", help="repeat [global, uniform]")
    parser.add_argument("--norm", action="append", help="what becomes of batch norms; repeat [keep, reset, auto]")
    parser.add_argument("--heal", type=float, metavar="SHARE", help="prune so much by global magnitude, and heal it")
    parser.add_argument(
        "--epochs", type=int, default=2, help="passes over the training pictures and their mirror images"
    )
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--distill", type=float, default=0.9, help="share of the loss that is the dense network's")
    given = parser.parse_args()
    test, dense = pictures(given.pictures, "test"), load(given.weights)
    if given.heal:
        with tempfile.TemporaryDirectory() as folder:
            pruned, network = healed(given, Path(folder))
        kept = [parameter for parameter in network.parameters() if parameter.ndim > 1]
        zeros = sum(int((p == 0).sum()) for p in kept) / sum(p.numel() for p in kept)
        print(f"{zeros:.2%} zeros: {accuracy(pruned, test):.2f} one shot, {accuracy(network, test):.2f} healed")
        return
    done = [json.loads(line) for line in given.json.read_text().splitlines()] if given.json.exists() else []
    known = {tuple(cell["cell"]): cell for cell in done}
    calibration = pictures(given.pictures, "train", 100)
    if ("dense",) not in known:
        known["dense",] = write(given.json, ["dense"], accuracy(dense, test), {})
    wanted = [
        (method, share, allocate, norm)
        for allocate in given.allocate or ["global", "uniform"]
        for method in given.method or METHODS
        for share in given.sparsity or SPARSITIES
        for norm in given.norm or NORMS
    ]
    for cell in wanted:
        if cell not in known:
            method, share, allocate, norm = cell
            network = load(given.weights)
            report = prune(network, METHODS[method], share, allocate, norm, calibration)
            known[cell] = write(given.json, list(cell), accuracy(network, test), report.batch_norm)
    table = Table(title=f"top-1 on {len(test)} pictures, dense {known['dense',]['accuracy']:.2f}")
    for column in ("method", "allocation", "batch norm", *(f"{share:.0%}" for share in given.sparsity or SPARSITIES)):
        table.add_column(column, justify="right" if "%" in column else "left")
    for method, allocate, norm in dict.fromkeys((m, a, n) for m, _, a, n in wanted):
        cells = [known[method, share, allocate, norm] for share in given.sparsity or SPARSITIES]
        table.add_row(method, allocate, norm, *(f"{c['accuracy']:.2f}{_taken(norm, c)}" for c in cells))
    Console().print(table)


def _taken(norm: str, cell: Mapping[str, Any]) -> str:
    """What `auto` took."""
    return f" ({cell['batch_norm']['taken']})" if norm == "auto" else ""


def write(path: Path, cell: list[Any], right: float, norms: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what a cell gave."""
    found = {"cell": cell, "accuracy": right, "batch_norm": dict(norms)}
    with path.open("a") as file:
        file.write(json.dumps(found) + "\n")
    print(*cell, f"{right:.2f}", flush=True)
    return found


if __name__ == "__main__":
    main()
