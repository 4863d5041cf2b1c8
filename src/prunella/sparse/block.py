"""One new token through a whole block of a packed model, in two calls of C.

Between the products of a block transformers runs some thirty small operations of torch; for one token on a CPU they
take longer than the products of a small model do. `speed_up` gives blocks like LLaMA's (RMS norms, attention with
rotated queries and keys, a gated SiLU MLP; Mistral, Qwen2, Qwen3 and others are alike) a `forward` of their own that
the kernels of csrc/block.c compute. It is found by structure and by trial: a block is given it only if both ways
agree on random input. Whatever it does not cover (several tokens, masks, hooks, gradients, other dtypes and devices,
tracing and compiling) goes through the block's own forward.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from ..fast import differentiable, readable, use_fast_attention
from .arguments import weight_arguments
from .kernels import library, resident, succeed
from .linear import DenseLinear, PackedModule, SparseLinear

_POINTER, _LONG = ctypes.c_void_p, ctypes.c_int64


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, _LONG) for name in ("kind", "rows", "columns")),
        *((name, _POINTER) for name in ("mask", "offsets", "values")),
        ("count", _LONG),
        ("scales", _POINTER),
        ("group", _LONG),
        ("bias", _POINTER),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", _POINTER), ("eps", ctypes.c_double)]


_LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_OTHERS = ("self_attn", "mlp", "mlp.act_fn")


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, _Linear) for name in _LINEARS),
        *((name, _Norm) for name in _NORMS),
        *((name, _LONG) for name in ("heads", "kv_heads", "dim")),
    ]


class FusedBlock:
    """The forward of a block that runs one token in C and everything else as before."""

    def __init__(self, block: nn.Module):
        self.block = block
        self.weights: _Weights | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"block": self.block, "weights": None}  # addresses mean nothing elsewhere

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
            and readable(hidden_states)
            and hidden_states.ndim == 3
            and hidden_states.numel() == hidden_states.shape[2]
            and hidden_states.is_contiguous()
            and not differentiable(hidden_states)
            and not torch.is_autocast_enabled("cpu")
            and (weights := self._placed()) is not None
        ):
            out = weights.run(hidden_states, position_embeddings, past_key_values)
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

    def _placed(self) -> _Weights | None:
        """The weights where they lie now; None while the kernels must not run."""
        if self.weights is None or not self.weights.current():
            self.weights = _Weights.of(self.block)
            if self.weights is not None and not self.weights.current():  # something wants to see inside
                return None
        return self.weights


class _Weights:
    """Where a block's weights lie, as long as they lie there."""

    def __init__(self, modules: dict[str, nn.Module], c: _Block, scale: float, layer: int):
        self.children = [
            (parent._modules, key, child)
            for parent in modules.values()
            for key, child in parent._modules.items()
            if child is not None
        ]
        self.tensors = [
            (table, key, tensor, 0 if tensor is None else tensor.data_ptr())
            for module in modules.values()
            for table in (module._parameters, module._buffers)
            for key, tensor in table.items()
        ]
        self.c, self.scale, self.layer, self.width = c, scale, layer, getattr(c, _LINEARS[0]).columns

    @classmethod
    def of(cls, block: nn.Module) -> _Weights | None:
        """None where the block is not of the kind that the kernels compute."""
        found = dict(block.named_modules())
        wanted = {"", *_LINEARS, *_NORMS[:2], *_OTHERS}
        if not wanted <= set(found) <= wanted | set(_NORMS):
            return None
        attention: Any = found["self_attn"]
        layer, scale, dim = (getattr(attention, name, None) for name in ("layer_idx", "scaling", "head_dim"))
        if layer is None or scale is None or dim is None or dim % 2:
            return None
        c = _Block()
        for name in _LINEARS:
            linear = _linear(found[name])
            if linear is None:
                return None
            setattr(c, name, linear)
        for name in _NORMS:
            norm = _norm(found[name]) if name in found else _Norm()
            if norm is None:
                return None
            setattr(c, name, norm)
        q, k, v, o, gate, up, down = (getattr(c, name) for name in _LINEARS)
        c.heads, c.kv_heads, c.dim = q.rows // dim, k.rows // dim, dim
        width, inner = q.columns, gate.rows
        sizes = [found[name].weight.numel() if name in found else dim for name in _NORMS]
        if (
            (k.columns, v.columns, gate.columns, up.columns, o.rows, down.rows) != (width,) * 6
            or (up.rows, down.columns) != (inner, inner)
            or sizes != [width, width, dim, dim]
            or q.rows % dim
            or k.rows % dim
            or (v.rows, o.columns) != (k.rows, q.rows)
            or not c.kv_heads
            or c.heads % c.kv_heads
        ):
            return None
        return cls(found, c, float(scale), layer)

    def current(self) -> bool:
        """Is every tensor still in its place, and every module, and does nothing want to see what happens inside?"""
        for table, key, tensor, at in self.tensors:  # plain loops: this is asked for every block and token
            if table.get(key) is not tensor or (tensor is not None and tensor.data_ptr() != at):
                return False
        for siblings, key, child in self.children:
            if siblings.get(key) is not child or child._forward_hooks or child._forward_pre_hooks:
                return False
            if "forward" in child.__dict__:
                return False
        return not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)

    def run(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], cache: Any) -> Tensor | None:
        """One token x (1, 1, D) through the block; None where it cannot be done here."""
        kernels, c = library(), self.c
        cos, sin = position_embeddings
        if kernels is None or x.shape[2] != self.width:
            return None
        for turn in position_embeddings:
            if turn.dtype != x.dtype or turn.shape != (1, 1, c.dim) or not turn.is_contiguous():
                return None
        qkv = x.new_empty(c.heads + 2 * c.kv_heads, c.dim)
        k, v = qkv[c.heads : -c.kv_heads][None, :, None], qkv[-c.kv_heads :][None, :, None]
        block, threads, token, q = ctypes.byref(c), torch.get_num_threads(), x.data_ptr(), qkv.data_ptr()
        kernel = kernels.prunella_block_in
        succeed(kernel(block, token, cos.data_ptr(), sin.data_ptr(), q, k.data_ptr(), v.data_ptr(), threads))
        k, v = _append(cache, self.layer, k, v)
        k, v = (t if t.stride(3) == 1 and t.dtype == x.dtype else t.to(x.dtype).contiguous() for t in (k, v))
        y = torch.empty_like(x)
        places = (_LONG * 4)(k.stride(1), k.stride(2), v.stride(1), v.stride(2))
        tokens, kernel = k.shape[2], kernels.prunella_block_out
        succeed(kernel(block, token, q, k.data_ptr(), v.data_ptr(), tokens, places, self.scale, y.data_ptr(), threads))
        return y


def _append(cache: Any, number: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """`cache.update(k, v, number)` for one token. The cache that transformers makes by default copies all of itself for
    every token; here it moves now and then to where there is room for more, and its tensors are views of that."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    known = type(cache) is DynamicCache and not cache.offloading and number < len(cache.layers)
    layer: Any = cache.layers[number] if known else None
    if (
        type(layer) is not DynamicLayer
        or not layer.is_initialized
        or not all(map(_follows, (layer.keys, layer.values), (k, v)))
    ):
        keys, values = cache.update(k, v, number)
        return keys, values
    tokens = layer.keys.shape[2]
    old = layer.keys, layer.values
    room = layer.__dict__.get("room")
    if (
        room is None
        or any(
            # someone has put another tensor there
            part.data_ptr() != whole.data_ptr() or part.stride() != whole.stride() or whole.shape[2] <= tokens
            for part, whole in zip(old, room, strict=True)
        )
        or (room[0].is_inference() and not torch.is_inference_mode_enabled())  # must not be written to any more
    ):
        room = tuple(t.new_empty(*t.shape[:2], tokens + max(tokens // 2, 256), t.shape[3]) for t in old)
        for part, whole in zip(old, room, strict=True):
            whole[:, :, :tokens] = part
        layer.room = room
    for new, whole in zip((k, v), room, strict=True):
        whole[:, :, tokens : tokens + 1] = new
    layer.keys, layer.values = (whole[:, :, : tokens + 1] for whole in room)
    return layer.keys, layer.values


def _follows(old: Tensor, new: Tensor) -> bool:
    """Can one token's `new` be written behind `old`, of shape (batch, heads, tokens, width)?"""
    return (
        old.ndim == 4
        and (*old.shape[:2], old.shape[3], old.dtype) == (*new.shape[:2], new.shape[3], new.dtype)
        and not old.requires_grad
    )


def _linear(module: Any) -> _Linear | None:
    if module.bias is not None and not _plain(module.bias):
        return None
    out = _Linear(bias=None if module.bias is None else module.bias.data_ptr())
    if type(module) is DenseLinear:
        if not _plain(module.weight):
            return None
        out.rows, out.columns = module.weight.shape
        out.values = module.weight.data_ptr()
        return out
    if type(module) is not SparseLinear or module.weight_values.dtype in (torch.float32, torch.float16):
        return None
    parts = (module.weight_mask, module.weight_offsets, module.weight_values, module.weight_scales)
    if any(part is not None and part.device.type != "cpu" for part in parts):
        return None
    weight = weight_arguments(torch.bfloat16, *parts, module.in_features, module.group)
    for field, value in zip(_Linear._fields_, weight, strict=False):
        setattr(out, field[0], value)
    return out


def _norm(module: Any) -> _Norm | None:
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, Tensor) or not _plain(weight) or weight.ndim != 1 or not isinstance(eps, float):
        return None
    return _Norm(weight.data_ptr(), eps)


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16 and tensor.device.type == "cpu" and tensor.is_contiguous()


def settle(network: Any) -> None:
    """Make a packed model ready to run on the CPU: the weights that every token reads go into large pages of memory,
    and attention and single tokens run with our own kernels."""
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
    speed_up(network)


def speed_up(network: nn.Module) -> None:
    """Let the blocks of a packed network that are like LLaMA's run single tokens in C."""
    if library() is None:
        return
    for block in network.modules():
        if "forward" not in block.__dict__ and _Weights.of(block) is not None:
            fused = FusedBlock(block)
            if _alike(fused):
                block.forward = fused  # type: ignore[method-assign]


def slow_down(network: nn.Module) -> None:
    """Take back what `speed_up` did."""
    for block in network.modules():
        if isinstance(block.__dict__.get("forward"), FusedBlock):
            del block.forward  # type: ignore[method-assign]


@torch.inference_mode()
def _alike(fused: FusedBlock) -> bool:
    """Do both ways agree on a random token after a few others?"""
    from transformers import DynamicCache

    weights = _Weights.of(fused.block)
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
