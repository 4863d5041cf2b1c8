"""The stream's own products, where the processor can do better than torch: x^T x, and causal attention with its
gradient.

They are for bfloat16 on CPUs with AVX-512 BF16, with sums in float32 (sparse/csrc/stream_avx512.c): torch has
no product of bfloat16 into float32, and its attention there runs at a third of the machine's speed. Anywhere
else torch computes them.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .native import library

PANEL = 256  # columns of a product with float32 sums that torch makes at a time
TOKENS = 2048  # tokens at a time: what a product reads stays in the cache


@functools.cache
def _kernels() -> ctypes.CDLL | None:
    found = library()
    return found if found is not None and found.prunella_stream_available() else None


def add_gram(gram_II: Tensor, x_TI: Tensor) -> None:
    """gram += x^T x, in place, float32. Only one triangle is multiplied out; the other is its mirror."""
    width = x_TI.shape[1]
    kernels = _kernels() if x_TI.dtype == torch.bfloat16 and x_TI.device.type == "cpu" else None
    for x in torch.split(x_TI, TOKENS):
        if kernels is not None and x.stride(1) == 1:
            failed = kernels.prunella_gram(
                ctypes.c_void_p(x.data_ptr()),
                ctypes.c_int64(x.shape[0]),
                ctypes.c_int64(width),
                ctypes.c_int64(x.stride(0)),
                ctypes.c_void_p(gram_II.data_ptr()),
                torch.get_num_threads(),
            )
            if failed:
                raise MemoryError
            continue
        x = x.float()
        for start in range(0, width, PANEL):
            stop = min(start + PANEL, width)
            gram_II[start:stop, start:].addmm_(x[:, start:stop].T, x[:, start:])
    for start in range(0, width, PANEL):  # mirror the upper triangle
        stop = min(start + PANEL, width)
        gram_II[stop:, start:stop] = gram_II[start:stop, stop:].T
        square = gram_II[start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).T)


def add_drift(drift_II: Tensor, dense_TI: Tensor, x_TI: Tensor) -> None:
    """drift += (dense - x)^T x, in place, float32.

    bfloat16 where x is: sums of `TOKENS` tokens are rounded to it, an error far below that of their estimate.
    """
    for dense, x in zip(torch.split(dense_TI, TOKENS), torch.split(x_TI, TOKENS), strict=True):
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
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    out = None
    if not (
        attention_mask is not None
        or dropout
        or torch.compiler.is_compiling()
        or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache"))
    ):
        if query.shape[2] == 1 and not _differentiable(query, key, value):  # the newest token sees all keys
            from .sparse.kernels import attend

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


def _differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor | None:
    """Causal attention over windows, (B, T, heads, D); None where there is no kernel for these tensors."""
    _, heads, tokens, dim = query.shape
    if (
        _kernels() is None
        or any(t.dtype != torch.bfloat16 or t.device.type != "cpu" or t.stride(3) != 1 for t in (query, key, value))
        or key.shape[2] != tokens
        or value.shape != key.shape
        or key.shape[3] != dim
        or dim % 32
        or heads % key.shape[1]
        or tokens > 1 << 14
    ):
        return None
    if _differentiable(query, key, value):
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
        pulled = tuple(torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value))
        _call(
            "prunella_attention_back",
            (query, key, value, grad.transpose(1, 2), lse_BHT, delta_BHT, *pulled),
            (query, key, value, grad.transpose(1, 2)),
            ctx.scale,
        )
        return *pulled, None


def _run_causal(query: Tensor, key: Tensor, value: Tensor, scale: float, lse_BHT: Tensor | None) -> Tensor:
    batch, heads, tokens, dim = query.shape
    out = query.new_empty(batch, tokens, heads, dim)
    _call("prunella_attention", (query, key, value, out, lse_BHT), (query, key, value), scale)
    return out


def _call(name: str, tensors: Sequence[Tensor | None], strided: Sequence[Tensor], scale: float) -> None:
    """Call a kernel on these tensors, whose first two are queries and keys; `strided` need not be contiguous."""
    kernels, (query, key) = _kernels(), strided[:2]
    assert kernels is not None
    batch, heads, tokens, dim = query.shape
    strides = [t.stride(i) for t in strided for i in range(3)]
    failed = kernels[name](
        *(ctypes.c_void_p(None if t is None else t.data_ptr()) for t in tensors),
        *(ctypes.c_int64(n) for n in (batch, heads, key.shape[1], tokens, dim)),
        (ctypes.c_int64 * len(strides))(*strides),
        ctypes.c_float(scale),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError


def use_fast_attention(network: Any) -> None:
    """Let a transformers model on the CPU use `attention`, if it uses torch's now and the processor can."""
    if network.config._attn_implementation != "sdpa" or library() is None:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("prunella", attention)
    AttentionMaskInterface.register("prunella", sdpa_mask)
    network.set_attn_implementation("prunella")
