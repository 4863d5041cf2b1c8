"""A token's keys and values, written behind those that a cache of transformers holds, where there is room for more."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from .kernels import LONG, POINTER

ROOM = 256  # tokens more, at least


class Place(ctypes.Structure):
    _fields_ = [("k", POINTER), ("v", POINTER), ("strides", LONG * 4)]


def append(cache: Any, number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`cache.update(k, v, number)` for one token. The cache that transformers makes by default copies all of itself for
    every token; here it moves now and then to where there is room for more, and its tensors are views of that."""
    layer = layer_of(cache, number, (k.shape[0], k.shape[1], k.shape[3]), k.dtype)
    if layer is None:
        keys, values = cache.update(k, v, number)
        return keys, values
    tokens, room = layer.keys.shape[2], room_of(layer)
    for new, whole in ((k, room.k), (v, room.v)):
        whole[:, :, tokens : tokens + 1] = new
    layer.keys, layer.values = room.fill(tokens + 1)
    return layer.keys, layer.values


@functools.cache
def _plain_caches() -> tuple[Any, Any]:
    from transformers.cache_utils import DynamicCache, DynamicLayer

    return DynamicCache, DynamicLayer


def layer_of(cache: Any, number: int, shape: tuple[int, int, int], dtype: torch.dtype) -> Any:
    """This layer of a cache, if one token of this shape (batch, heads, width) can be written behind what it holds."""
    plain, of_layers = _plain_caches()
    if type(cache) is not plain or cache.offloading or number >= len(cache.layers):
        return None
    layer = cache.layers[number]
    if type(layer) is not of_layers or not layer.is_initialized:
        return None
    for old in (layer.keys, layer.values):
        if old.ndim != 4 or old.dtype != dtype or old.requires_grad:
            return None
        batch, heads, tokens, width = old.shape
        if (batch, heads, width) != shape or tokens != layer.keys.shape[2]:
            return None
    return layer


class Room:
    """Memory for more keys and values (batch, heads, tokens, width) than a layer of a cache holds now.

    used:     tokens of it that have been handed out: what lies there may be somebody's, a copy of the layer's maybe
    foreseen: the mark of a `_Foreseen` that has written behind them, and the keys and values that it read
    """

    foreseen: tuple[Any, Any, Any] = (None, None, None)

    def __init__(self, keys: Tensor, values: Tensor):
        self.used = keys.shape[2]
        tokens = self.used + max(self.used // 2, ROOM)
        self.k, self.v = (t.new_empty(*t.shape[:2], tokens, t.shape[3]) for t in (keys, values))
        self.k[:, :, : self.used] = keys
        self.v[:, :, : self.used] = values

    def holds(self, keys: Tensor, values: Tensor) -> bool:
        """Are these all that lies here, and is there room for one token more?"""
        return (
            all(
                part.data_ptr() == whole.data_ptr()  # or someone has put another tensor there
                and part.stride() == whole.stride()
                and part.shape[2] == self.used < whole.shape[2]
                for part, whole in ((keys, self.k), (values, self.v))
            )
            and (not self.k.is_inference() or torch.is_inference_mode_enabled())  # else it must not be written to
        )

    def fill(self, tokens: int) -> tuple[Tensor, Tensor]:
        """So many keys and values."""
        self.used, self.foreseen = tokens, Room.foreseen
        return self.k.narrow(2, 0, tokens), self.v.narrow(2, 0, tokens)

    def place(self) -> Place:
        return Place(self.k.data_ptr(), self.v.data_ptr(), strides(self.k, self.v))


def room_of(layer: Any) -> Room:
    """Where a layer's keys and values lie and have room for one token more; they are moved there if need be."""
    room: Room | None = layer.__dict__.get("room")
    if room is None or not room.holds(layer.keys, layer.values):
        room = layer.room = Room(layer.keys, layer.values)
        layer.keys, layer.values = room.fill(room.used)
    return room


def strides(k: Tensor, v: Tensor) -> Any:
    """Of heads and tokens."""
    return (LONG * 4)(k.stride(1), k.stride(2), v.stride(1), v.stride(2))
