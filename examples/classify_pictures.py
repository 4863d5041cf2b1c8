"""Classify a folder of pictures by a network as it is and by the same one pruned and packed: how long each takes, and
how many answers agree.

python examples/classify_pictures.py PICTURES [MODEL] [OUT]
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps

import prunella
from prunella.bench.turns import in_turns
from prunella.packing import pack_model
from prunella.pictures import ENDINGS
from prunella.tasks.labels import labels_of

pictures = Path(sys.argv[1])
name = sys.argv[2] if len(sys.argv) > 2 else "efficientnet-lite0"
out = Path(sys.argv[3] if len(sys.argv) > 3 else "pruned-classifier")
BATCH = 16

# SparseGPT, batch norms made new, and the zeros left out. Pictures of yours are better to calibrate on than these are.
recipe = {"steps": ["sparsegpt"], "sparsity": 0.7, "calibration": {"samples": 64}, "evaluate": {"source": None}}
prunella.prune(name, recipe, output=out / "pruned")
pack_model(str(out / "pruned"), out / "packed")
packed = prunella.load_packed(out / "packed")

model = prunella.open_model(name, device="cpu")
prepare, _ = model.task.prepared(model)
files = sorted(path for path in pictures.rglob("*") if path.suffix.lower() in ENDINGS)
seen = [prepare(ImageOps.exif_transpose(Image.open(file)).convert("RGB")) for file in files]
batches = [
    {key: torch.stack([one[key] for one in some]) for key in some[0]}
    for some in (seen[start : start + BATCH] for start in range(0, len(seen), BATCH))
]


@torch.inference_mode()
def classes(network):
    """The likeliest class of each picture."""
    found = [model.task.run(network, batch) for batch in batches]
    return torch.cat([getattr(scores, "logits", scores).argmax(1) for scores in found])


with model.whole() as dense:
    answers, theirs = classes(packed), classes(dense)
    times = in_turns({"dense": lambda: classes(dense), "packed": lambda: classes(packed)}, rounds=3, seconds=0.0)

labels = labels_of(packed)
for file, ours, before in zip(files, answers.tolist(), theirs.tolist(), strict=True):
    print(f"{file.name}: {labels.name(ours)}{'' if ours == before else f' (dense: {labels.name(before)})'}")
agree = float((answers == theirs).double().mean())
milliseconds = {side: 1e3 * found.quantile(0.5) / len(files) for side, found in times.items()}
print(
    f"{len(files)} pictures: {agree:.0%} of the answers agree; dense {milliseconds['dense']:.1f} ms a picture, packed"
    f" {milliseconds['packed']:.1f} ({milliseconds['dense'] / milliseconds['packed']:.2f} times as fast)"
)
