"""Biases, and new ones."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..compat import quiet_transformers
from ..errors import InputError
from ..layers import find_layers
from ..lenses import Chunks
from ..model.checkpoint import Checkpoint
from ..model.files import copy_companions
from ..model.network import Model
from ..model.walk import LoadedBlock
from ..progress import Track, no_track
from ..samples import Samples
from ..stream import Stream
from ..tensors import MASKS
from ..train.parts import Change, Master, Part, trains
from ..watch import Watch

LIST = "new-biases.list"


@trains("biases")
def biases(part: Part, *, rate: float = 3e-3) -> Change | None:
    """Train the biases that the model has, those of norms too.

    Args:
        rate: learning rate.
    """
    return Master(part) if "bias" in part.kinds and not part.new else None


@trains("new-biases")
def new_biases(part: Part, *, rate: float = 3e-3) -> Change | None:
    """Add biases to linear layers, where the model's config can carry them, and train them.

    A new bias starts from the mean output error that pruning left, b = E[(W_dense - W) x], so that healing begins
    with a better model than the pruned one.

    Args:
        rate: learning rate.
    """
    return Master(part) if part.new else None


def bias_flags(model: Model) -> dict[str, list[str]]:
    """{switch of the config: names of the biases that it gives to layers}, of all that are off now."""
    import accelerate

    config = getattr(model.network, "config", None)
    if config is None or not hasattr(model.network, "save_pretrained"):
        return {}
    have = {name for name, _ in model.network.named_parameters()}
    layers = {slot.name for name in model.blocks for slot in find_layers(model.module(name), name)}
    found = {}
    for key, value in vars(config).items():
        if value is not False or "bias" not in key:
            continue
        trial = copy.deepcopy(config)
        setattr(trial, key, True)
        with accelerate.init_empty_weights(), quiet_transformers():
            network = type(model.network)(trial)
        new = [name for name, _ in network.named_parameters() if name not in have]
        if new and all(name.endswith(".bias") and name.removesuffix(".bias") in layers for name in new):
            found[key] = new
    return found


def mean_errors(
    model: Model, dense: Model, samples: Samples, names: frozenset[str], track: Track = no_track
) -> dict[str, Tensor]:
    """{bias: E[(W_dense - W) x]} over the inputs x that a layer gets from pruned blocks before it whose biases are
    corrected already."""
    stream = Stream(model, samples)
    out: dict[str, Tensor] = {}
    assert dense.checkpoint is not None
    for _, block in model.walk(track=track, what="biases"):
        weights = block.read(dense.checkpoint)
        slots = {s.name: s for s in find_layers(block.module, block.name) if f"{s.name}.bias" in names}
        sums: dict[str, Tensor] = {}
        counts: Counter[str] = Counter()

        some: dict[str, Tensor] = {}  # of one batch, which may not come to its end
        few: Counter[str] = Counter()

        def see(layer: str, rows: Chunks, same: bool, some: dict[str, Tensor] = some, few: Counter[str] = few) -> None:
            for x_TI in rows():
                sum_I = x_TI.sum(0, dtype=torch.float32)
                some[layer] = some[layer] + sum_I if layer in some else sum_I
                few[layer] += len(x_TI)

        batch = 0
        with torch.no_grad():
            while batch < len(stream.hidden):
                some.clear()
                few.clear()

                def run(block: LoadedBlock = block, batch: int = batch, watch: Watch = Watch(slots, see)) -> None:
                    with watch:
                        stream.run(block, stream.hidden, batch)

                if stream.fits(batch, run):
                    sums |= {layer: sums[layer] + sum_I if layer in sums else sum_I for layer, sum_I in some.items()}
                    counts += few
                    batch += 1
        for key, slot in slots.items():
            mean_I = sums[key] / counts[key]
            dense_OI = slot.read(weights[slot.key])
            bias_O = ((dense_OI.float() - slot.read().float()) @ mean_I).to(slot.read().dtype)
            slot.module.bias = nn.Parameter(bias_O, requires_grad=False)
            out[f"{key}.bias"] = bias_O
        stream.advance(block)
        for slot in slots.values():
            slot.module.bias = None  # type: ignore[assignment]
    return out


def write_biased(source: Path, folder: Path, flags: Mapping[str, list[str]], values: Mapping[str, Tensor]) -> None:
    """A copy of a model with new biases; its weights are links to the same files where the disk can link."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkpoint = Checkpoint(source)
    names = {file: "model-weights.safetensors" if file == "model.safetensors" else file for file in checkpoint.files}
    copy_companions(source, folder)
    for path in (*(source / file for file in names), source / MASKS):
        target = folder / names.get(path.name, path.name)
        if path.suffix == ".safetensors":
            try:
                os.link(path.resolve(), target)  # a hub's snapshots are links themselves
            except OSError:
                shutil.copy2(path, target)
        elif path.is_file():
            shutil.copyfile(path, target)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= dict.fromkeys(flags, True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    new = {name: value.contiguous() for name, value in values.items()}
    save_file(new, folder / "model-biases.safetensors", {"format": "pt"})
    where = {name: names[file] for name, file in checkpoint.where.items()}
    where |= dict.fromkeys(values, "model-biases.safetensors")
    total = checkpoint.nbytes + sum(value.numel() * value.element_size() for value in values.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / LIST).write_text("\n".join(values) + "\n", encoding="utf-8")


def add_biases(model: Model, dense: Model, samples: Samples, folder: Path, track: Track = no_track) -> None:
    """Write the model with biases that make up for the mean output error into `folder` / pruned, and the dense one with
    the same biases, all zero, into `folder` / dense. Raises InputError where the config cannot carry any."""
    flags = bias_flags(model)
    if not flags:
        kind = getattr(getattr(model.network, "config", None), "model_type", None)
        named = f"a {kind} model" if kind else f"this {type(model.network).__name__}"
        raise InputError(
            f"healing method 'new-biases': no switch in the config of {named} gives biases to its linear layers. Leave"
            " it out, or train norms."
        )
    names = frozenset(name for some in flags.values() for name in some)
    values = mean_errors(model, dense, samples, names, track)
    assert model.checkpoint is not None
    assert dense.checkpoint is not None
    zeros = {name: torch.zeros_like(value) for name, value in values.items()}
    write_biased(dense.checkpoint.directory, folder / "dense", flags, zeros)
    write_biased(model.checkpoint.directory, folder / "pruned", flags, values)
