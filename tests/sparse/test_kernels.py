"""Every kernel against a product in float64, and with the wildest weights inside of its buffers."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from prunella import fast
from prunella.errors import InputError
from prunella.machine import threaded
from prunella.sparse import kernels
from prunella.sparse.format import Packed, pack, unpack

SHAPES = [(1, 1), (7, 5), (33, 64), (16, 200), (9, 1000), (70, 129), (5, 2113)]
KINDS: list[tuple[torch.dtype, int | None]] = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, 8),
    (torch.bfloat16, 4),
    (torch.float32, 8),
    (torch.float32, 4),
]
# Rounding of the result; with integers, of the activations too, to 16 bits
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}


@pytest.fixture(params=kernels.instructions() or ["torch"])
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "torch":
        kernels.use(request.param)
    yield request.param
    kernels.use(None)


def weight(rows: int, columns: int, dtype: torch.dtype, bits: int | None, group: int = 128) -> Packed:
    """Rows of all densities, an empty one and a full one among them."""
    generator = torch.Generator().manual_seed(rows + columns)
    density_O1 = torch.rand(rows, 1, generator=generator)
    density_O1[::5], density_O1[1::5] = 0.0, 1.0
    mask_OI = torch.rand(rows, columns, generator=generator) < density_O1
    weight_OI = torch.randn(rows, columns, generator=generator) * mask_OI
    return pack(weight_OI.to(dtype), mask_OI, bits, group)


def product(x: Tensor, p: Packed) -> Tensor:
    y: Tensor = kernels.sparse_linear(x, p.mask, p.offsets, p.values, p.scales, p.columns, p.group)
    return y


def reference(x: Tensor, p: Packed) -> Tensor:
    return x.double() @ unpack(p, torch.float32 if p.bits else None).double().T


def distance(y: Tensor, exact: Tensor) -> float:
    return float((y.double() - exact).norm() / exact.norm().clamp_min(1e-30))


@pytest.mark.parametrize(("dtype", "bits"), KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_agree_with_float64(
    instructions: str, shape: tuple[int, int], dtype: torch.dtype, bits: int | None
) -> None:
    p = weight(*shape, dtype, bits)
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 2, 3, 5, 8, 11, 16, 17, 40):
        x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
        tolerance = TOLERANCE[dtype] if bits is None or tokens <= kernels.FEW else 4e-3
        tolerance = max(tolerance, 2e-4) if bits else tolerance
        assert distance(product(x, p), reference(x, p)) < tolerance, (tokens, instructions)


@pytest.mark.parametrize("group", [0, 128, 256, 1024])
@pytest.mark.parametrize("bits", [8, 4])
def test_scales_of_any_group_are_found(instructions: str, group: int, bits: int) -> None:
    p = weight(12, 2500, torch.float32, bits, group)
    assert p.scales is not None
    p.scales.mul_(torch.rand(p.scales.shape).to(torch.bfloat16))
    x = torch.randn(3, 2500)
    assert distance(product(x, p), reference(x, p)) < 2e-4


@pytest.mark.parametrize("bits", [8, 4])
def test_activations_of_very_different_sizes_keep_their_digits(instructions: str, bits: int) -> None:
    p = weight(20, 512, torch.float32, bits)
    x = torch.randn(1, 512) * torch.tensor([1e-6, 1e4, 1.0, 0.0]).repeat_interleave(128)
    for part in range(4):
        alone = torch.zeros_like(x)
        alone[:, part * 128 : (part + 1) * 128] = x[:, part * 128 : (part + 1) * 128]
        assert distance(product(alone, p), reference(alone, p)) < 2e-4


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nan_and_infinity_are_not_swallowed(instructions: str, bits: int | None, wrong: float) -> None:
    p = weight(6, 300, torch.float32, bits)
    x = torch.randn(2, 300)
    x[0, 250] = wrong
    y = product(x, p)
    assert not torch.isfinite(y[0, 1])  # a full row
    assert torch.isfinite(y[1]).all()


def test_leading_dimensions_and_views_are_kept(instructions: str) -> None:
    p = weight(10, 64, torch.float32, None)
    x = torch.randn(64, 3, 2).permute(2, 1, 0)
    assert product(x, p).shape == (2, 3, 10)
    assert distance(product(x, p), reference(x, p)) < 3e-6
    assert product(x[:, :0], p).shape == (2, 0, 10)


def test_threads_do_not_change_the_result(instructions: str) -> None:
    p = weight(200, 300, torch.bfloat16, None)
    x = torch.randn(1, 300).bfloat16()
    results = []
    for threads in (1, 2, 5):
        with threaded(threads):
            results.append(product(x, p))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("columns", [1, 31, 64, 130, 1000])
def test_the_dense_product_agrees_with_float64(instructions: str, columns: int) -> None:
    weight_OI = torch.randn(37, columns).bfloat16()
    for tokens in (1, 3, 9):
        x = torch.randn(tokens, columns).bfloat16()
        y: Tensor = kernels.dense_linear(x, weight_OI)
        assert distance(y, x.double() @ weight_OI.double().T) < 4e-3


@pytest.mark.parametrize("shape", [(1, 9, 3, 300, 64), (2, 4, 4, 100, 32), (1, 2, 1, 1, 80), (3, 6, 2, 17, 7)])
def test_one_token_attends_as_in_float64(instructions: str, shape: tuple[int, ...]) -> None:
    batch, heads, kv, length, dim = shape
    generator = torch.Generator().manual_seed(0)

    def random(tokens: int, heads: int) -> Tensor:  # transposed, as transformers hands them over
        return torch.randn(batch, tokens, heads, dim, generator=generator).bfloat16().mul(2).transpose(1, 2)

    query, key, value = random(1, heads), random(length, kv), random(length, kv)
    found = fast.attend(query, key, value, 0.3)
    if kernels.library() is None:
        assert found is None
        return
    assert found is not None
    wide = (t.double().repeat_interleave(heads // kv, 1) for t in (key, value))
    exact = torch.nn.functional.scaled_dot_product_attention(query.double(), *wide, scale=0.3)
    assert distance(found.transpose(1, 2), exact) < 4e-3
    key[0, 0, length // 2, 0] = torch.nan
    again = fast.attend(query, key, value, 0.3)
    assert again is not None
    assert again[0, 0, : heads // kv].isnan().all()
    assert torch.equal(again[0, 0, heads // kv :], found[0, 0, heads // kv :])


def test_copies_in_large_pages_are_copies() -> None:
    tensors = [torch.randn(700, 900).T, torch.ones(3).bfloat16(), torch.arange(7, dtype=torch.uint8)]
    copies = list(kernels.resident(tensors))
    assert all(copy.is_contiguous() and torch.equal(copy, tensor) for copy, tensor in zip(copies, tensors, strict=True))
    assert all(copy.data_ptr() % 64 == 0 for copy in copies)
    copies[1].zero_()
    assert torch.equal(copies[0], tensors[0])
    assert torch.equal(copies[2], tensors[2])


def test_parts_that_do_not_fit_are_refused() -> None:
    p = weight(8, 100, torch.float32, None)
    x = torch.randn(1, 100)
    for broken in (
        (p.mask[:, :8].contiguous(), p.offsets, p.values, None, 100, 0),
        (p.mask, p.offsets[:-1].contiguous(), p.values, None, 100, 0),
        (p.mask, p.offsets.long(), p.values, None, 100, 0),
        (p.mask, p.offsets, p.values[:100], None, 100, 0),
        (p.mask, p.offsets, p.values.bfloat16(), None, 100, 0),
        (p.mask, p.offsets, p.values, None, 99, 0),
        (p.mask, p.offsets, p.values.to(torch.int8), None, 100, 0),
    ):
        if kernels.library() is not None:
            with pytest.raises(ValueError, match="do not fit"):
                kernels.sparse_linear(x, *broken)


def test_unknown_instructions_are_refused() -> None:
    if kernels.library() is None:
        pytest.skip("no kernels were compiled")
    with pytest.raises(InputError, match="unknown instruction set"):
        kernels.use("sse9")


def test_without_a_compiler_torch_does_the_work_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kernels.library.cache_clear()
    monkeypatch.setattr(kernels.native, "library", lambda: None)
    try:
        for dtype, bits in KINDS:
            p = weight(9, 130, dtype, bits)
            x = torch.randn(3, 130).to(dtype)
            assert distance(product(x, p), reference(x, p)) < 8e-3
        assert capsys.readouterr().err.count("not compiled") == 1
        assert kernels.instructions() == []
    finally:
        kernels.library.cache_clear()


class Portable:
    """The name of every instruction set of a processor that has no other."""

    def __call__(self, number: int) -> bytes:
        return b"portable"


def test_a_processor_without_vectors_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = kernels.native.library()
    if found is None:
        pytest.skip("no kernels were compiled")

    names = ("prunella_read", "prunella_generate", "prunella_seal", "prunella_use")
    poor = SimpleNamespace(**{name: getattr(found, name) for name in names}, prunella_isa=Portable())
    kernels.library.cache_clear()
    monkeypatch.setattr(kernels, "_SIGNATURES", {})
    monkeypatch.setattr(kernels.native, "library", lambda: poor)
    try:
        for _ in range(2):
            kernels.library()
        assert capsys.readouterr().err.count("none of the instructions") == 1
    finally:
        monkeypatch.undo()
        kernels.library.cache_clear()
        kernels.library()
    assert "none of the instructions" not in capsys.readouterr().err


def test_operators_have_fake_versions() -> None:
    p = weight(9, 130, torch.float32, None)
    arguments = (p.mask, p.offsets, p.values, p.scales, p.columns, p.group)
    torch.library.opcheck(torch.ops.prunella.sparse_linear.default, (torch.randn(2, 130), *arguments))
    dense = (torch.randn(2, 64).bfloat16(), torch.randn(8, 64).bfloat16())
    torch.library.opcheck(torch.ops.prunella.dense_linear.default, dense)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_no_weight_leads_a_kernel_out_of_its_buffers(tmp_path: Path) -> None:
    """The entry points on random bytes for masks, offsets, values and scales, under AddressSanitizer."""
    here = Path(__file__).parent
    sources = sorted((Path(kernels.__file__).parent / "csrc").glob("*.c"))
    program = tmp_path / "fuzz"
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    built = subprocess.run(
        ["gcc", *flags, f"-I{sources[0].parent}", str(here / "fuzz.c"), *map(str, sources), "-o", str(program), "-lm"],
        capture_output=True,
        text=True,
    )
    if built.returncode and "asan" in built.stderr:
        pytest.skip("this gcc has no AddressSanitizer")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([str(program), "400"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "400 weights" in ran.stdout
