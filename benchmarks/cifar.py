"""ResNet-20 on CIFAR-10: one shot, by every method, with batch norm as it was and estimated anew; and healed.

    python benchmarks/cifar.py --weights resnet20-cifar10.safetensors --pictures cifar10.zip

The weights are a state dict under the names below; the zip has pictures of 32 by 32 in `train/CLASS` and `test/CLASS`.
Calibrated on 1,000 of the training pictures, 100 of each class, measured on all test pictures. Cells that are done are
in a file of JSON lines (--json) and are not made again. `--heal 0.8` prunes so many of the weights and trains what is
left on all training pictures.
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
from prunella.compat import has_bfloat16_products
from prunella.samples import Batch, Samples
from prunella.train.loop import Training
from prunella.train.parts import Chosen, Group, Master, Part, attach, detach
from prunella.train.schedule import make_schedule

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
    return prunella.prune(network, recipe, calibration=batches, loss=_loss)


def _loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1], reduction="none")


# ---------------------------------------------------------------------------------------------------------
# Healing


def heal(
    network: nn.Module, dense: nn.Module, samples: Samples, epochs: int, rate: float, distill: float = 0.9
) -> None:
    """Train what is left on all samples, distilled from the dense network, zeros held."""
    (group,) = samples.groups
    with torch.no_grad():
        taught = torch.cat([dense.eval()(batch["x"]) for batch in samples.batches(500)])
    drawn = torch.Generator().manual_seed(0)
    order = torch.cat([torch.randperm(len(samples), generator=drawn) for _ in range(epochs)])
    training_on = Samples.of({**{key: value[order] for key, value in group.items()}, "taught": taught[order]})
    chosen = []
    for name, parameter in network.named_parameters():
        owner, _, key = name.rpartition(".")
        mask = parameter.data != 0 if parameter.ndim > 1 else None
        part = Part(name, frozenset(), parameter.data, mask, places=((network.get_submodule(owner), key),))
        chosen.append(Chosen(part, Master(part), Group("all", lambda part: None, rate)))

    def run(network: nn.Module, batch: Batch) -> Tensor:
        out: Tensor = network(batch["x"])
        return out

    def loss(logits: Tensor, batch: Batch) -> Tensor:
        goal = F.log_softmax(batch["taught"], 1)
        apart = F.kl_div(F.log_softmax(logits.float(), 1), goal, log_target=True, reduction="batchmean")
        return (1 - distill) * F.cross_entropy(logits.float(), batch["y"]) + distill * apart

    def tell(step: int, steps: int, loss: float) -> None:
        if step % 20 == 0:
            print(f"step {step} of {steps}: loss {loss:.4f}", flush=True)

    steps = len(training_on) // BATCH
    attach(chosen)
    with (
        tempfile.TemporaryDirectory() as folder,
        Training(
            network,
            chosen,
            training_on,
            loss,
            make_schedule("constant", steps),
            Path(folder),
            run=run,
            batch=BATCH,
            micro=BATCH,
            every=steps,
            bfloat16=has_bfloat16_products(),
            on_step=tell,
        ) as training,
    ):
        training.advance()
        training.finish()
    detach(chosen)


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
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=3e-3)
    given = parser.parse_args()
    test, dense = pictures(given.pictures, "test"), load(given.weights)
    if given.heal:
        everything = pictures(given.pictures, "train")
        network = load(given.weights)
        prune(network, ["magnitude"], given.heal, "global", "reset", everything.first(1000))
        before = accuracy(network, test)
        heal(network, dense, everything, given.epochs, given.rate)
        kept = [parameter for parameter in network.parameters() if parameter.ndim > 1]
        zeros = sum(int((p == 0).sum()) for p in kept) / sum(p.numel() for p in kept)
        print(f"{zeros:.2%} zeros: {before:.2f} one shot, {accuracy(network, test):.2f} healed on {len(everything)}")
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
