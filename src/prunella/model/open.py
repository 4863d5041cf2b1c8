"""From a name, or a network in memory, to a `Model`. What it is for, its task says."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..compat import name_of, quiet_transformers
from ..errors import InputError, ModelError, PrunellaError, command, first_line, unknown
from ..machine import pick_device
from .checkpoint import Checkpoint
from .checks import check_complete
from .names import at_revision, find_directory
from .network import Model
from .quantized import READ, foreign
from .tokenizer import given_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from .task import Task

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_files(
    name: str,
    task: Task,
    auto: str,
    kind: str,
    *,
    admit: Callable[[str, Any], None],
    check: Callable[[Model], None],
    dtype: str = "auto",
    device: str = "auto",
    remote_code: bool = False,
    pickles: bool = False,
    packed: bool = False,
    revision: str | None = None,
    tokenizer: Any = None,
    processor: Callable[[Path, str, bool], Any] = load_tokenizer,
) -> Model:
    """A transformers model by its name, its weights not read yet.

    Args:
        auto: the class of transformers that builds it.
        kind: what such a model is called.
        admit: raises ModelError for a config that is none of such a model, `admit(name, config)`.
        check: raises ModelError for a network that is none, `check(model)`.
        processor: reads what makes samples from the model's directory, `processor(directory, name, remote_code)`: a
            tokenizer, or what turns pictures or sounds into tensors.

    The other arguments, and what else raises ModelError, are as for `prunella.load_model`.
    """
    import accelerate
    import transformers

    name = at_revision(name, revision)
    directory = find_directory(name, remote_code=remote_code, pickles=pickles)
    checkpoint = Checkpoint(directory)
    if dtype not in DTYPES and dtype != "auto":
        raise InputError(unknown("dtype", dtype, [*DTYPES, "auto"]))
    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=remote_code)
    except Exception as error:
        if "trust_remote_code" in str(error) and not remote_code:
            raise ModelError(
                f"'{name}' comes with Python code of its own, which is not run unless you ask for it: pass"
                " --trust-remote-code if you trust it."
            ) from None
        raise ModelError(f"the config.json of '{name}' cannot be used: {first_line(error)}") from None
    built_by: Any = getattr(transformers, auto)
    method = checkpoint.quantization.get("quant_method")
    if method == "prunella" and packed:  # its weights stay packed, in memory
        try:
            with quiet_transformers():
                wanted: Any = DTYPES.get(dtype, dtype)
                network = built_by.from_pretrained(directory, dtype=wanted, trust_remote_code=remote_code)
        except PrunellaError:
            raise
        except Exception as error:
            raise ModelError(f"the packed model '{name}' cannot be loaded: {first_line(error)}") from None
        own = given_tokenizer(tokenizer, remote_code) or processor(directory, name, remote_code)
        network.to(pick_device(device))
        network.tie_weights()  # to some devices torch moves each name of a tensor by itself
        return task.wrap(network, own, name)
    if method == "prunella":
        raise ModelError(f"'{name}' is packed: {command('unpack', name)} -o OUT makes a plain model of it.")
    foreign_kind = foreign(checkpoint.where)
    if foreign_kind or (checkpoint.quantization and method not in READ):
        raise ModelError(f"'{name}' is quantized ({method or foreign_kind}): dequantize it before pruning.")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are read as plain ones
    admit(name, config)
    try:
        with quiet_transformers(), contextlib.suppress(OSError):  # none, or no JSON: transformers does without
            transformers.GenerationConfig.from_pretrained(directory)
    except Exception as error:
        raise ModelError(
            f"the generation_config.json of '{name}' is invalid: {first_line(error)} Mend or delete it."
        ) from None
    wanted = checkpoint.dtype() if dtype == "auto" else DTYPES[dtype]
    try:
        with accelerate.init_empty_weights(include_buffers=False), quiet_transformers():
            network = built_by.from_config(config, dtype=wanted, trust_remote_code=remote_code)
    except Exception as error:
        raise ModelError(f"'{name}' is no {kind} that transformers can build: {first_line(error)}") from None
    own = given_tokenizer(tokenizer, remote_code) or processor(directory, name, remote_code)
    model = _streamed(network, own, checkpoint, device, name, task, check)
    model.tokenizer_given = tokenizer is not None
    return model


def open_plain(
    build: Callable[[], nn.Module],
    directory: Path,
    task: Task,
    *,
    name: str = "",
    dtype: str = "auto",
    device: str = "auto",
    processor: Any = None,
) -> Model:
    """Any network by the safetensors files in a directory, whose tensors go by the names of its state dict; its weights
    are not read yet.

    Args:
        build: makes the network. Its parameters are on the meta device then, and whatever it does to them is lost; its
            buffers are real.
        name: what reports call it; by default the directory's.
        processor: what makes samples.

    Raises ModelError where a tensor is missing or of another shape, and for a network that cannot be built so; its
    cause is what `build` raised.
    """
    import accelerate

    name = name or str(directory)
    checkpoint = Checkpoint(directory)
    if dtype not in DTYPES and dtype != "auto":
        raise InputError(unknown("dtype", dtype, [*DTYPES, "auto"]))
    try:
        with accelerate.init_empty_weights(include_buffers=False), warnings.catch_warnings():
            # A factory may load its weights, which are lost here.
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter", UserWarning)
            network = build()
    except PrunellaError:
        raise
    except Exception as error:
        raise ModelError(f"'{name}' cannot be built without its weights: {first_line(error)}") from error
    network.to(checkpoint.dtype() if dtype == "auto" else DTYPES[dtype])
    return _streamed(network, processor, checkpoint, device, name, task, lambda model: None)


def _streamed(
    network: Any,
    processor: Any,
    checkpoint: Checkpoint,
    device: str,
    name: str,
    task: Task,
    check: Callable[[Model], None],
) -> Model:
    """A network without weights as a model, once it is known that the checkpoint has all of them."""
    network.requires_grad_(False)
    model = Model(network, processor, checkpoint, pick_device(device), name, task)
    check(model)
    check_complete(model)
    for owner in network.modules():  # buffers are real from the start: bring them where the blocks compute
        for key, buffer in owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                owner._buffers[key] = buffer.to(model.device)
    return model


def wrap(network: nn.Module, task: Task, tokenizer: Any = None, name: str = "") -> Model:
    """A network that is in memory already, as a `Model` for a task. It stays on the device on which it is.

    Raises ModelError where it is spread over several devices, or not in memory.
    """
    places = sorted({str(parameter.device) for parameter in network.parameters()})
    if len(places) != 1 or places == ["meta"]:
        where = " and ".join(places) or "no device"
        raise ModelError(
            f"the weights of this {type(network).__name__} lie on {where}: load all of them on one device, or"
            " give the model's name or directory; of that one block at a time is loaded."
        )
    known = name_of(getattr(network, "config", None))
    return Model(network, tokenizer, None, torch.device(*places), name or known or "in memory", task)
