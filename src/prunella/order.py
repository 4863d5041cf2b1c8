"""The order of a run: from which inputs statistics are made, and which way the blocks are taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .compat import attention_of
from .errors import InputError, say
from .layers import find_layers
from .machine import free_memory
from .model.network import Model
from .registry import Step
from .samples import Samples
from .statistics.registry import OUTPUTS, taking

Order = Literal["auto", "layer", "block", "back"]
ACTIVATIONS = 8 << 30  # bytes of them that `layer` order may hold at once where nobody chose it


def pick_order(
    order: Order, steps: Sequence[Step], samples: Samples | Tensor, model: Model
) -> Literal["layer", "block", "back"]:
    """The order of a run, if `auto` was asked for: `back` if a step reads gradients; `layer` if every step looks at one
    layer at a time and the activations of all windows take less than `ACTIVATIONS`; else `block`. The memory that is
    free does not count, so that a command gives the same masks on every machine. Raises InputError for an order in
    which the steps cannot work."""
    if _goes_back(order, steps, model.dtype):
        return "back"
    whole_block = [step.name for step in steps if not step.per_layer]
    if order == "layer" and whole_block:
        raise InputError(f"step '{whole_block[0]}' works on whole blocks: use --order block.")
    if order == "layer" or order == "block":
        return order
    if whole_block or not any(step.needs for step in steps):
        return "block"
    samples = Samples.of(samples)
    if not model.task.language or len(samples.groups) > 1:
        return "block"
    config, windows_NL = model.network.config.get_text_config(), samples.groups[0]["input_ids"]
    shapes = [s.shape for s in find_layers(model.module(model.blocks[0]), model.blocks[0])]
    widest = max((max(shape) for shape in shapes), default=0)
    tokens = windows_NL.numel()
    size = torch.empty(0, dtype=model.dtype).element_size()
    need = tokens * widest * size * 4 + tokens * widest * 4
    if any(taking("dense_TI", step.needs) for step in steps):
        need += tokens * widest * size * 3  # the dense model's inputs of all layers of a block
    if attention_of(config) == "eager":
        need += 3 * 4 * tokens * windows_NL.shape[1] * getattr(config, "num_attention_heads", 1)
    if need >= ACTIVATIONS:
        return "block"
    if need > (free := free_memory(model.device)):
        say(
            f"about {need / 1e9:.1f} GB of activations are held at once, and {free / 1e9:.1f} GB are free: if that is"
            " too little, --order block holds fewer (and gives other masks)"
        )
    return "layer"


def _goes_back(order: str, steps: Sequence[Step], dtype: torch.dtype) -> bool:
    """Does a step read gradients, so that all work on the way back? Raises InputError if that cannot be: in another
    order, beside a step that reads what is not there then, in float16."""
    if not (name := next((step.name for step in steps if step.back), None)):
        if order == "back":
            names = ", ".join(step.name for step in steps)
            raise InputError(f"order back is for steps that read gradients, which {names} does not: leave --order out.")
        return False
    if order not in ("auto", "back"):
        raise InputError(
            f"step '{name}' reads gradients, which come from the last block to the first: use --order back."
        )
    for step in steps:
        for need in sorted((step.needs & OUTPUTS) | taking("dense_TI", step.needs)):
            raise InputError(
                f"step '{step.name}' reads '{need}', which there is not on the way back, where '{name}' works: prune"
                " with one of them, and then what comes of it with the other."
            )
    if dtype == torch.float16:
        raise InputError(f"step '{name}' reads gradients, and small ones are zero in float16: use --dtype bfloat16.")
    return True
