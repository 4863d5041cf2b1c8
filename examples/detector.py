"""Prune a detector in rounds, without a label: it learns again what the dense one puts out.

python examples/detector.py [OUT]
"""

import sys

import torch
from torch import nn

import prunella


class Detector(nn.Module):
    """A small one of two scales; YOLOv5 and its kin are pruned by the same lines (benchmarks/detector.py)."""

    def __init__(self):
        super().__init__()

        def conv(inputs, outputs, stride=1):
            body = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            return nn.Sequential(body, nn.BatchNorm2d(outputs), nn.SiLU())

        self.stem, self.fine = conv(3, 16, 2), conv(16, 32, 2)
        self.coarse, self.neck = conv(32, 32, 2), conv(64, 32)
        self.heads = nn.ModuleList(nn.Conv2d(32, 3 * 7, 1) for _ in range(2))  # 3 anchors: box, is there one, 2 classes

    def forward(self, x):
        fine = self.fine(self.stem(x))
        coarse = self.coarse(fine)
        up = nn.functional.interpolate(coarse, scale_factor=2.0)
        return [self.heads[0](self.neck(torch.cat([fine, up], 1))), self.heads[1](coarse)]


torch.manual_seed(0)
detector = Detector().eval()  # yours comes with its weights: prunella.load_state(detector, "weights.pt")
for module in detector.modules():
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
pictures = torch.rand(48, 3, 64, 64)  # yours are read from files
train, held_out = pictures[:32], pictures[32:]

with torch.no_grad():
    wanted = detector(held_out)


def score(network):
    """How near the raw maps are to the dense network's, at most 1; with labels at hand, mean average precision."""
    with torch.no_grad():
        found = network.eval()(held_out)
    apart = sum((one - other).square().sum() for one, other in zip(found, wanted, strict=True))
    return 1 - float(apart / sum(other.square().sum() for other in wanted))


levels = prunella.prune_in_rounds(
    detector,
    {"steps": ["magnitude"], "allocate": "global", "sparsity": 0.7, "skip": ["stem", "heads"]},
    rounds=4,
    fit=prunella.distil(detector, train, epochs=6, batch=8, rate=1e-3),
    score=score,
    calibration=train,
    tolerance=0.2,
)
for level in levels:
    print(f"{level.sparsity:.1%} pruned: {level.scores[0]:.3f}, trained: {level.score:.3f}")

# A plain module with zeros. Saved with masks and a report:
recipe = {"steps": ["magnitude"], "allocate": "global", "sparsity": levels[-1].sparsity, "keep_zeros": True}
report = prunella.prune(
    detector,
    {**recipe, "skip": ["stem", "heads"]},
    calibration=train,
    evaluate=held_out,
    output=sys.argv[1] if len(sys.argv) > 1 else "pruned-detector",
)
print(f"saved with {report.sparsity:.1%} of all weights zero")
