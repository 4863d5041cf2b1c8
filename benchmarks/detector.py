"""Iterative pruning of a real detector: YOLOv5n on COCO128 at 320 pixels, scored by pycocotools.

python benchmarks/detector.py --weights yolov5n-coco.safetensors --pictures coco128.zip

The architecture is written down below (version 6.0: depth 0.33, width 0.25); the weights come by their names. Rows: the
dense network, global magnitude in one shot, and in rounds with distillation of the dense network's raw outputs on the
training pictures, without a label. Every row is printed and appended to --json at once, and not done again.
Architecture: Jocher et al., YOLOv5, https://github.com/ultralytics/yolov5 (v6.0, models/yolov5n.yaml).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import prunella
from prunella.compat import has_bfloat16_products
from prunella.train.distil import Fit

SIZE = 320
STRIDES = (8, 16, 32)
RECIPE = {"task": "module", "steps": ["magnitude"], "allocate": "global", "skip": ["model.0", "model.24"]}


# ---------------------------------------------------------------------------------------------------------
# The network


class Conv(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, padding: int | None = None):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2 if padding is None else padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.bn(self.conv(x)))
        return out


class Bottleneck(nn.Module):
    def __init__(self, width: int, shortcut: bool):
        super().__init__()
        self.cv1, self.cv2, self.shortcut = Conv(width, width), Conv(width, width, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cv2(self.cv1(x))
        return x + out if self.shortcut else out


class C3(nn.Module):
    """Two branches, one of them through `count` bottlenecks."""

    def __init__(self, inputs: int, outputs: int, count: int = 1, shortcut: bool = True):
        super().__init__()
        half = outputs // 2
        self.cv1, self.cv2, self.cv3 = Conv(inputs, half), Conv(inputs, half), Conv(2 * half, outputs)
        self.m = nn.Sequential(*(Bottleneck(half, shortcut) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))
        return out


class SPPF(nn.Module):
    """Pooled over windows of 5, 9 and 13."""

    def __init__(self, width: int):
        super().__init__()
        self.cv1, self.cv2 = Conv(width, width // 2), Conv(2 * width, width)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.cv1(x)]
        for _ in range(3):
            found.append(self.m(found[-1]))
        out: Tensor = self.cv2(torch.cat(found, 1))
        return out


class Detect(nn.Module):
    """One 1x1 convolution a scale: for each of three anchors a box, whether one is there, and 80 classes."""

    anchors: Tensor
    anchor_grid: Tensor

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.m = nn.ModuleList(nn.Conv2d(width, 3 * 85, 1) for width in widths)
        self.register_buffer("anchors", torch.zeros(3, 3, 2))
        self.register_buffer("anchor_grid", torch.zeros(3, 1, 3, 1, 1, 2))

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [head(x) for head, x in zip(self.m, maps, strict=True)]


SEVERAL = {
    12: (11, 6),
    16: (15, 4),
    19: (18, 14),
    22: (21, 10),
    24: (17, 20, 23),
}  # layers, and whose outputs they take


class Yolo(nn.Module):
    """YOLOv5n: pictures (B, 3, H, W) with values from 0 to 1 -> raw maps (B, 255, H/8, W/8), …/16 and …/32."""

    def __init__(self) -> None:
        super().__init__()
        up, join = nn.Upsample(scale_factor=2.0), nn.Identity()  # joined in forward
        self.model = nn.ModuleList(
            [
                *(Conv(3, 16, 6, 2, 2), Conv(16, 32, 3, 2), C3(32, 32), Conv(32, 64, 3, 2), C3(64, 64, 2)),
                *(Conv(64, 128, 3, 2), C3(128, 128, 3), Conv(128, 256, 3, 2), C3(256, 256), SPPF(256)),
                *(Conv(256, 128), up, join, C3(256, 128, 1, False)),
                *(Conv(128, 64), up, join, C3(128, 64, 1, False)),
                *(Conv(64, 64, 3, 2), join, C3(128, 128, 1, False)),
                *(Conv(128, 128, 3, 2), join, C3(256, 256, 1, False)),
                Detect((64, 128, 256)),
            ]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        kept: list[Any] = []
        last: Any = x
        for number, layer in enumerate(self.model):
            several = [kept[n] for n in SEVERAL.get(number, ())]
            last = torch.cat(several, 1) if number in SEVERAL and number != 24 else layer(several or last)
            kept.append(last)
        maps: list[Tensor] = last
        return maps


def load(path: Path) -> Yolo:
    """The network with its weights, in float32."""
    network = Yolo()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
    return network.eval()


# ---------------------------------------------------------------------------------------------------------
# Pictures and boxes


class Pictures:
    """Pictures of a folder in COCO128's archive, letterboxed, and their boxes.

    x_NCHW: values from 0 to 1
    boxes:  of each picture (n, 5): class, left, top, right, bottom, in pixels of x
    """

    def __init__(self, archive: Path, folder: str, size: int = SIZE):
        from PIL import Image

        pictures, self.boxes = [], []
        with zipfile.ZipFile(archive) as files:
            names = sorted(n for n in files.namelist() if n.startswith(f"images/{folder}/") and n.endswith(".jpg"))
            for name in names:
                with Image.open(io.BytesIO(files.read(name))) as opened:
                    picture = opened.convert("RGB")
                scale = size / max(picture.size)
                width, height = (round(side * scale) for side in picture.size)
                canvas = Image.new("RGB", (size, size), (114, 114, 114))
                left, top = (size - width) // 2, (size - height) // 2
                canvas.paste(picture.resize((width, height), Image.Resampling.BILINEAR), (left, top))
                pictures.append(torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(size, size, 3))
                label = f"object_detection/labels/{folder}/{Path(name).stem}.txt"  # there is none of an empty picture
                lines = files.read(label).decode().split("\n") if label in files.namelist() else []
                found = torch.tensor([[float(word) for word in line.split()] for line in lines if line.strip()])
                found = found.view(-1, 5)
                kind, centre, extent = found[:, :1], found[:, 1:3], found[:, 3:]
                sides, corner = torch.tensor([width, height]), torch.tensor([left, top])
                self.boxes.append(
                    torch.cat([kind, (centre - extent / 2) * sides + corner, (centre + extent / 2) * sides + corner], 1)
                )
        self.x_NCHW = torch.stack(pictures).permute(0, 3, 1, 2).float() / 255


def decode(maps: list[Tensor], anchors_S3: Tensor) -> Tensor:
    """Raw maps -> (B, boxes, 85): centre and extent in pixels, then probabilities."""
    found = []
    for raw, stride, anchors_32 in zip(maps, STRIDES, anchors_S3.view(3, 3, 2), strict=True):
        batch, _, height, width = raw.shape
        y = raw.view(batch, 3, 85, height, width).permute(0, 1, 3, 4, 2).sigmoid()
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        place = torch.stack([columns, rows], -1)
        centre = (y[..., :2] * 2 - 0.5 + place) * stride
        extent = (y[..., 2:4] * 2) ** 2 * anchors_32[:, None, None]
        found.append(torch.cat([centre, extent, y[..., 4:]], -1).flatten(1, 3))
    return torch.cat(found, 1)


def overlap(box_4: Tensor, boxes_N4: Tensor) -> Tensor:
    """Intersection over union of a box with others."""
    least, most = torch.maximum(box_4[:2], boxes_N4[:, :2]), torch.minimum(box_4[2:], boxes_N4[:, 2:])
    shared = (most - least).clamp_min(0).prod(1)
    return shared / ((box_4[2:] - box_4[:2]).prod() + (boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(1) - shared)


def suppress(found_N85: Tensor, least: float = 0.001, most: float = 0.6, count: int = 300) -> Tensor:
    """Boxes of one picture (n, 6): left, top, right, bottom, score, class; of those of one class that overlap by more
    than `most` the best (greedy non-maximum suppression)."""
    found_N85 = found_N85[found_N85[:, 4] > least]
    scores = found_N85[:, 4:5] * found_N85[:, 5:]
    box, kind = (scores > least).nonzero(as_tuple=True)  # a box may be of several classes
    centre, extent = found_N85[box, :2], found_N85[box, 2:4]
    boxes = torch.cat([centre - extent / 2, centre + extent / 2], 1)
    score = scores[box, kind]
    order = score.argsort(descending=True)
    boxes, kind, score = boxes[order], kind[order], score[order]
    kept = []
    for one in kind.unique():
        left = (kind == one).nonzero()[:, 0]
        while len(left):
            kept.append(int(left[0]))
            left = left[1:][overlap(boxes[left[0]], boxes[left[1:]]) <= most]
    best = torch.tensor(sorted(kept)[:count], dtype=torch.long)
    return torch.cat([boxes[best], score[best, None], kind[best, None]], 1)


@torch.no_grad()
def detections(network: nn.Module, anchors: Tensor, x_NCHW: Tensor) -> Iterator[Tensor]:
    for x in x_NCHW.split(16):
        yield from map(suppress, decode(network(x), anchors))


def precision(network: Yolo, pictures: Pictures) -> tuple[float, float]:
    """Mean average precision at an overlap of 0.5, and over 0.5 to 0.95."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": [{"id": k} for k in range(80)]}
    for number, boxes in enumerate(pictures.boxes):
        truth["images"].append({"id": number})
        for kind, left, top, right, bottom in boxes.tolist():
            box = [left, top, right - left, bottom - top]
            about = {"id": len(truth["annotations"]) + 1, "image_id": number, "category_id": int(kind), "iscrowd": 0}
            truth["annotations"].append({**about, "bbox": box, "area": box[2] * box[3]})
    network.eval()
    anchors = network.model[24].anchor_grid
    results = [
        {
            "image_id": n,
            "category_id": int(row[5]),
            "bbox": [*row[:2], row[2] - row[0], row[3] - row[1]],
            "score": row[4],
        }
        for n, rows in enumerate(detections(network, anchors, pictures.x_NCHW))  # type: ignore[arg-type]
        for row in rows.tolist()
    ]
    if not results:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = truth
        known.createIndex()
        judge = COCOeval(known, known.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[1]), float(judge.stats[0])


# ---------------------------------------------------------------------------------------------------------
# Rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="of YOLOv5n v6.0, safetensors")
    parser.add_argument(
        "--pictures", type=Path, required=True, help="COCO128 as a zip: images/, object_detection/labels/"
    )
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--epochs", type=int, default=2, help="of each round, over the pictures and their mirror images"
    )
    parser.add_argument("--last", type=int, default=10, help="epochs of the last round")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--size", type=int, default=SIZE)
    parser.add_argument("--limit", type=int, default=None, help="so many pictures of each kind")
    parser.add_argument("--json", type=Path, default=None)
    asked = parser.parse_args()
    done = (
        [json.loads(line) for line in asked.json.read_text().splitlines()] if asked.json and asked.json.exists() else []
    )

    def row(what: str, network: Yolo, **more: Any) -> None:
        both, strict = precision(network, held_out)
        found = {"what": what, "mAP50": round(both, 4), "mAP50-95": round(strict, 4), **more}
        print(json.dumps(found), flush=True)
        if asked.json:
            with asked.json.open("a") as file:
                file.write(json.dumps(found) + "\n")

    def due(what: str) -> bool:
        return all(entry["what"] != what for entry in done)

    held_out = Pictures(asked.pictures, "val2017", asked.size)
    training = Pictures(asked.pictures, "train2017", asked.size)
    held_out.x_NCHW, held_out.boxes = held_out.x_NCHW[: asked.limit], held_out.boxes[: asked.limit]
    x_NCHW = training.x_NCHW[: asked.limit]
    if due("dense"):
        row("dense", load(asked.weights))
    for sparsity in asked.sparsity:
        recipe = {**RECIPE, "sparsity": sparsity, "evaluate": {"source": None}}
        if due(f"one shot {sparsity:.0%}"):
            network = load(asked.weights)
            report = prunella.prune(network, recipe, calibration=x_NCHW[:2])
            row(f"one shot {sparsity:.0%}", network, sparsity=report.sparsity)
        if due(f"{asked.rounds} rounds {sparsity:.0%}"):
            network = load(asked.weights)
            aside = torch.arange(len(x_NCHW)) % 8 == 0  # of the training pictures: these choose, the others train
            both_NCHW = torch.cat([x_NCHW[~aside], x_NCHW[~aside].flip(3)])
            both_NCHW = both_NCHW[torch.randperm(len(both_NCHW), generator=torch.Generator().manual_seed(0))]
            fits = fitting(copy.deepcopy(network), both_NCHW, asked)
            apart = divergence(copy.deepcopy(network), x_NCHW[aside])
            levels = prunella.prune_in_rounds(
                network,
                recipe,
                asked.rounds,
                lambda net, fits=fits: next(fits)(net),
                lambda net, apart=apart: -apart(net),
                calibration=x_NCHW[:2],
                on_level=lambda level: print(f"  {level.sparsity:.4f}: {level.scores}", flush=True),
            )
            row(f"{asked.rounds} rounds {sparsity:.0%}", network, sparsity=levels[-1].report.sparsity)


def fitting(dense: Yolo, x_NCHW: Tensor, asked: argparse.Namespace) -> Iterator[Fit]:
    """What trains in each round; the last one, to whose sparsity the others lead, is longer."""
    for number in range(1, asked.rounds + 1):
        epochs = asked.last if number == asked.rounds else asked.epochs
        options = {"epochs": epochs, "batch": asked.batch, "rate": asked.rate, "looks": 1}
        yield prunella.distil(dense, x_NCHW, **options, bfloat16=has_bfloat16_products())


def divergence(dense: Yolo, x_NCHW: Tensor) -> Any:
    """How far raw maps are from the dense network's, the mean over pictures: sum |y - y'|^2 / sum |y'|^2."""
    with torch.no_grad():
        wanted = dense.eval()(x_NCHW)

    def of(network: nn.Module) -> float:
        with torch.no_grad():
            found = network.eval()(x_NCHW)
        apart = sum((one - other).square().flatten(1).sum(1) for one, other in zip(found, wanted, strict=True))
        return float((apart / sum(other.square().flatten(1).sum(1) for other in wanted)).mean())

    return of


if __name__ == "__main__":
    main()
