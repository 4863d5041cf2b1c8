"""The two sides of a comparison: a network dense, and the same one packed."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..calibrate import context, positions
from ..errors import InputError
from ..layers import find_layers
from ..model.network import Model
from ..packing import load_packed, pack_model, unpack_model
from ..samples import Batch
from ..sparse.checkpoint import packed_config
from ..sparse.format import SPAN
from ..tasks import open_model
from ..tasks.sentences import arguments
from .shapes import random_directory

LENGTH = 128  # tokens of a text, where nobody says how many, and the network takes as many


@dataclass(frozen=True)
class Sides:
    """
    model:       the dense network as its task opens it, all weights in memory
    packed:      the same network as a packed directory is loaded
    directories: of "dense" and "packed", while the context lasts
    """

    model: Model
    packed: nn.Module
    directories: Mapping[str, Path]

    @property
    def sparsity(self) -> float:
        """Of the weights in layers, the share that is zero."""
        slots = [slot for name in self.model.blocks for slot in find_layers(self.model.module(name), name)]
        kept = sum(int(slot.read().count_nonzero()) for slot in slots)
        return 1 - kept / sum(slot.read().numel() for slot in slots)


@contextlib.contextmanager
def open_sides(
    model: str | None,
    random: str | None = None,
    sparsity: float = 0.0,
    *,
    bits: int | None = None,
    group: int = SPAN,
    head: bool = False,
    remote_code: bool = False,
) -> Iterator[Sides]:
    """Both sides of a pruned or packed directory, or of random weights of a shape (`shapes.SHAPES`), on the CPU.

    What is missing of the two is made as `prunella pack` and `unpack` do it, in a directory that goes afterwards.

    Args:
        sparsity: of random weights.
        bits, group, head: as for `pack_model`; a packed directory is measured as it is.
    Raises:
        PrunellaError: a directory that cannot be opened, or in which nothing is pruned.
    """
    with tempfile.TemporaryDirectory(prefix="prunella-bench-") as scratch, contextlib.ExitStack() as stack:
        name = str(random or model)
        plain, packed = Path(scratch) / "plain", Path(scratch) / "packed"
        if random is not None:
            plain.mkdir()
            random_directory(random, sparsity, plain)
        elif packed_config(Path(name)) is not None:
            packed = Path(name)
            unpack_model(name, plain)
        else:
            plain = Path(name)
        if packed_config(packed) is None:
            pack_model(str(plain), packed, bits, group, head=head, remote_code=remote_code)
        opened = open_model(str(plain), device="cpu", remote_code=remote_code)
        stack.enter_context(opened.whole())
        opened.name = name
        opened.give_back()  # it computes as its library has it
        opened.network.eval()
        network = load_packed(packed, device="cpu", remote_code=remote_code)
        yield Sides(opened, network, {"dense": plain, "packed": packed})


def random_batch(model: Model, batch: int, length: int | None = None) -> Batch:
    """So many samples of random numbers, {argument: (batch, …)}: the task's example of a sample, drawn anew. Texts go
    with the masks and segment ids that a tokenizer gives.

    Args:
        length: tokens of a text; None: `LENGTH`, or as many as the network takes. What else there is has its own size.
    Raises:
        InputError: a network that nobody knows an example for, or that takes no such length.
    """
    task = model.task
    try:
        example = task.example(model.network)
    except NotImplementedError:
        raise InputError(f"what '{model.name}' is run on is not known to its task '{task.name}'.") from None
    texts = "input_ids" in example and set(example) <= {"input_ids", "labels"}
    if length is not None and not texts:
        raise InputError(f"'{model.name}' is of task '{task.name}', whose samples have a size of their own: no length.")
    generator = torch.Generator().manual_seed(batch)
    found: dict[str, torch.Tensor] = {}
    for key, tensor in example.items():
        shape = (batch, *tensor.shape[1:])
        if tensor.is_floating_point():
            found[key] = torch.randn(shape, generator=generator)
        elif key == "input_ids" and texts:
            vocabulary = model.network.config.get_text_config().vocab_size
            size = _tokens(model, length)
            found[key] = torch.randint(min(3, vocabulary - 1), vocabulary, (batch, size), generator=generator)
        else:
            found[key] = tensor[:1].expand(shape).contiguous()
    if texts:
        ids_BL = found["input_ids"]
        beside = {"attention_mask": torch.ones_like(ids_BL), "token_type_ids": torch.zeros_like(ids_BL)}
        found |= {key: tensor for key, tensor in beside.items() if key in arguments(model.network)}
    return found


def _tokens(model: Model, length: int | None) -> int:
    most = min(context(model), positions(model) or context(model))
    if length is not None and length > most:
        raise InputError(f"texts of {length} tokens are longer than the {most} positions of '{model.name}'.")
    return length or min(LENGTH, most)
