"""From a name, or a network in memory, to a `Model`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch

from ..compat import name_of, quiet_transformers
from ..errors import InputError, ModelError, PrunellaError, command, first_line, unknown
from ..machine import pick_device
from ..quantized import READ, foreign
from .checkpoint import Checkpoint
from .checks import check_causal, no_decoder
from .names import at_revision, find_directory
from .network import Model
from .tokenizer import given_tokenizer, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    remote_code: bool = False,
    pickles: bool = False,
    packed: bool = False,
    revision: str | None = None,
    tokenizer: Any = None,
) -> Model:
    """Open a model without reading its weights.

    Args:
        name: hub id, directory, .gguf file or built-in name.
        dtype: float32, bfloat16, float16; `auto` is what the checkpoint is stored in.
        device: where blocks are computed: cpu, cuda, cuda:1 …; `auto` is cuda where there is one.
        remote_code: run Python that comes with the model.
        pickles: read weights that only come as pickles.
        packed: take a packed model as well; it is read into memory, packed as it is, and cannot be pruned.
        revision: of a hub's model: a branch, tag or commit.
        tokenizer: in place of the model's own: a tokenizer, or the directory or hub id of one.

    Raises:
        ModelError: no such model, or one that cannot be read or pruned: a tensor is missing, it is quantized, it is no
            causal language model.
    """
    import accelerate
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    name = at_revision(name, revision)
    directory = find_directory(name, remote_code=remote_code, pickles=pickles)
    checkpoint = Checkpoint(directory)
    if dtype not in DTYPES and dtype != "auto":
        raise InputError(unknown("dtype", dtype, [*DTYPES, "auto"]))
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=remote_code)
    except Exception as error:
        if "trust_remote_code" in str(error) and not remote_code:
            raise ModelError(
                f"'{name}' comes with Python code of its own, which is not run unless you ask for it: pass"
                " --trust-remote-code if you trust it."
            ) from None
        raise ModelError(f"the config.json of '{name}' cannot be used: {first_line(error)}") from None
    method = checkpoint.quantization.get("quant_method")
    if method == "prunella" and packed:
        return _load_packed(directory, name, dtype, device, remote_code, tokenizer)
    if method == "prunella":
        raise ModelError(f"'{name}' is packed: {command('unpack', name)} -o OUT makes a plain model of it.")
    kind = foreign(checkpoint.where)
    if kind or (checkpoint.quantization and method not in READ):
        raise ModelError(f"'{name}' is quantized ({method or kind}): dequantize it before pruning.")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are read as plain ones
    if config.is_encoder_decoder:
        raise no_decoder(name, f"{config.model_type} is an encoder and a decoder")
    try:
        with quiet_transformers(), contextlib.suppress(OSError):  # none, or no JSON: transformers does without
            GenerationConfig.from_pretrained(directory)
    except Exception as error:
        raise ModelError(
            f"the generation_config.json of '{name}' is invalid: {first_line(error)} Mend or delete it."
        ) from None
    wanted = checkpoint.dtype() if dtype == "auto" else DTYPES[dtype]
    try:
        with accelerate.init_empty_weights(include_buffers=False), quiet_transformers():
            network = AutoModelForCausalLM.from_config(config, dtype=wanted, trust_remote_code=remote_code)
    except Exception as error:
        raise ModelError(
            f"'{name}' is no causal language model that transformers can build: {first_line(error)}"
        ) from None
    network.requires_grad_(False)
    own = given_tokenizer(tokenizer, remote_code) or load_tokenizer(directory, name, remote_code)
    model = Model(network, own, checkpoint, pick_device(device), name)
    check_causal(model)
    model.check_complete()
    model.tokenizer_given = tokenizer is not None
    for buffer_owner in network.modules():  # buffers are real from the start: bring them where the blocks compute
        for key, buffer in buffer_owner._buffers.items():
            if buffer is not None and not buffer.is_meta:
                buffer_owner._buffers[key] = buffer.to(model.device)
    return model


def _load_packed(
    directory: Path, name: str, dtype: str, device: str, remote_code: bool, tokenizer: Any = None
) -> Model:
    """A model whose weights stay packed, in memory."""
    from transformers import AutoModelForCausalLM

    wanted: Any = DTYPES.get(dtype, dtype)
    try:
        with quiet_transformers():
            network = AutoModelForCausalLM.from_pretrained(directory, dtype=wanted, trust_remote_code=remote_code)
    except PrunellaError:
        raise
    except Exception as error:
        raise ModelError(f"the packed model '{name}' cannot be loaded: {first_line(error)}") from None
    own = given_tokenizer(tokenizer, remote_code) or load_tokenizer(directory, name, remote_code)
    network.to(pick_device(device))
    network.tie_weights()  # to some devices torch moves each name of a tensor by itself
    return wrap_model(network, own, name)


def wrap_model(network: Any, tokenizer: Any = None, name: str = "") -> Model:
    """A transformers model that is already in memory, as a `Model`. It stays on the device on which it is.

    It is put into evaluation mode, and its attention and its experts are computed in the way that pruning can watch,
    until `Model.give_back` is called.

    Args:
        network: the transformers model.
        tokenizer: its tokenizer, if text is to be read.
        name: what reports call it; by default the name that it was loaded by.

    Raises:
        ModelError: it is no causal language model, or it is spread over several devices.
    """
    if config := getattr(network, "config", None):
        if config.is_encoder_decoder:
            raise no_decoder(name or "in memory", f"{config.model_type} is an encoder and a decoder")
    places = sorted({str(parameter.device) for parameter in network.parameters()})
    if len(places) > 1 or places == ["meta"]:
        raise ModelError(
            f"the weights of this {type(network).__name__} lie on {' and '.join(places)}: load all of them on one"
            " device, or give the model's name or directory; of that one block at a time is loaded."
        )
    model = Model(network, tokenizer, None, network.device, name or name_of(network.config) or "in memory")
    check_causal(model)
    return model
