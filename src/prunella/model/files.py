"""The files of a model's directory: which of them hold its weights, which belong to it beside them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import ModelError

SINGLE = "model.safetensors"
PICKLED = "pytorch_model.bin"
PICKLES = ("*.bin", "*.pt", "*.pth")
# The files beside a model's weights that belong to it: configs, tokenizer, chat templates, code, license.
COMPANIONS = (
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.tiktoken",
    "*.spm",
    "*.vocab",
    "*.codes",
    "*tokenizer*",
    "*LICENSE*",
    "*NOTICE*",
)
TEMPLATES = "additional_chat_templates"  # a folder that belongs to them
MODULES = "modules.json"  # of sentence-transformers: what follows the network, each in a folder of its own


def weight_files(directory: Path) -> list[str]:
    """The safetensors files that hold a directory's weights, chosen as transformers chooses: what config.json names,
    `model.safetensors`, what an index names. Where there is neither, which transformers would refuse: all parts of
    one name, or the only file. None if transformers would read a pickle. Raises ModelError, naming the file, for a
    damaged index, a missing part, and where it is not clear which files are the model."""
    named = read_json(directory / "config.json").get("transformers_weights")
    if isinstance(named, str) and not named.endswith(".index.json"):
        return [named]
    if named is None and (directory / SINGLE).is_file():
        return [SINGLE]
    index = directory / (named or f"{SINGLE}.index.json")
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"'{index}' is damaged: {error}.") from None
        for name in names:
            if not (directory / name).is_file():
                raise ModelError(f"'{index}' names '{name}', which is missing.")
        return names
    if (directory / PICKLED).is_file() or (directory / f"{PICKLED}.index.json").is_file():
        return []
    found = sorted(p.name for p in directory.glob("*.safetensors") if not p.name.startswith("adapter_"))
    parts = {name: match.groups() for name in found if (match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.\w+", name))}
    sets = {(stem, count) for stem, _, count in parts.values()}
    if len(sets) == 1:
        ((stem, count),) = sets
        whole = [f"{stem}-{k + 1:0{len(count)}d}-of-{count}.safetensors" for k in range(int(count))]
        for name in whole:
            if name not in parts:
                raise ModelError(f"'{directory / name}' is missing: the directory holds {len(parts)} of {count} parts.")
        return whole
    if len(found) > 1:
        raise ModelError(
            f"directory '{directory}' holds {len(found)} .safetensors files ({', '.join(found[:3])} …) and neither"
            f" {SINGLE} nor an index of parts ({SINGLE}.index.json): leave only those of one model there."
        )
    return found


def files_in(directory: Path) -> list[str]:
    """All the safetensors files of a directory in the making, where an index may not be written yet."""
    return sorted(path.name for path in directory.glob("*.safetensors"))


def companions(directory: Path) -> list[Path]:
    """The files beside a model's weights that belong to it, those of `additional_chat_templates/` too; not an adapter,
    nor indexes of weights. What sentence-transformers puts behind the network (pooling, say) belongs to it as a whole,
    weights too."""
    places = [path for path in (directory, directory / TEMPLATES) if path.is_dir()]
    files = (path for place in places for path in sorted(place.iterdir()) if path.is_file())
    behind = [directory / module["path"] for module in modules_behind(directory)]
    return [
        path
        for path in files
        if any(fnmatchcase(path.name, glob) for glob in COMPANIONS)
        and not path.name.startswith("adapter_")
        and not path.name.endswith(".index.json")
        and path.suffix not in (".safetensors", ".bin", ".gguf")
    ] + [path for folder in behind if folder.is_dir() for path in sorted(folder.iterdir()) if path.is_file()]


def modules_behind(directory: Path) -> list[dict[str, str]]:
    """What sentence-transformers puts behind a network, by its modules.json: `path`, a folder in the directory, and
    `type`, a class; nothing where there is none."""
    try:
        said = json.loads((directory / MODULES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    found = [one for one in said if isinstance(one, dict)] if isinstance(said, list) else []
    named = [{key: str(one.get(key, "")) for key in ("path", "type")} for one in found]
    return [one for one in named if one["path"] and Path(one["path"]).name == one["path"]]


def copy_companions(source: Path, target: Path, but: Collection[str] = ()) -> None:
    """Copy a model's companions, except those of these names."""
    for path in companions(source):
        if path.name not in but:
            (target / path.relative_to(source)).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target / path.relative_to(source))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if it holds none or cannot be read, which is reported elsewhere."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
