"""What a network is run on."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError

Batch = Mapping[str, Tensor]  # what a network is called with: {argument: (B, …)}, a sample a row
Numbers = int | tuple[int, ...]  # of a sample, or of several of one shape
TARGET = "_target"  # among the tensors of samples: what `Task.target` made of the dense network's outputs for them
NUMBERS = 1024  # of a picture or a sound that take the room of a token


@dataclass(frozen=True)
class Samples:
    """Samples in groups; those of a group are of one shape, so that nothing is ever padded.

    groups: each {argument of the network: (n, …)}, a sample a row. What the network is not called with (the labels of
            a task, say) may stand among them: the task knows which is which.
    """

    groups: tuple[Batch, ...]

    @classmethod
    def of(cls, value: Samples | Tensor | Batch | Iterable[Batch], name: str = "input_ids") -> Samples:
        """Samples from a tensor (n, …), the argument `name`; from one group, or from several. Raises InputError where
        there are none, or where the tensors of a group are of different lengths."""
        if isinstance(value, Samples):
            return value
        if isinstance(value, Tensor):
            value = {name: value}
        groups = tuple(dict(group) for group in ([value] if isinstance(value, Mapping) else value))
        for group in groups:
            if len({len(tensor) for tensor in group.values()}) != 1:
                shapes = {key: tuple(tensor.shape) for key, tensor in group.items()}
                raise InputError(f"the tensors of a group of samples have a sample per row: {shapes} have not.")
        samples = cls(tuple(group for group in groups if size_of(group)))
        if not samples.groups:
            raise InputError("there are no samples to run the network on.")
        return samples

    @classmethod
    def gathered(cls, each: Iterable[Batch]) -> Samples:
        """Samples from single ones, {argument: (1, …)}, those of one shape in a group, in order; the largest group is
        the first one."""
        found: dict[tuple[tuple[str, torch.Size], ...], list[Batch]] = {}
        for one in each:
            found.setdefault(tuple((key, tensor.shape[1:]) for key, tensor in one.items()), []).append(one)
        groups = sorted(found.values(), key=len, reverse=True)
        return cls.of({key: torch.cat([one[key] for one in group]) for key in group[0]} for group in groups)

    @functools.cached_property
    def digest(self) -> str:
        """The same for the same samples, and for no others."""
        found = hashlib.sha256()
        for group in self.groups:
            for key, tensor in given(group).items():
                found.update(f"{'' if key == 'input_ids' else key}{tuple(tensor.shape)}".encode())
                found.update(_raw(tensor).numpy().tobytes())
        return found.hexdigest()[:16]

    def hashes(self, but: Collection[str] = ()) -> list[int]:
        """A number of 32 bits for each sample, the same for the same one; tensors of these names do not count."""
        found = []
        for group in self.groups:
            held = {key: _raw(t.reshape(len(t), -1)).numpy() for key, t in sorted(group.items()) if key not in but}
            for row in range(size_of(group)):
                digest = hashlib.sha256()
                for key, rows in held.items():
                    digest.update(f"{key}{tuple(group[key].shape[1:])}".encode() + rows[row].tobytes())
                found.append(int.from_bytes(digest.digest()[:4], "little"))
        return found

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in order, as bytes; those that a network made are left out."""
        return [_raw(tensor) for group in self.groups for tensor in given(group).values()]

    def __len__(self) -> int:
        return sum(map(size_of, self.groups))

    def first(self, count: int) -> Samples:
        """The first so many samples."""
        found = []
        for group in self.groups:
            if count > 0:
                found.append({key: tensor[:count] for key, tensor in group.items()})
                count -= size_of(group)
        return Samples(tuple(found))

    def after(self, count: int) -> Samples:
        """All but the first so many samples."""
        found = []
        for group in self.groups:
            if count < size_of(group):
                found.append({key: tensor[max(0, count) :] for key, tensor in group.items()})
            count -= size_of(group)
        return Samples(tuple(found))

    def batches(self, size: int) -> Iterator[Batch]:
        """At most `size` samples at a time, all of one shape, in order."""
        for group in self.groups:
            parts = {key: torch.split(tensor, size) for key, tensor in group.items()}
            for number in range(-(-size_of(group) // size)):
                yield {key: some[number] for key, some in parts.items()}

    @functools.cached_property
    def _starts(self) -> list[int]:
        """The number of each group's first sample."""
        return list(itertools.accumulate(map(size_of, self.groups), initial=0))

    def group_of(self, number: int) -> int:
        """The group that a sample is in."""
        return bisect_right(self._starts, number) - 1

    def pick(self, numbers: Sequence[int]) -> Iterator[Batch]:
        """Samples by their numbers, in this order; those side by side that are of one shape together."""
        for at, some in itertools.groupby(numbers, self.group_of):
            rows = torch.tensor([number - self._starts[at] for number in some])
            yield {key: tensor[rows] for key, tensor in self.groups[at].items()}

    def take(self, numbers: Iterable[int]) -> Samples:
        """The samples of these numbers, in order within their groups."""
        return Samples(tuple(self.pick(sorted(numbers))))

    def shuffled(self, seed: int, together: int = 1) -> list[int]:
        """All numbers in an order that is drawn at random, so many side by side of one shape as far as there are."""
        generator = torch.Generator().manual_seed(seed)
        full: list[list[int]] = []
        rest: list[int] = []
        for start, group in zip(self._starts, self.groups, strict=False):
            order = (torch.randperm(size_of(group), generator=generator) + start).tolist()
            whole = len(order) // together * together
            full += [order[i : i + together] for i in range(0, whole, together)]
            rest += order[whole:]
        drawn = torch.randperm(len(full), generator=generator).tolist()
        return [number for i in drawn for number in full[i]] + rest

    def __iter__(self) -> Iterator[Batch]:
        """Each sample alone."""
        return self.batches(1)


def _raw(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(torch.uint8)


def given(batch: Batch) -> dict[str, Tensor]:
    """A batch without the targets that a network made."""
    return {key: tensor for key, tensor in batch.items() if key != TARGET}


def in_dtype(batch: Batch, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch whose fractions are of this dtype."""
    return {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in batch.items()}


def on(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """A batch on a device."""
    return {key: tensor.to(device) for key, tensor in batch.items()}


def size_of(group: Batch) -> int:
    """How many samples a group or batch has."""
    return len(next(iter(group.values())))


def rows_of(tensor: Tensor, dimension: int, samples: int, start: int, count: int = 1) -> Tensor:
    """Of a tensor in which so many samples are stacked along a dimension, with one row each or several (the patches of
    all pictures, say), those of `count` samples from `start` on."""
    each = tensor.shape[dimension] // samples
    return tensor.narrow(dimension, start * each, count * each)


def tokens_of(group: Batch) -> int:
    """How long a sample is, in tokens: an image or a sound takes as much room as so many."""
    return max(math.prod(t.shape[1:]) // (1 if not t.is_floating_point() else NUMBERS) for t in group.values()) or 1
