"""Networks to measure without their weights: the true architecture, random weights, pruned by magnitude."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..compat import quiet
from ..layers import find_layers
from ..model.timm_models import timm
from ..pattern import keep
from ..tasks import make_task

_BATCH = 8  # pictures that the statistics of batch norms are made of


def _bert(hidden: int, intermediate: int, layers: int) -> Callable[[], nn.Module]:
    """An encoder like BERT's (Devlin et al., arXiv 1810.04805), with the vocabulary and positions of bert-base-uncased
    and 12 heads."""

    def build() -> nn.Module:
        from transformers import BertConfig, BertModel

        sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers}
        network: nn.Module = BertModel(BertConfig(**sizes, num_attention_heads=12))
        return network

    return build


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        with quiet("timm"):
            network: nn.Module = timm().create_model(name, pretrained=False)
        return network

    return build


SHAPES: dict[str, tuple[str, Callable[[], nn.Module]]] = {  # its task, and what builds it
    "minilm-l6": ("masked", _bert(384, 1536, 6)),
    "bert-base": ("masked", _bert(768, 3072, 12)),
    "efficientnet-lite0": ("images", _timm("tf_efficientnet_lite0")),
    "resnet-50": ("images", _timm("resnet50")),
}


def random_directory(shape: str, sparsity: float, folder: Path) -> None:
    """Write a network of a shape in SHAPES as the directory of a plain model, in float32.

    Each layer loses the share `sparsity` of its weights, the smallest. Batch norms are given random factors, and after
    pruning the statistics of random pictures, so that activations are neither zero nor endless.
    """
    name, build = SHAPES[shape]
    task = make_task(name)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        network = build()
        norms: list[Any] = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
        model = task.wrap(network.eval().requires_grad_(False), name=shape)
        for _, block in model.walk():
            for slot in find_layers(block.module, block.name):
                weight_OI = slot.read()
                slot.write(weight_OI.masked_fill(~keep(weight_OI.abs(), sparsity), 0.0))  # no negative zeros
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches, of which there is one
            norm.train()
        if norms:
            task.run(network, {key: torch.randn(_BATCH, *t.shape[1:]) for key, t in task.example(network).items()})
        network.eval()
        task.save(model, folder)
