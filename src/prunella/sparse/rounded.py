"""The embedding and the output head of a packed model in 8 bits, of which nothing is left out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..compat import of_transformers, set_tied
from ..errors import InputError
from .format import Rounded, rounded_of_parts
from .kernels import rounded_linear
from .linear import PackedModule


class RoundedLinear(PackedModule):
    """A linear layer whose weight has 8 bits, nothing left out: the output head of a packed model."""

    weight_scales: Tensor

    def __init__(self, rounded: Rounded, bias_O: nn.Parameter | None = None):
        rows, columns = rounded.values.shape
        super().__init__(rounded, rows, columns, bias_O)

    def packed(self, name: str = "weight") -> Rounded:
        """The weight, checked. Raises ModelError, naming the tensor, if it is damaged."""
        return rounded_of_parts(name, self._packed.parts(), (self.out_features, self.in_features), self.group)

    @property
    def _packed(self) -> Rounded:
        return Rounded(self.weight_values, self.weight_scales, self.group)

    @property
    def weight(self) -> Tensor:
        return self._packed.dense(torch.bfloat16)

    def product(self, x: Tensor) -> Tensor:
        y: Tensor = rounded_linear(x, self.weight_values, self.weight_scales, self.group)
        return y if self.bias is None else y + self.bias


class RoundedEmbedding(RoundedLinear):
    """An embedding in 8 bits. Its `product` is that of an output head tied to it.

    original: the module in whose place this stands, for what it knows besides its weight
    """

    dtype_of_rows: Tensor

    def __init__(self, rounded: Rounded, original: nn.Embedding, dtype: torch.dtype):
        super().__init__(rounded)
        self.num_embeddings, self.embedding_dim = rounded.values.shape
        self.padding_idx = original.padding_idx
        self.original = (original,)  # not as a module of its own
        scale = getattr(original, "scalar_embed_scale", getattr(original, "embed_scale", 1.0))
        self.scale = float(scale)
        # moves and casts with the module, which the integers do not
        self.register_buffer("dtype_of_rows", torch.empty(0, dtype=dtype), persistent=False)

    @staticmethod
    def takes(module: nn.Module) -> bool:
        """Is this a kind of embedding that can be rounded: a plain one, or one that multiplies by a constant?"""
        return type(module) is nn.Embedding or type(module).__name__.endswith("ScaledWordEmbedding")

    def forward(self, ids: Tensor) -> Tensor:
        dtype = self.dtype_of_rows.dtype
        rows = Rounded(self.weight_values[ids.flatten()], self.weight_scales[ids.flatten()], self.group).dense(dtype)
        if self.scale != 1:
            rows *= torch.tensor(self.scale, dtype=dtype)
        return rows.view(*ids.shape, self.embedding_dim)

    def plain(self, dtype: torch.dtype) -> nn.Embedding:
        """The module in whose place this stands, with its weight."""
        (module,) = self.original
        module.weight = nn.Parameter(self.weight.to(dtype))
        if isinstance(getattr(module, "embed_scale", None), Tensor):  # it was never loaded
            module.embed_scale = torch.tensor(self.scale, device=module.weight.device)
        return module


class TiedHead(nn.Module):
    """An output head that is tied to a rounded embedding, and holds nothing but its own bias."""

    bias: nn.Parameter | None

    def __init__(self, embedding: RoundedEmbedding, bias_O: nn.Parameter | None = None):
        super().__init__()
        self.out_features, self.in_features = embedding.num_embeddings, embedding.embedding_dim
        self._embedding = (embedding,)  # not as a module of its own
        self.register_parameter("bias", bias_O)

    @property
    def weight(self) -> Tensor:
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        embedding = self._embedding[0]
        y = PackedModule.forward(embedding, x.to(embedding.weight_values.device))
        return y if self.bias is None else y + self.bias


def heads(network: Any) -> dict[str, tuple[str, ...]]:
    """What can be rounded of a network, the embedding and the output head: {parameter: its names}, more than one where
    the head is tied to the embedding. Raises InputError if one of them is of a kind that cannot be rounded."""
    if not of_transformers(network):
        raise InputError(f"a {type(network).__name__} has no embedding and no output head to round: leave it out.")
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    names = {id(module): name for name, module in network.named_modules()}
    if not RoundedEmbedding.takes(embedding):
        raise InputError(f"an embedding such as this model's ({type(embedding).__name__}) cannot be rounded.")
    source = f"{names[id(embedding)]}.weight"
    if head is None:
        return {source: (source,)}
    if not isinstance(head, nn.Linear):
        raise InputError(f"an output head such as this model's ({type(head).__name__}) cannot be rounded.")
    target = f"{names[id(head)]}.weight"
    if network.all_tied_weights_keys.get(target) == source:
        return {source: (source, target)}
    return {source: (source,), target: (target,)}


def put(network: Any, name: str, rounded: Rounded) -> None:
    """Put a rounded weight in the place of the embedding or output head of this name; heads that are tied to the
    embedding stay so."""
    module = network.get_submodule(name)
    if not RoundedEmbedding.takes(module):
        network.set_submodule(name, RoundedLinear(rounded, module.bias))
        return
    embedding = RoundedEmbedding(rounded, module, module.weight.dtype)
    network.set_submodule(name, embedding)
    tied = network.all_tied_weights_keys
    for target in [target for target, source in tied.items() if source == f"{name}.weight"]:
        head = target.removesuffix(".weight")
        network.set_submodule(head, TiedHead(embedding, network.get_submodule(head).bias))
        del tied[target]
    # transformers has no parameter to tie to any more
    set_tied(network, tied)
