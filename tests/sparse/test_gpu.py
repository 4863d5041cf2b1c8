"""The Triton kernels against products in float64: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from test_kernels import KINDS, TOLERANCE, distance, reference, weight
from torch import Tensor

from prunella.sparse.format import Packed, round_weight, unpack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="there is no Triton for this machine")

from prunella.sparse import gpu, kernels  # noqa: E402


def move(p: Packed) -> Packed:
    scales = None if p.scales is None else p.scales.to(DEVICE)
    return Packed(p.mask.to(DEVICE), p.offsets.to(DEVICE), p.values.to(DEVICE), scales, p.columns, p.group)


def product(x: Tensor, p: Packed) -> Tensor:
    q = move(p)
    y = gpu.sparse_linear(x.to(DEVICE), q.mask, q.offsets, q.values, q.scales, q.columns, q.group)
    return y.cpu()


def tolerance(dtype: torch.dtype) -> float:
    # The interpreter cuts bfloat16 off where GPUs round it.
    return 2 * TOLERANCE[dtype] if DEVICE == "cpu" and dtype == torch.bfloat16 else TOLERANCE[dtype]


@pytest.mark.parametrize(("dtype", "bits"), KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (13, 129), (9, 600)])
def test_products_agree_with_float64(shape: tuple[int, int], dtype: torch.dtype, bits: int | None) -> None:
    p = weight(*shape, dtype, bits)
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 3, gpu.FEW + 1):
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        assert distance(product(x, p), reference(x, p)) < tolerance(dtype), tokens


@pytest.mark.parametrize("group", [0, 128, 256])
@pytest.mark.parametrize("bits", [8, 4])
def test_scales_of_any_group_are_found(group: int, bits: int) -> None:
    p = weight(6, 400, torch.float32, bits, group)
    assert p.scales is not None
    p.scales.mul_(torch.rand(p.scales.shape).to(torch.bfloat16))
    for tokens in (2, gpu.FEW + 1):
        x = torch.randn(tokens, 400)
        assert distance(product(x, p), reference(x, p)) < 3e-6


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (7, 63), (13, 130), (9, 600)])
def test_products_with_rounded_weights_agree_with_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for group in (128, 256, 0):
        rounded = round_weight(torch.randn(shape), group)
        for tokens in (1, 3, gpu.FEW + 1):
            x = torch.randn(tokens, shape[1]).to(dtype)
            moved = (rounded.values.to(DEVICE), rounded.scales.to(DEVICE), rounded.group)
            found = gpu.rounded_linear(x.to(DEVICE), *moved).cpu()
            # many tokens are multiplied with the weight in their own dtype
            wanted = x.double() @ rounded.dense(torch.float64 if tokens <= gpu.FEW else dtype).double().T
            assert distance(found, wanted) < tolerance(dtype), (group, tokens)


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, None), (torch.float32, 8), (torch.float32, 4)])
def test_rows_expand_to_the_weight_tile_by_tile(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bits: int | None
) -> None:
    p = weight(11, 140, dtype, bits)
    monkeypatch.setattr(gpu, "TILE", 5 * 140 * dtype.itemsize)  # five rows at a time
    one_hot = torch.eye(140).to(dtype)
    assert torch.equal(product(one_hot, p).T, unpack(p, dtype))


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_no_weight_leads_a_kernel_out_of_its_buffers(bits: int | None) -> None:
    """Offsets from anywhere and a mask of all ones: the interpreter, or the GPU, would fault far outside."""
    p = weight(8, 130, torch.float32, bits)
    p.mask.fill_(255)
    p.offsets.copy_(torch.tensor([0, 2**31 - 1, -(2**31), -5, 10**9, 1, -(10**9), 2**30, 7]))
    for tokens in (1, gpu.FEW + 1):
        assert product(torch.randn(tokens, 130), p).shape == (tokens, 8)


def test_leading_dimensions_views_and_empty_batches_are_kept() -> None:
    p = weight(10, 64, torch.float32, None)
    x = torch.randn(64, 3, 2).permute(2, 1, 0)
    assert product(x, p).shape == (2, 3, 10)
    assert distance(product(x, p), reference(x, p)) < 3e-6
    assert product(x[:, :0], p).shape == (2, 0, 10)


def test_integers_that_do_not_lie_on_whole_words_are_read_right() -> None:
    p = weight(9, 130, torch.float32, 8)
    shifted = torch.empty(len(p.values) + 3, dtype=torch.int8)[3:].copy_(p.values)
    x = torch.randn(1, 130)
    y = product(x, Packed(p.mask, p.offsets, shifted, p.scales, p.columns, p.group))
    assert distance(y, reference(x, p)) < 3e-6


def test_parts_that_do_not_fit_are_refused() -> None:
    p = weight(8, 100, torch.float32, None)
    with pytest.raises(ValueError, match="do not fit"):
        product(torch.randn(1, 99), p)
    with pytest.raises(ValueError, match="do not fit"):
        product(torch.randn(1, 100).bfloat16(), p)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_the_operator_of_a_gpu_is_the_triton_kernel_and_can_be_captured() -> None:
    p = move(weight(300, 512, torch.bfloat16, None))
    x = torch.randn(1, 512, device=DEVICE).bfloat16()
    arguments = (p.mask, p.offsets, p.values, p.scales, p.columns, p.group)
    kernels.sparse_linear(x, *arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.sparse_linear(x, *arguments)
    x.copy_(torch.randn(1, 512))
    graph.replay()
    assert distance(y.cpu(), reference(x.cpu(), weight(300, 512, torch.bfloat16, None))) < 4e-3
