"""Models of the hub: on this machine already, or downloaded."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from ..errors import ModelError, first_line, say, unknown
from .built_in import BUILT_IN
from .files import COMPANIONS, PICKLED, SINGLE, TEMPLATES, read_json, weight_files


def from_hub(name: str, pickles: bool, weights: bool = True) -> Path:
    """The directory of a model of the hub, downloaded if need be: its companions (config, tokenizer, …) and, with
    `weights`, of its files of weights only those that transformers reads."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    options: dict[str, Any] = {"revision": revision} if revision else {}
    wanted = [*COMPANIONS, f"{TEMPLATES}/*", *([SINGLE] if weights else ())]
    below = [f"*/{glob}" for glob in COMPANIONS if glob != "*.jinja"]  # other folders hold other models' files
    hint = f" Built-in models: {', '.join(BUILT_IN)}. Otherwise give a directory, a .gguf file or a hub id."
    near = unknown("model", name, BUILT_IN)
    suggestion = near[near.index(".") + 1 : near.index(" Available")] if "Did you mean" in near else ""

    def missing(here: Path) -> list[str]:
        """What is to be fetched of the weights."""
        if not weights or (here / SINGLE).is_file():
            return []
        for index in [SINGLE, PICKLED] if pickles else [SINGLE]:
            if named := read_json(here / f"{index}.index.json").get("weight_map"):
                return sorted({file for file in named.values() if not (here / file).is_file()})
        return [PICKLED] if pickles and not (here / PICKLED).is_file() else []

    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            here = Path(snapshot_download(repository, allow_patterns=wanted, local_files_only=True, **options))
            complete = (here / "config.json").is_file() if weights else any(here.glob("*token*"))
            if complete and not missing(here) and (not weights or _has_weights(here, pickles)):
                return here
        say(f"downloading {name} from the hub")
        here = Path(snapshot_download(repository, allow_patterns=wanted, ignore_patterns=below, **options))
        if rest := missing(here):
            here = Path(snapshot_download(repository, allow_patterns=rest, **options))
        return here
    except HFValidationError:
        raise ModelError(f"model '{name}' does not exist.{suggestion}{hint}") from None
    except Exception as error:
        raise ModelError(
            f"model '{name}' is not on this machine and could not be had from the hub ({first_line(error)})."
            f"{suggestion}{hint}"
        ) from None


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a model of the hub, or nothing: where there is none, `from_hub` says why."""
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.partition("@")
    try:
        return read_json(Path(hf_hub_download(repository, "config.json", revision=revision or None)))
    except Exception:
        return {}


def _has_weights(directory: Path, pickles: bool) -> bool:
    """Does a directory of the hub's cache hold weights? Loading only a tokenizer leaves none there."""
    try:
        return bool(weight_files(directory)) or (pickles and any(directory.glob(f"{PICKLED.partition('.')[0]}*.bin")))
    except ModelError:
        return False
