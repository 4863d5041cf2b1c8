"""Networks of timm, as directories in the layout of its hub: `config.json` with `architecture` and `pretrained_cfg`,
and the weights in safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compat import quiet
from ..errors import ModelError, first_line, unknown
from .files import SINGLE

PREFIX = "timm:"  # of a name that timm knows a model of the hub by


def timm() -> Any:
    """The package. Raises ModelError where it is not installed."""
    try:
        import timm
        import timm.data
        import timm.models
    except ImportError as error:
        raise ModelError(
            f"networks of timm need the package timm ({first_line(error)}): pip install 'prunella[vision]'."
        ) from None
    return timm


def is_timm(config: Mapping[str, Any]) -> bool:
    """Is this the config.json of a directory in timm's layout?"""
    return isinstance(config.get("architecture"), str) and not config.get("architectures")


def repository(name: str) -> str:
    """The hub's name, and its revision if one is given, of what timm knows by `timm:NAME[@REVISION]`. Raises
    ModelError."""
    known, at, revision = name.removeprefix(PREFIX).partition("@")
    try:
        found = timm().models.get_pretrained_cfg(known, allow_unregistered=False)
    except (RuntimeError, KeyError, ValueError):
        found = None
    if found is None:
        names = timm().list_models(f"{known.partition('.')[0][:4]}*", pretrained=True) or [known[:4] + "…"]
        raise ModelError(f"timm: {unknown('model', known, names)}")
    if not found.hf_hub_id:
        raise ModelError(
            f"timm has no weights of '{known}' on the hub: give a directory, or a name with other weights."
        )
    return f"{found.hf_hub_id}{at}{revision}"


def build(directory: Path) -> nn.Module:
    """The network of a directory, its weights random. Raises ModelError for a config that timm cannot build."""
    package = timm()
    try:
        with quiet("timm"):
            network: nn.Module = package.create_model(f"local-dir:{directory}", pretrained=False)
    except Exception as error:
        raise ModelError(
            f"timm cannot build the network that '{directory}/config.json' names: {first_line(error)}"
        ) from error
    return network


def save_timm(network: Any, folder: Path) -> None:
    """Write a network of timm that is in memory. Raises ModelError where timm would build another one from it: one
    whose layers were changed since it was made."""
    import accelerate

    with quiet("timm"):
        timm().models.save_for_hf(network, str(folder), safe_serialization=True)
    with accelerate.init_empty_weights(include_buffers=False):
        made = {name: tensor.shape for name, tensor in build(folder).state_dict().items()}
    own = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if made != own:
        name = min(key for key in made.keys() | own.keys() if made.get(key) != own.get(key))
        raise ModelError(
            f"this {type(network).__name__} was changed since timm made it ('{name}'), and cannot be made again by its"
            " name: prune it as task 'module'."
        )


# ---------------------------------------------------------------------------------------------------------
# EfficientNet-Lite0 from its package


def write_efficientnet(pickle: Path, folder: Path) -> None:
    """EfficientNet-Lite0, as its package has it, in timm's layout. Its tensors are timm's in the same order under other
    names, and it sees pictures as (x - 127) / 128. Raises ModelError where timm's network has become another one."""
    from safetensors.torch import save_file

    package = timm()
    state = torch.load(pickle, map_location="cpu", weights_only=True)
    with quiet("timm"):
        network = package.create_model("tf_efficientnet_lite0", pretrained=False)
    wanted = network.state_dict()
    if [tensor.shape for tensor in state.values()] != [tensor.shape for tensor in wanted.values()]:
        raise ModelError(f"timm {package.__version__} knows another EfficientNet-Lite0: install timm 1.0.")
    classes = package.data.ImageNetInfo("imagenet-1k")
    config = {
        "architecture": "tf_efficientnet_lite0",
        "num_classes": network.num_classes,
        "num_features": network.num_features,
        "label_names": classes.label_names(),
        "label_descriptions": classes.label_descriptions(as_dict=True),
        "pretrained_cfg": {
            "tag": "in1k",
            "input_size": [3, 224, 224],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 0.875,
            "crop_mode": "center",
            "mean": [127 / 255] * 3,
            "std": [128 / 255] * 3,
            "num_classes": network.num_classes,
            "pool_size": [7, 7],
            "first_conv": "conv_stem",
            "classifier": "classifier",
            "license": "apache-2.0",
        },
    }
    folder.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in zip(wanted, state.values(), strict=True)}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------
# What a network of timm says of itself


def of_timm(network: Any) -> bool:
    """Was it made by timm? transformers' networks have a config of another kind."""
    return isinstance(getattr(network, "pretrained_cfg", None), Mapping) and not hasattr(network, "config")


def known_to_timm(network: Any) -> dict[str, Any]:
    """What `is_timm` knows a network in memory by, in place of its config.json; nothing for one that is not timm's."""
    return {"architecture": network.pretrained_cfg["architecture"], "architectures": ()} if of_timm(network) else {}


def pictures_of(network: Any) -> dict[str, Any] | None:
    """How it wants pictures, as timm's `create_transform` takes it; None where nothing says so."""
    config = getattr(network, "pretrained_cfg", None) or {}
    if not all(config.get(key) for key in ("input_size", "mean", "std")):
        return None
    found: dict[str, Any] = timm().data.resolve_data_config({}, pretrained_cfg=config)
    return found


def named_classes(network: Any) -> tuple[list[str], list[str]]:
    """The names of its classes and their ids, as far as its config knows them: of each an entry a class, or none. Of
    ImageNet's classes, which timm's networks do not name, they are timm's own list."""
    config, count = getattr(network, "pretrained_cfg", None) or {}, getattr(network, "num_classes", 0)
    names = config.get("label_names") or ()
    if isinstance(names, Mapping):
        names = [names.get(n, names.get(str(n), "")) for n in range(count)]
    names, said = [str(name) for name in names], config.get("label_descriptions") or {}
    if not names:
        if not re.search(r"in(1k|12k|21k|22k)|imagenet|miil", str(config.get("tag", ""))):
            return [], []
        subset = timm().data.infer_imagenet_subset({"num_classes": count})
        if subset is None:
            return [], []
        info = timm().data.ImageNetInfo(subset)
        names, said = list(info.label_names()), info.label_descriptions(as_dict=True)
    if len(names) != count:
        return [], []
    words = [str(said.get(name, name)) for name in names] if isinstance(said, Mapping) else list(map(str, said))
    return (words if len(words) == count else names), names
