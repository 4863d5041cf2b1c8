"""Weights as steps take them: packed ones prepared for many positions, dense ones in float32, numbers of channels;
batch norms folded into them. Made once for all plans of a network."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..sparse import coded
from ..sparse.coded import PLAIN, Ends
from ..sparse.conv import SparseConv
from ..sparse.format import Packed
from ..sparse.linear import SparseLinear
from ..sparse.striped import Striped, StripedWeight, striped, striped_dense, weight_of

APART = 56  # rows of a weight up to which its inputs are read where they lie: copying them would not pay
TINY = torch.finfo(torch.float32).tiny


class Pruned:
    """A pruned weight as the steps take it: by strips, or by code of its own.

    packed, places, groups: as it is stored, if it is; of a convolution the places of its kernel, and its groups
    strips:                 as it is without being stored
    scale, ends:            what is done with its products, by its code if it has some
    positions:              the most that a plan multiplies it with
    struct:                 what C takes; where that is changes no more
    """

    def __init__(
        self,
        packed: Packed | None,
        strips: Striped | None = None,
        places: int = 1,
        groups: int = 1,
        module: SparseLinear | None = None,
        scale: Tensor | None = None,
        ends: Ends = PLAIN,
    ):
        self.packed, self.strips, self.places, self.groups, self.module = packed, strips, places, groups, module
        self.scale, self.ends = scale, ends
        self.positions = 0
        self.struct = StripedWeight()
        self.held: Any = None

    @property
    def ready(self) -> bool:
        return self.held is not None

    @property
    def kept(self) -> int:
        return 0 if self.packed is None else int(self.packed.offsets[-1])

    @property
    def more(self) -> int:
        """Bytes that code takes in place of strips."""
        assert self.packed is not None
        return coded.size_of(self.kept, self.packed.rows, self.packed.columns) - self.less

    @property
    def less(self) -> int:
        """Bytes that strips take beside what is stored: a place, and the values where they cannot be shared."""
        if self.packed is None:
            return 0
        shared = self.places == 1 and self.packed.values.dtype == torch.float32
        return self.kept * (1 if shared else 5)

    def code(self) -> coded.Code | None:
        assert self.packed is not None
        return coded.generate(self.packed, self.places, self.groups, self.scale, self.ends)

    def take(self, code: coded.Coded) -> None:
        self._set(code.weight(), code)

    def take_strips(self) -> int:
        """Returns how many values were flushed."""
        weight = self.strips
        if weight is None:
            assert self.packed is not None
            weight = striped(self.packed, self.places) if self.module is None else self.module.striped()
        count = 0
        if bool(_small(weight.values).any()):  # the stored ones stay as they are
            weight = replace(weight, values=weight.values.clone())
            count = flush(weight.values)
        self._set(weight_of(weight), weight)
        return count

    def _set(self, struct: StripedWeight, held: Any) -> None:
        ctypes.memmove(ctypes.addressof(self.struct), ctypes.addressof(struct), ctypes.sizeof(struct))
        self.held = held


def _small(numbers: Tensor) -> Tensor:
    return (numbers.abs() < TINY) & (numbers != 0)


def flush(numbers: Tensor) -> int:
    """Make zeros of numbers too small for normal ones of float32, which processors compute with slowly. Returns
    how many they were."""
    small = _small(numbers)
    count = int(small.sum())
    if count:
        numbers.masked_fill_(small, 0.0)
    return count


def share() -> float:
    """What the layers of a packed network may take in memory, of what they take dense, before some are refused the code
    that runs them fastest: PRUNELLA_MEMORY, one half if that is not set. Raises InputError."""
    text = os.environ.get("PRUNELLA_MEMORY", "0.5")
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found < math.inf:
        raise InputError(f"PRUNELLA_MEMORY={text}: it is a share of the dense network's memory, 0.5 or 1 for example.")
    return found


class Weights:
    """Of one network.

    flushed: how many weights and biases became zero because they were too small for normal numbers of float32, which
        processors compute with slowly
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        layers = [module for module in network.modules() if isinstance(module, SparseLinear)]
        self.modules = {_place(module.weight_mask, module.weight_values): module for module in layers}
        self.convs: dict[Any, SparseConv] = {}
        self.made: dict[Any, Any] = {}
        self.flushed = 0
        self.spent = sum(part.nbytes for module in layers for part in module._buffers.values() if part is not None)
        dense = sum(module.out_features * module.in_features * _width(module) for module in layers)
        self.limit = int(share() * dense)

    def vector(self, numbers: Tensor | None) -> Tensor | None:
        """One number for each channel."""
        return None if numbers is None else self._once("vector", numbers, None, self._flush)

    def dense(self, weight: Tensor, scale: Tensor | None) -> Tensor:
        """A weight (O, …), times a scale of each output."""

        def make(weight: Tensor) -> Tensor:
            if scale is None:
                return weight.float().contiguous()
            return self._flush(weight.double() * scale.view(-1, *[1] * (weight.ndim - 1)))

        made: Tensor = self._once("dense", weight, scale, make)
        return made

    def packed(self, parts: list[Any], positions: int, scale: Tensor | None = None, ends: Ends = PLAIN) -> Pruned:
        """A packed weight, by the parts that `sparse_linear` takes, for so many positions. scale, ends: what its code
        does too, if it gets some."""
        mask, offsets, values, scales, columns, group = parts
        module = self.modules.get(_place(mask, values))
        packed = Packed(mask, offsets, values, scales, columns, group)
        ends = replace(ends, apart=packed.rows <= APART)
        return self._pruned(
            values,
            positions,
            lambda: Pruned(packed, module=module, scale=scale, ends=ends),
            scale,
            (ends, _place(mask, values)),  # another layer may have the same values at other places
        )

    def conv(self, weight: Striped, kernel: Sequence[int], groups: int, positions: int, scale: Tensor | None) -> Pruned:
        """That of a packed convolution, by what its operator takes."""
        module = self.convs.get(_place(weight.starts, weight.values))
        if module is None:
            kind = _place(weight.starts, weight.values)
            return self._pruned(weight.values, positions, lambda: Pruned(None, weight), kind=kind)
        places = math.prod(kernel)
        return self._pruned(
            module.weight_values,
            positions,
            lambda: Pruned(module._packed, None, places, groups, module, scale),
            scale,
            _place(module.weight_mask, module.weight_values),
        )

    def striped(self, weight: Tensor, places: int, positions: int) -> Pruned:
        """A dense weight (O, I) as a packed one."""
        return self._pruned(weight, positions, lambda: Pruned(None, striped_dense(weight, places)))

    def _pruned(
        self,
        key: Tensor,
        positions: int,
        make: Callable[[], Pruned],
        scale: Tensor | None = None,
        kind: Any = "striped",
    ) -> Pruned:
        found: Pruned = self._once(kind, key, scale, lambda _: make())
        found.positions = max(found.positions, positions)
        return found

    @property
    def pruned(self) -> list[Pruned]:
        return [made for _, made in self.made.values() if isinstance(made, Pruned)]

    def begin(self) -> None:
        """Before a graph is captured: packed convolutions are known in it by their strips."""
        convs = [module for module in self.network.modules() if isinstance(module, SparseConv)]
        made = [(module.striped(), module) for module in convs if not module.one_place]
        self.convs = {_place(weight.starts, weight.values): module for weight, module in made}

    def finish(self) -> None:
        """After a plan was made: its weights get code as far as the memory allows, those with the most positions first,
        and strips otherwise."""
        new = [weight for weight in self.pruned if not weight.ready]
        self.spent += sum(weight.less for weight in new)
        chosen: list[Pruned] = []
        if new and coded.available():
            for weight in sorted(new, key=lambda weight: -weight.positions):
                if weight.packed is not None and self.spent + weight.more <= self.limit:
                    self.spent += weight.more
                    chosen.append(weight)
        codes = [weight.code() for weight in chosen]
        made = [(weight, code) for weight, code in zip(chosen, codes, strict=True) if code is not None]
        self.flushed += sum(flush(unsealed.values) for _, unsealed in made)
        for (weight, _), code in zip(made, coded.seal([code for _, code in made]) or [], strict=False):
            weight.take(code)
        for weight in new:
            if not weight.ready:
                self.flushed += weight.take_strips()
        for module in self.convs.values():  # made again when a graph is captured, or it runs by itself
            module.forget_strips()

    def _flush(self, numbers: Tensor) -> Tensor:
        made = numbers.to(torch.float32).contiguous().clone()
        self.flushed += flush(made)
        return made

    def _once(self, kind: Any, weight: Tensor, scale: Tensor | None, make: Any) -> Any:
        """Not made again for the next shape of inputs. Small ones are known by their content, since they are computed
        for each graph anew."""
        key = (kind, _name(weight), None if scale is None else _name(scale))
        if key not in self.made:
            self.made[key] = weight, make(weight)  # kept, so that its address stays its own
        return self.made[key][1]


def _place(where: Tensor, values: Tensor) -> tuple[int, int]:
    """By which a weight is known: where its parts lie. Values alone may be none, which lie nowhere."""
    return where.data_ptr(), values.data_ptr()


def _name(tensor: Tensor) -> Any:
    if tensor.numel() <= 1 << 14:
        return tuple(tensor.shape), tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return tuple(tensor.shape), tensor.stride(), tensor.data_ptr(), tensor.dtype


def _width(module: SparseLinear) -> int:
    """Bytes of one of its weights where it is dense."""
    return module.weight_values.element_size() if module.weight_values.is_floating_point() else 2
