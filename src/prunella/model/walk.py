"""A block with its weights, and what reads them while another one is computed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from ..machine import free_memory, pins
from .checkpoint import Source

Weights = Source | Mapping[str, Tensor]  # of weights: files, or {parameter: tensor}


class LoadedBlock:
    """One block of a model with its weights, for as long as a walk stands at it.

    index:  its number in the model, from 0
    name:   its name in the network
    module: the block itself
    """

    def __init__(self, index: int, name: str, module: nn.Module, load: Callable[[Source], None]):
        self.index = index
        self.name = name
        self.module = module
        self._load = load

    def _places(self) -> Iterator[tuple[dict[str, Any], str, str]]:
        """Where its parameters and buffers are: the dictionary of a module, the key there, the whole name."""
        for path, module in self.module.named_modules(prefix=self.name, remove_duplicate=False):
            for held in (module._parameters, module._buffers):
                for key, tensor in held.items():
                    if tensor is not None:
                        yield held, key, f"{path}.{key}" if path else key

    def tensors(self) -> dict[str, Tensor]:
        """Its parameters and buffers, {name in the network: tensor}."""
        return {name: held[key].data for held, key, name in self._places()}

    @contextlib.contextmanager
    def use(self, source: Weights, only: Collection[str] | None = None) -> Iterator[LoadedBlock]:
        """The weights of another source in the place of its own, `only` those of these names if any are given; its own
        are back when the context ends."""
        before = [(held, key, name, held[key]) for held, key, name in self._places()]
        try:
            if isinstance(source, Mapping):
                lent = {
                    id(tensor): _like(tensor, source[name])
                    for _, _, name, tensor in before
                    if name in source and (only is None or name in only)
                }
                for held, key, _, tensor in before:  # under all names of one that is tied
                    held[key] = lent.get(id(tensor), tensor)
            else:
                self._load(source)
                for held, key, name, tensor in before:
                    if only is not None and name not in only:
                        held[key] = tensor
            yield self
        finally:
            for held, key, _, tensor in before:
                held[key] = tensor

    def read(self, source: Weights) -> dict[str, Tensor]:
        """What another source has for it, {name in the network: tensor}."""
        with self.use(source):
            return self.tensors()

    def keep(self, changed: Mapping[str, Tensor]) -> None:
        """Write these into the network's own tensors, which stay as they are then."""
        own = self.tensors()
        for name, tensor in changed.items():
            own[name].copy_(tensor)


def _like(old: Tensor, new: Tensor) -> Tensor:
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


class ReadAhead:
    """A checkpoint whose tensors a thread reads before they are asked for; in all else it is that checkpoint."""

    def __init__(self, checkpoint: Source, device: torch.device):
        self._checkpoint, self._device = checkpoint, device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prunella-read")
        self._coming: dict[frozenset[str], Future[dict[str, Tensor]]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def expect(self, names: Iterable[str]) -> None:
        """These will be asked for next; where memory is short they are not read before."""
        wanted = [name for name in names if name in self._checkpoint.where]
        found = (self._checkpoint.files[self._checkpoint.where[name]][name] for name in wanted)
        if sum(end - start for _, _, start, end in found) < free_memory(torch.device("cpu")) // 4:
            self._coming[frozenset(wanted)] = self._thread.submit(self._read, wanted)

    def _read(self, names: list[str]) -> dict[str, Tensor]:
        with self._checkpoint.open(names) as slices:
            tensors = {name: slices[name][...] for name in names}
        return {n: t.pin_memory() for n, t in tensors.items()} if pins(self._device) else tensors

    @contextlib.contextmanager
    def open(self, names: Iterable[str]) -> Iterator[Mapping[str, Any]]:
        names = list(names)
        coming = self._coming.pop(frozenset(names), None)
        if coming is not None:
            yield coming.result()
            return
        with self._checkpoint.open(names) as slices:
            yield slices

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
