"""What is refused of a network in memory, and of its files, whatever it is for."""

from __future__ import annotations

import re
from typing import Any

from torch.nn.parameter import is_lazy

from ..compat import conversions, may_be_missing, quiet_transformers
from ..errors import ModelError
from .network import Model


def check_plain(network: Any) -> None:
    """Raises ModelError for a network in memory whose weights are made of others, a PeftModel, or one under
    torch.nn.utils.prune or parametrize; and for one that has none yet."""
    from torch.nn.utils import parametrize
    from torch.nn.utils import prune as reparametrization

    kind = type(network).__name__
    if lazy := [name for name, parameter in network.named_parameters() if is_lazy(parameter)]:
        raise ModelError(f"the {kind} is lazy, '{lazy[0]}' has no shape yet: run it once first.")
    if (
        kind.startswith("Peft")
        or getattr(network, "peft_config", None)
        or any(hasattr(module, "base_layer") for module in network.modules())
    ):
        raise ModelError(f"the {kind} carries an adapter: merge it first (model.merge_and_unload()).")
    if reparametrization.is_pruned(network):
        raise ModelError(
            f"the {kind} is under torch.nn.utils.prune: call prune.remove first, on each module and parameter."
        )
    if any(parametrize.is_parametrized(module) for module in network.modules()):
        raise ModelError(
            f"the {kind} is under torch.nn.utils.parametrize: call parametrize.remove_parametrizations first."
        )


def check_config(network: Any) -> None:
    """Raises ModelError for a network in memory that is none of transformers, where its task takes no other."""
    if not hasattr(network, "config"):
        raise ModelError(f"this {type(network).__name__} is no model of transformers: say what it is for (task).")


def check_saveable(network: Any) -> None:
    """Raises ModelError for a network in memory that transformers would not save: its generation config is invalid."""
    if hasattr(network, "can_generate") and network.can_generate():
        try:
            with quiet_transformers():
                network.generation_config.validate(strict=True)
        except ValueError as error:
            raise ModelError(
                f"the generation config of the {type(network).__name__} is invalid, and cannot be saved:"
                f" {' '.join(str(error).split())} Mend model.generation_config first."
            ) from None


def check_complete(model: Model) -> None:
    """Raises ModelError, naming the tensor, for one that the network needs and the checkpoint lacks, or has in
    integers: before any weight is read."""
    assert model.checkpoint is not None
    state = model.network.state_dict()  # persistent buffers are weights too
    found = {name for name, _ in model.plan().values()}
    for key, (name, _) in model.plan().items():
        code = model.checkpoint.files[model.checkpoint.where[key]][key][0]
        if name in state and state[name].is_floating_point() and code not in ("F32", "BF16", "F16", "F64"):
            raise ModelError(
                f"tensor '{key}' in '{model.checkpoint.directory}' is stored as {code}: only F32, BF16 and F16 can"
                " be pruned. Dequantize the model first."
            )
    for pair in model.tied.items():
        if found & set(pair):
            found |= set(pair)
    _check_groups(model)
    _, converters = conversions(model.network)
    split = [re.compile(p) for c in converters if len(c.target_patterns) > 1 for p in c.target_patterns]
    free = [re.compile(p) for p in may_be_missing(model.network)]
    for name in state:
        if name not in found and not any(pattern.search(name) for pattern in (*split, *free)):
            known = f"{name}_orig" in model.checkpoint.where
            hint = " It was saved under torch.nn.utils.prune: call prune.remove first." if known else ""
            raise ModelError(f"tensor '{name}' is missing from the checkpoint in '{model.checkpoint.directory}'.{hint}")


def _check_groups(model: Model) -> None:
    """Where a parameter is made of several tensors, each block has the same ones, and those of all experts."""
    assert model.checkpoint is not None
    groups: dict[str, dict[str, set[tuple[str, int]]]] = {}  # parameter in its block -> block -> tensor, expert
    for key, (name, converted) in model.plan().items():
        if converted and (block := model.block_of(name)) is not None:
            short = key.replace(f".{block.rpartition('.')[2]}.", ".{}.", 1)
            number = re.search(r"\.(\d+)\.", short)
            found = (re.sub(r"\.\d+\.", ".{}.", short, count=1), int(number[1]) if number else 0)
            groups.setdefault(name.removeprefix(block), {}).setdefault(block, set()).add(found)
    for place, blocks in groups.items():
        templates = {template for found in blocks.values() for template, _ in found}
        for block, those in blocks.items():
            whole = model.network.get_parameter_or_buffer(block + place)
            experts = len(whole) if whole.ndim == 3 else 1
            every = {(t, e) for t in templates for e in (range(experts) if t.count("{}") > 1 else range(1))}
            if missing := sorted(every - those):
                name = missing[0][0].format(block.rpartition(".")[2], missing[0][1])
                raise ModelError(f"tensor '{name}' is missing from the checkpoint in '{model.checkpoint.directory}'.")
