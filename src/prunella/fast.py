"""The stream's own products, where the processor can do better than torch: x^T x, and causal attention with its
gradient.

They are for bfloat16 on CPUs with AVX-512 BF16, with sums in float32 (sparse/csrc/stream_avx512.c): torch has
no product of bfloat16 into float32, and its attention there runs at a third of the machine's speed. Anywhere
else torch computes them.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import re
import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compat import attention_of, under_transform
from .machine import at_a_time, exact_products
from .native import call, library

PANEL = 256  # columns of a product with float32 sums that torch makes at a time on a CPU
TOKENS = 2048  # tokens at a time, there: what a product reads stays in the cache


@functools.cache
def _kernels() -> ctypes.CDLL | None:
    found = library()
    return found if found is not None and found.prunella_stream_available() else None


@functools.cache
def _sums_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Does torch have a product there of two matrices of this dtype, with sums and result in float32?"""
    if device.type == "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return False
    one = torch.ones(16, 16, dtype=dtype, device=device)
    try:
        made: Any = torch.mm(one, one * (1 + 2**-6), out_dtype=torch.float32)  # 16.25, which bfloat16 has not
    except (TypeError, RuntimeError):  # NotImplementedError is one
        return False
    return made.dtype == torch.float32 and bool((made == 16.25).all())


def add_gram(gram_II: Tensor, x_TI: Tensor) -> None:
    """gram += x^T x, in place, float32. Only one triangle is multiplied out; the other is its mirror."""
    width = x_TI.shape[1]
    kernels = _kernels() if x_TI.dtype == torch.bfloat16 and x_TI.device.type == "cpu" else None
    mixed = _sums_in_float32(x_TI.device, x_TI.dtype)
    panel = at_a_time(PANEL, x_TI.device)
    for x in torch.split(x_TI, at_a_time(TOKENS, x_TI.device)):
        if kernels is not None and x.stride(1) == 1 and x.stride(0) >= width and len(x):
            call(kernels.prunella_gram, x, x.shape[0], width, x.stride(0), gram_II)
            continue
        x = x if mixed else x.float()
        for start in range(0, width, panel):
            panel_TP, right_TI, sum_PI = (
                x[:, start : start + panel],
                x[:, start:],
                gram_II[start : start + panel, start:],
            )
            if mixed:
                sum_PI += torch.mm(panel_TP.T, right_TI, out_dtype=torch.float32)
            else:
                with exact_products(x.device):
                    sum_PI.addmm_(panel_TP.T, right_TI)
    for start in range(0, width, panel):  # mirror the upper triangle
        stop = min(start + panel, width)
        gram_II[stop:, start:stop] = gram_II[start:stop, stop:].T
        square = gram_II[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)


def add_drift(drift_II: Tensor, dense_TI: Tensor, x_TI: Tensor) -> None:
    """drift += (dense - x)^T x, in place, float32.

    bfloat16 where x is: sums of `TOKENS` tokens are rounded to it, an error far below that of their estimate.
    """
    size = at_a_time(TOKENS, x_TI.device)
    with exact_products(x_TI.device):
        for dense, x in zip(torch.split(dense_TI, size), torch.split(x_TI, size), strict=True):
            if x.dtype != torch.bfloat16:
                dense, x = dense.float(), x.float()
            drift_II += (dense - x).T @ x


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Causal attention over whole windows, or of one token over a cache, with transformers' signature for attention
    functions.

    query (B, heads, T, D), key and value (B, kv heads, T, D); returns (B, T, heads, D). Whatever the kernels do
    not cover (masks, windows over a cache, other dtypes and devices) goes to torch.
    """
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    scale = query.shape[3] ** -0.5 if scaling is None else float(scaling)
    out = None
    if not (
        attention_mask is not None
        or dropout
        or torch.compiler.is_compiling()
        or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache"))
    ):
        if query.shape[2] == 1 and not differentiable(query, key, value):  # the newest token sees all keys
            out = attend(query, key, value, scale)
        elif causal:
            out = _causal(query, key, value, scale)
    if out is not None:
        return out, None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
    return result


def differentiable(*tensors: Tensor) -> bool:
    """May gradients be asked of what is made of these tensors?"""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
    """softmax(scale q k^T) v of one token, (B, heads, 1, D) over (B, kv heads, T, D), as (B, 1, heads, D): torch's
    takes tens of times as long in bfloat16. None where there is no kernel for these tensors."""
    kernels = library()
    batch, heads, _, dim = query.shape
    if kernels is None or not _fit(query, key, value):
        return None
    out = query.new_empty(batch, 1, heads, dim)
    strides = (*query.stride()[:2], *key.stride()[:3], *value.stride()[:3])
    sizes = (batch, heads, key.shape[1], key.shape[2], dim)
    call(kernels.prunella_attend, query, key, value, out, *sizes, (ctypes.c_int64 * 8)(*strides), scale)
    return out


def _fit(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Are these tensors what all kernels of attention take?"""
    return (
        readable(query, key, value)
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and value.shape == key.shape
        and key.shape[0] == query.shape[0] > 0
        and key.shape[3] == query.shape[3]
        and query.shape[1] % key.shape[1] == 0
    )


def readable(*tensors: Tensor) -> bool:
    """Are these tensors of bfloat16 in memory that the kernels can read now?"""
    return (
        all(type(t) is Tensor and t.dtype == torch.bfloat16 and t.device.type == "cpu" for t in tensors)
        and not under_transform()
    )


def _strides(*tensors: Tensor) -> ctypes.Array[Any]:
    """Of batches, heads and tokens."""
    return (ctypes.c_int64 * (3 * len(tensors)))(*(t.stride(i) for t in tensors for i in range(3)))


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
    """Causal attention over windows, (B, T, heads, D); None where there is no kernel for these tensors."""
    tokens, dim = query.shape[2:]
    if _kernels() is None or not _fit(query, key, value) or key.shape[2] != tokens or dim % 32 or tokens > 1 << 14:
        return None
    if differentiable(query, key, value):
        out: Tensor = _Causal.apply(query, key, value, scale)  # type: ignore[no-untyped-call]
        return out
    return _run_causal(query, key, value, scale, None)


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        lse_BHT = query.new_empty(query.shape[:3], dtype=torch.float32)
        out = _run_causal(query, key, value, scale, lse_BHT)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, out, lse_BHT)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, out, lse_BHT = ctx.saved_tensors
        grad = grads[0].contiguous()
        delta_BHT = (grad.float() * out).sum(-1).transpose(1, 2).contiguous()
        inputs = (query, key, value, grad.transpose(1, 2))
        pulled = tuple(t.new_empty(t.shape) for t in inputs[:3])
        kernels = _kernels()
        assert kernels is not None
        call(
            kernels.prunella_attention_back,
            *(*inputs, lse_BHT, delta_BHT, *pulled),
            *(*query.shape[:2], key.shape[1], *query.shape[2:]),
            _strides(*inputs),
            ctx.scale,
        )
        return *pulled, None


def _run_causal(query: Tensor, key: Tensor, value: Tensor, scale: float, lse_BHT: Tensor | None) -> Tensor:
    batch, heads, tokens, dim = query.shape
    out = query.new_empty(batch, tokens, heads, dim)
    kernels = _kernels()
    assert kernels is not None
    call(
        kernels.prunella_attention,
        *(query, key, value, out, lse_BHT),
        *(batch, heads, key.shape[1], tokens, dim),
        _strides(query, key, value),
        scale,
    )
    return out


def use_fast_attention(network: Any) -> None:
    """Let a transformers model on the CPU use `attention`, if it uses torch's now and the processor can, and its code
    does not ask for torch's by name: some make their masks only then."""
    if attention_of(network.config) != "sdpa" or library() is None:
        return
    if any(map(_asks_for_torch, {type(module).__module__ for module in network.modules()})):
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("prunella", attention)
    AttentionMaskInterface.register("prunella", sdpa_mask)
    network.set_attn_implementation("prunella")


@functools.cache
def _asks_for_torch(module: str) -> bool:
    """Does a module of Python code compare the attention of its networks with torch's name for its own?"""
    if module.startswith("torch."):
        return False
    try:
        source = inspect.getsource(sys.modules[module])
    except (OSError, TypeError):  # who knows
        return True
    return re.search(r"""_attn_implementation\b[^\n]*(==|!=|\bin\b)[^\n]*["']sdpa["']""", source) is not None
