"""From a name (of the hub, of a directory, a .gguf file, built in) to a directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import InputError, ModelError, say
from ..machine import cache_directory
from .built_in import BUILT_IN, fetch_built_in
from .convert import converted, from_gguf, key_of
from .files import PICKLES, read_json, weight_files
from .hub import from_hub
from .timm_models import PREFIX, repository
from .tokenizer import load_tokenizer


def find_directory(name: str, *, remote_code: bool = False, pickles: bool = False, revision: str | None = None) -> Path:
    """The local directory with the safetensors, config and tokenizer of `name`.

    A GGUF file and a built-in model are dequantized once into the cache; a model of the hub is downloaded, and a line
    on stderr says so.

    Args:
        name: hub id, `timm:NAME`, directory, .gguf file or built-in name; `HUB-ID@REVISION` is the same as `revision`.
        remote_code: take a model that comes with Python code, which opening it will run.
        pickles: take weights that only come as pickles.
        revision: of a hub's model: a branch, tag or commit.

    Raises:
        InputError: a revision of what is not on the hub.
        ModelError: no such model, or one that only comes as pickles.
    """
    name = at_revision(name, revision)
    path = Path(name)
    if path.is_dir():
        return _checked(path, pickles, remote_code)
    if name in BUILT_IN:
        return fetch_built_in(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"GGUF file '{name}' does not exist.")
        return from_gguf(path, cache_directory() / "gguf" / f"{path.stem}-{key_of(path, [path])}")
    if path.exists():
        raise ModelError(f"'{name}' is a file, but not a .gguf one. Give a model directory instead.")
    return _checked(from_hub(repository(name) if name.startswith(PREFIX) else name, pickles), pickles, remote_code)


def at_revision(name: str, revision: str | None) -> str:
    """The name of a revision of a hub's model. Raises InputError where there are none."""
    if revision is None:
        return name
    if Path(name).exists() or name in BUILT_IN or name.endswith(".gguf"):
        raise InputError(f"'{name}' is no model of the hub: it has no revision '{revision}'.")
    return f"{name}@{revision}"


def named(name: str) -> dict[str, str | None]:
    """A model's name for a report: `name` as it was given and, for a directory or a file, its absolute `path`."""
    path = Path(name)
    local = path.is_dir() or (name not in BUILT_IN and path.is_file())
    return {"name": name, "path": str(path.absolute()) if local else None}


def _checked(directory: Path, pickles: bool, remote_code: bool) -> Path:
    adapter = directory / "adapter_config.json"
    if not (directory / "config.json").is_file():
        if adapter.is_file():
            raise _adapter(directory)
        raise ModelError(f"directory '{directory}' holds no model: config.json is missing.")
    if weight_files(directory):
        if adapter.is_file():
            say(f"'{directory}' holds an adapter beside the model ({adapter.name}): it is left out; merge it first.")
        return directory
    found = [path for glob in PICKLES for path in sorted(directory.glob(glob)) if not path.name.startswith("adapter_")]
    if not found:
        if adapter.is_file():
            raise _adapter(directory)
        raise ModelError(f"directory '{directory}' holds no weights: no .safetensors file is there.")
    if not pickles:
        named = next((path for path in found if path.name.startswith("pytorch_model")), found[0])
        raise ModelError(
            f"the weights in '{directory}' are pickles ({named.name}), which can run code when they are read."
            " Use a safetensors copy, or pass --allow-pickle if you trust them."
        )
    return converted(
        cache_directory() / "pickle" / f"{directory.name}-{key_of(directory, [*found, directory / 'config.json'])}",
        lambda auto: _class_of(directory, auto).from_pretrained(
            directory, dtype="auto", trust_remote_code=remote_code, output_loading_info=True
        ),
        str(directory),
        lambda: load_tokenizer(directory, str(directory), remote_code),
        beside=directory,
    )


def _class_of(directory: Path, auto: Any) -> Any:
    """The class of transformers whose weights these are, so that a classifier keeps its head; `auto` if the config
    names none."""
    import transformers

    names = read_json(directory / "config.json").get("architectures")
    return getattr(transformers, str(names[0]), auto) if isinstance(names, list) and names else auto


def _adapter(directory: Path) -> ModelError:
    base = read_json(directory / "adapter_config.json").get("base_model_name_or_path")
    of = f" on '{base}'" if base else ""
    return ModelError(
        f"'{directory}' is an adapter{of}, not a model: merge it first"
        " (PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(DIR)) and give DIR."
    )
