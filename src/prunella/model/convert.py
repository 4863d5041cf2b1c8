"""GGUF files and pickles become safetensors, once, in the cache."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..compat import forget_name, quiet_transformers
from ..errors import InputError, ModelError, PrunellaError, disk_error, disk_full, first_line, say
from .files import copy_companions
from .gguf import GgufHeader


def from_gguf(path: Path, target: Path) -> Path:
    """A GGUF file, dequantized to bfloat16, as a directory. Raises ModelError for a damaged one."""
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"'{path}' is not a GGUF file, or it is damaged: it does not start with 'GGUF'.")
    from transformers import AutoTokenizer, GgufConfig

    def load(auto: Any) -> tuple[Any, dict[str, Any]]:
        header = GgufHeader.read(path)
        network, info = auto.from_pretrained(
            path.parent,
            dtype=torch.bfloat16,
            gguf_file=path.name,
            quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
            output_loading_info=True,
        )
        header.complete(network)
        return network, info

    return converted(target, load, str(path), lambda: AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))


def converted(
    target: Path,
    load: Callable[[Any], tuple[Any, dict[str, Any]]],
    what: str,
    load_tokenizer: Callable[[], Any],
    beside: Path | None = None,
) -> Path:
    """Load a whole model and write it to `target` as safetensors, with the companions in `beside`; the directory
    appears when it is whole. Raises ModelError, naming the tensor, where one is missing: transformers would make it
    up."""
    if (target / "config.json").is_file():
        return target
    from transformers import AutoModelForCausalLM

    say(f"converting {Path(what).name} to safetensors, once")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise InputError(
            f"'{target.parent}', the cache that '{what}' is to be converted into, cannot be written: {error.strerror}."
            " Set PRUNELLA_CACHE to a directory that can."
        ) from None
    try:
        with quiet_transformers():
            network, info = load(AutoModelForCausalLM)
            if missing := sorted(info["missing_keys"]):
                more = f" ({len(missing)} are missing in all)" if len(missing) > 1 else ""
                raise ModelError(f"tensor '{missing[0]}' is missing from '{what}'{more}.")
            tokenizer = load_tokenizer()
            # A dequantized GGUF model still carries the quantizer that read it, and would refuse to be saved.
            for holder, attribute in (
                (network.config, "quantization_config"),
                (network, "hf_quantizer"),
                (network, "quantization_method"),
            ):
                if hasattr(holder, attribute):
                    delattr(holder, attribute)
            network.is_quantized = False
            forget_name(network.config)
            network.save_pretrained(scratch)
            if tokenizer is not None:
                tokenizer.save_pretrained(scratch)
        if beside is not None:
            copy_companions(beside, scratch, but=[path.name for path in scratch.iterdir()])
        with contextlib.suppress(OSError):
            scratch.rename(target)  # another process may have been faster; its result is the same
    except PrunellaError:
        raise
    except Exception as error:
        if disk_full(error):
            raise disk_error(error, target.parent) from error
        raise ModelError(f"'{what}' cannot be read: {first_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def key_of(what: Path, files: Iterable[Path]) -> str:
    """A hash of these files' names, sizes and times: it changes when one of them does."""
    stats = [(path.name, (stat := path.stat()).st_size, stat.st_mtime_ns) for path in sorted(files)]
    return hashlib.sha256(f"{what.resolve()}|{stats}".encode()).hexdigest()[:16]
