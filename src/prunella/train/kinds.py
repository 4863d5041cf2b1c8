"""What the tensors of a network are, beside its layers: norms, biases, the head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..model.network import Model


def kind_of(name: str, tensors: Mapping[str, Tensor]) -> str:
    """What a tensor outside the linear layers is: a gain or shift of a norm is a vector called weight, or the bias
    beside one."""
    owner, _, key = name.rpartition(".")
    weight = tensors.get(f"{owner}.weight")
    if key == "weight" and tensors[name].ndim == 1:
        return "norm"
    if key.endswith("bias"):
        return "norm bias" if weight is not None and weight.ndim == 1 else "bias"
    return "other"


def kinds_of(name: str, tensors: Mapping[str, Tensor]) -> frozenset[str]:
    """As `kind_of`; a norm's bias is both."""
    return frozenset(kind_of(name, tensors).split())


def weight_of(network: nn.Module, getter: str) -> Tensor | None:
    """The weight of a module that networks of a library tell, if this one does and the module has one."""
    try:
        module = getattr(network, getter, lambda: None)()
    except NotImplementedError:
        return None
    weight = getattr(module, "weight", None)
    return weight if isinstance(weight, nn.Parameter) and weight.ndim > 1 else None


def head_of(model: Model) -> Tensor | None:
    """The weight that puts out: as transformers or timm tell, or that of the last linear layer outside the blocks."""
    for getter in ("get_output_embeddings", "get_classifier"):
        if (weight := weight_of(model.network, getter)) is not None:
            return weight
    linear = {name: m.weight for name, m in model.network.named_modules() if isinstance(m, nn.Linear)}
    outside = [weight for name, weight in linear.items() if model.block_of(f"{name}.weight") is None]
    return outside[-1] if outside and not model.task.language else None
