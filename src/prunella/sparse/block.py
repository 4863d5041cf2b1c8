"""One new token through the blocks of a packed model in C.

Between the products of a block transformers runs some thirty small operations of torch; for one token on a CPU they
take longer than the products of a small model do. `speed_up` gives blocks like LLaMA's (RMS norms, attention with
rotated queries and keys, a gated SiLU MLP; Mistral, Qwen2, Qwen3 and others are alike) a `forward` of their own that
the kernels of csrc/block.c compute. It is found by structure and by trial: a block is given it only if both ways
agree on random input. Whatever it does not cover (several tokens, masks, hooks, gradients, other dtypes and devices,
tracing and compiling) goes through the block's own forward.

Blocks that follow each other are a `Stack`: the first one's forward takes the token through all of them in one call,
and the others hand out what is known already, if they are asked exactly what was foreseen.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..compat import of_transformers
from ..fast import differentiable, readable, use_fast_attention
from .cache import Place, Room, layer_of, room_of
from .kernels import POINTER, library, resident, succeed
from .linear import DenseLinear, PackedModule
from .placed import Weights


class FusedBlock:
    """The forward of a block that runs one token in C and everything else as before."""

    def __init__(self, block: nn.Module):
        self.block = block
        self.weights: Weights | None = None
        self.stack: Stack | None = None
        self.number = 0  # in the stack

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "weights": None}  # addresses mean nothing elsewhere

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.stack is not None:
            self.stack.blocks[self.number] = weakref.ref(self)

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if (
            attention_mask is None
            and past_key_values is not None
            and position_embeddings is not None
            and all(value is None or value is False for value in kwargs.values())
            and not torch.compiler.is_compiling()
        ):
            out = self.token(hidden_states, position_embeddings, past_key_values)
            if out is not None:
                return out
        return type(self.block).forward(
            self.block,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )

    def token(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: Any) -> Tensor | None:
        """What the block makes of one token x (1, 1, D), rotated by `turn`; None where it is not for C to say."""
        if x.device.type != "cpu":
            self.weights = None  # they have moved with it, and what lay here can go
        if not (
            readable(x)
            and x.ndim == 3
            and x.numel() == x.shape[2]
            and x.is_contiguous()
            and not differentiable(x)
            and not torch.is_autocast_enabled("cpu")
        ):
            return None
        if self.stack is not None:
            if self.number == 0:
                self.stack.foresee(x, turn, cache)
            if (out := self.stack.foreseen(self.number, x, turn, cache)) is not None:
                return out
        weights = self.placed()
        return weights.run(x, turn, cache) if weights is not None and weights.fit(x, turn) else None

    def placed(self) -> Weights | None:
        """The weights where they lie now; None while the kernels must not run, or are missing."""
        if library() is None:
            return None
        if self.weights is None or not self.weights.current():
            self.weights = Weights.of(self.block)
            if self.weights is not None and not self.weights.current():  # something wants to see inside
                return None
        return self.weights


class Stack:
    """Fused blocks that follow each other, of one width: one call takes a token through all of them.

    What the later ones will be asked is foreseen from what the first one is. Each hands its answer out, and puts its
    key and value into the cache, only if that is what it is asked: the same tensor with the same bytes, the same
    rotation, and a cache that holds what it held. Otherwise it computes its own. (What is not noticed is a hook between
    two blocks that changes, in place, the weights of a later one, or what the cache holds for it, for this very token.)

    blocks: weak references, so that a block can be copied, and let go, without the others
    """

    PATIENCE = 8  # tokens in a row of which not all answers were taken, until nothing is foreseen for that cache

    def __init__(self, blocks: Sequence[FusedBlock]):
        self.blocks: dict[int, weakref.ref[FusedBlock]] = {}
        self._forget()
        for number, fused in enumerate(blocks):
            fused.stack, fused.number = self, number
            self.blocks[number] = weakref.ref(fused)

    def _forget(self) -> None:
        self.known: _Foreseen | None = None
        self.wasted = 0
        self.cache: Callable[[], Any] = _nothing
        self.weights, self.rooms = _Array(), _Array()

    def __getstate__(self) -> dict[str, Any]:
        return {"blocks": {}}  # each that is copied enters itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def foreseen(self, number: int, x: Tensor, turn: tuple[Tensor, Tensor], cache: Any) -> Tensor | None:
        """The answer of this block, if it is the question that was foreseen."""
        known = self.known
        out = None if known is None else known.take(number, x, turn, cache)
        if known is not None and out is not None and number == known.last:
            self.known, self.wasted = None, 0
        return out

    def foresee(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: Any) -> None:
        """Take the token through all blocks, where their weights and the cache allow it."""
        if self.cache() is not cache:
            self.cache, self.wasted = weakref.ref(cache), 0
        elif self.known is not None:
            self.wasted += 1
        self.known = None
        kernels = library()
        if self.wasted > self.PATIENCE or kernels is None:
            return
        weights: list[Weights] = []
        for number in range(len(self.blocks)):
            fused = self.blocks[number]() if number in self.blocks else None
            if fused is None:
                break  # those after it may no longer follow
            placed = fused.placed()
            if placed is None or not (weights or placed.fit(x, turn)):
                return
            weights.append(placed)
        layers = [layer_of(cache, w.layer, (1, w.c.kv_heads, w.c.dim), x.dtype) for w in weights]
        if None in layers or len(set(map(id, layers))) < len(layers) or len({la.keys.shape[2] for la in layers}) > 1:
            return
        tokens, rooms = layers[0].keys.shape[2], [room_of(layer) for layer in layers]
        blocks = self.weights.of(weights, lambda w: ctypes.addressof(w.c), POINTER)
        places = self.rooms.of(rooms, Room.place, Place)
        out, (cos, sin) = x.new_empty(len(weights), *x.shape), turn
        token = (x.data_ptr(), cos.data_ptr(), sin.data_ptr())
        threads = torch.get_num_threads()
        succeed(kernels.prunella_blocks(blocks, len(weights), *token, places, tokens, out.data_ptr(), threads))
        self.known = known = _Foreseen(x, turn, cache, [w.layer for w in weights], out)
        for layer, room in zip(layers, rooms, strict=True):
            room.foreseen = known.mark, layer.keys, layer.values


def _nothing() -> None:
    """A weak reference to nothing."""


class _Array:
    """An array for C that is made anew only when the things that it tells of are others. It does not keep them: what
    it holds is good while the caller does."""

    def __init__(self) -> None:
        self.made: tuple[list[weakref.ref[Any]], Any] = ([], None)

    def of(self, things: list[Any], tell: Callable[[Any], Any], kind: Any) -> Any:
        known, array = self.made
        if len(things) != len(known) or any(ref() is not thing for ref, thing in zip(known, things, strict=True)):
            array = (kind * len(things))(*map(tell, things))
            self.made = list(map(weakref.ref, things)), array
        return array


class _Foreseen:
    """What the blocks of a stack make of one token. It keeps nothing of the cache, which knows it by `mark`."""

    def __init__(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: Any, layers: list[int], out: Tensor):
        self.turn, self.cache, self.layers, self.mark = turn, weakref.ref(cache), layers, object()
        self.questions = [x, *(out[i] for i in range(len(out)))]
        self.bytes, self.size, self.last = _bytes(x) + _bytes(out), x.nbytes, len(out) - 1
        self.hooks = RemovableHandle.next_id

    def take(self, number: int, x: Tensor, turn: tuple[Tensor, Tensor], cache: Any) -> Tensor | None:
        """The answer of block `number`, whose key and value go into the cache; None to another question."""
        start, held = number * self.size, self.cache()
        if (
            number > self.last
            or x is not self.questions[number]
            or x.nbytes != self.size
            or _bytes(x) != self.bytes[start : start + self.size]
            or any(map(operator.is_not, turn, self.turn))
            or held is None
            or held is not cache
            or self.hooks != RemovableHandle.next_id  # one may be inside of this block
        ):
            return None
        layer = held.layers[self.layers[number]]
        room: Room | None = getattr(layer, "room", None)
        if room is None or any(map(operator.is_not, (self.mark, layer.keys, layer.values), room.foreseen)):
            return None
        layer.keys, layer.values = room.fill(layer.keys.shape[2] + 1)
        return self.questions[number + 1]


def _bytes(tensor: Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.nbytes)


def settle(network: Any) -> None:
    """Make a packed model ready to run on the CPU: the weights that every token reads go into large pages of memory,
    and attention and single tokens run with our own kernels."""
    if of_transformers(network):
        use_fast_attention(network)
    parts: list[tuple[Any, str, Tensor]] = [
        (module, name, part)
        for module in network.modules()
        if isinstance(module, PackedModule)
        for name, part in module.named_buffers(recurse=False)
    ]
    parts += [(m.weight, "data", m.weight.data) for m in network.modules() if isinstance(m, DenseLinear)]
    parts = [(owner, name, part) for owner, name, part in parts if part.device.type == "cpu" and part.numel()]
    copies = resident([part for _, _, part in parts])
    for (owner, name, _), copy in zip(parts, copies, strict=True):
        setattr(owner, name, copy)
    for module in network.modules():
        if isinstance(module, PackedModule):
            module.settle()
    speed_up(network)


def speed_up(network: nn.Module) -> None:
    """Let the blocks of a packed network that are like LLaMA's run single tokens in C."""
    if library() is None:
        return
    for block in network.modules():
        if "forward" not in block.__dict__ and Weights.of(block) is not None:
            fused = FusedBlock(block)
            if _alike(fused):
                block.forward = fused  # type: ignore[method-assign]
    for blocks in network.modules():
        if isinstance(blocks, nn.ModuleList):
            for kind, group in itertools.groupby(blocks, _size):
                if kind is not None:
                    Stack([block.__dict__["forward"] for block in group])


def _size(block: nn.Module) -> tuple[int, int] | None:
    """(width, dim) of a block that has its forward from here."""
    fused = block.__dict__.get("forward")
    weights = fused.placed() if isinstance(fused, FusedBlock) else None
    return None if weights is None else (weights.width, weights.c.dim)


def slow_down(network: nn.Module) -> None:
    """Take back what `speed_up` did."""
    for block in network.modules():
        if isinstance(block.__dict__.get("forward"), FusedBlock):
            del block.forward  # type: ignore[method-assign]


@torch.inference_mode()
def _alike(fused: FusedBlock) -> bool:
    """Do both ways agree on a random token after a few others?"""
    from transformers import DynamicCache

    weights = Weights.of(fused.block)
    assert weights is not None
    c = weights.c
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(torch.bfloat16)

    tokens, width = 5, weights.width
    past = random(2, 1, c.kv_heads, tokens, c.dim)
    angle = random(1, 1, c.dim // 2).float().repeat(1, 1, 2)
    # small beside what the block adds to it
    x, turn = random(1, 1, width) / 64, (angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16))
    outs = []
    for way in (fused, functools.partial(type(fused.block).forward, fused.block)):
        cache = DynamicCache()
        for layer in range(weights.layer + 1):
            cache.update(past[0], past[1], layer)
        try:
            outs.append(way(x, attention_mask=None, past_key_values=cache, position_embeddings=turn))
        except Exception:  # a block that wants more than this is not of the kind
            return False
    mlp: Any = fused.block.mlp
    hidden = random(1, 1, width)
    inner = nn.functional.silu(mlp.gate_proj(hidden)) * mlp.up_proj(hidden)  # it may be small beside the attention
    return _close(outs[0] - x, outs[1] - x) and _close(mlp.down_proj(inner), mlp(hidden))


def _close(a: Any, b: Any) -> bool:
    return isinstance(b, Tensor) and a.shape == b.shape and bool((a - b).float().norm() <= 0.02 * b.float().norm())
