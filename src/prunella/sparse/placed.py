"""Where a block's weights lie, as long as they lie there, and one token that goes through them in C."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.utils.hooks import RemovableHandle

from .arguments import weight_arguments
from .cache import append, strides
from .kernels import LONG, POINTER, library, succeed
from .linear import DenseLinear, SparseLinear


class _Linear(ctypes.Structure):
    _fields_ = [
        *((name, LONG) for name in ("kind", "rows", "columns")),
        *((name, POINTER) for name in ("mask", "offsets", "values")),
        ("count", LONG),
        ("scales", POINTER),
        ("group", LONG),
        ("bias", POINTER),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("weight", POINTER), ("eps", ctypes.c_double)]


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
        *((name, LONG) for name in ("heads", "kv_heads", "dim")),
        ("scale", ctypes.c_double),
    ]


class Weights:
    """Where a block's weights lie, as long as they lie there."""

    def __init__(self, modules: dict[str, nn.Module], c: _Block, layer: int):
        self.modules = list(modules.values())
        # What is asked for every block and token goes through these lists, without a loop in Python, and touches as
        # little memory as will do: by then the weights have driven everything else out of the caches.
        names = ("_parameters", "_buffers", "_modules")
        self.tables = [table for module in self.modules for name in names if (table := vars(module)[name])]
        self.inside = [thing for table in self.tables for thing in table.values()]
        self.tensors = [thing for thing in self.inside if isinstance(thing, Tensor)]
        self.names = list(map(id, self.inside))
        self.places = list(map(Tensor.data_ptr, self.tensors))
        self.sizes = list(map(len, map(vars, self.modules)))
        self.hooks = -1  # the number of the next hook when none was found; every hook takes one
        self.c, self.layer, self.width = c, layer, getattr(c, _LINEARS[0]).columns

    @classmethod
    def of(cls, block: nn.Module) -> Weights | None:
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
        c.heads, c.kv_heads, c.dim, c.scale = q.rows // dim, k.rows // dim, dim, float(scale)
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
        return cls(found, c, layer)

    def current(self) -> bool:
        """Is every tensor still in its place, and every module, and does nothing want to see what happens inside?"""
        if self.hooks != RemovableHandle.next_id:
            if self.watched():
                return False
            self.hooks = RemovableHandle.next_id
        inside = itertools.chain.from_iterable(map(dict.values, self.tables))
        return (
            list(map(id, inside)) == self.names
            and list(map(Tensor.data_ptr, self.tensors)) == self.places
            and list(map(len, map(vars, self.modules))) == self.sizes  # a `forward` of a module's own would be one more
        )

    def watched(self) -> bool:
        """Does something want to see what happens inside?"""
        return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks) or any(
            module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
            for module in self.modules[1:]
        )

    def fit(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> bool:
        """Can a token x (1, 1, D) and its rotation go through here?"""
        return x.shape[2] == self.width and all(
            t.dtype == x.dtype and t.shape == (1, 1, self.c.dim) and t.is_contiguous() for t in turn
        )

    def run(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        """One token x (1, 1, D) through the block."""
        kernels, c = library(), self.c
        assert kernels is not None
        cos, sin = turn
        qkv = x.new_empty(c.heads + 2 * c.kv_heads, c.dim)
        k, v = qkv[c.heads : -c.kv_heads][None, :, None], qkv[-c.kv_heads :][None, :, None]
        block, threads, token, q = ctypes.byref(c), torch.get_num_threads(), x.data_ptr(), qkv.data_ptr()
        kernel = kernels.prunella_block_in
        succeed(kernel(block, token, cos.data_ptr(), sin.data_ptr(), q, k.data_ptr(), v.data_ptr(), threads))
        k, v = append(cache, self.layer, k, v)
        k, v = (t if t.stride(3) == 1 and t.dtype == x.dtype else t.to(x.dtype).contiguous() for t in (k, v))
        y = torch.empty_like(x)
        tokens, places, kernel = k.shape[2], strides(k, v), kernels.prunella_block_out
        succeed(kernel(block, token, q, k.data_ptr(), v.data_ptr(), tokens, places, y.data_ptr(), threads))
        return y


def _linear(module: Any) -> _Linear | None:
    if type(module) not in (DenseLinear, SparseLinear) or (module.bias is not None and not _plain(module.bias)):
        return None
    out = _Linear(bias=None if module.bias is None else module.bias.data_ptr())
    if type(module) is DenseLinear:
        if not _plain(module.weight):
            return None
        out.rows, out.columns = module.weight.shape
        out.values = module.weight.data_ptr()
        return out
    if module.weight_values.dtype in (torch.float32, torch.float16):
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
