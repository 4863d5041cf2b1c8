"""Products and convolutions of pruned weights with many positions, against torch's."""

from __future__ import annotations

import copy
import ctypes
import io
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunella import ModelError
from prunella.machine import threaded
from prunella.sparse import kernels, measured
from prunella.sparse.conv import SparseConv, packed_module
from prunella.sparse.format import pack
from prunella.sparse.linear import SparseLinear, TrainingError
from prunella.sparse.steps import run, step
from prunella.sparse.striped import (
    Striped,
    StripedWeight,
    dense_conv,
    dense_weight,
    kernel_weight,
    sparse_conv,
    sparse_product,
    striped,
    striped_dense,
)

CLOSE = 3e-6  # of the largest result: sums of float32 in another order


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=itertools.product(kernels.instructions() or ["torch"], (1, 2)), ids=str)
def processor(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every instruction set, with one thread and with two."""
    name, threads = request.param
    if name != "torch":
        kernels.use(name)
    with threaded(threads):
        yield
    kernels.use(None)


def pruned(*shape: int, sparsity: float = 0.8) -> Tensor:
    """A weight that keeps some values; of its rows one keeps none and one keeps all."""
    weight = torch.randn(shape)
    mask = torch.rand(shape) > sparsity
    if shape[0] > 2 and 0 < sparsity < 1:
        mask[0], mask[1] = False, True
    return weight * mask


def parts(weight: Striped) -> tuple[Tensor, Tensor, Tensor]:
    return weight.values, weight.index, weight.starts


def close(found: Tensor, wanted: Tensor, most: float = CLOSE) -> bool:
    assert found.shape == wanted.shape
    return bool((found - wanted).abs().max() <= most * wanted.abs().max().clamp_min(1e-6))


def convolution(conv: Any, sparsity: float = 0.8, dtype: torch.dtype = torch.float32, bits: int | None = None) -> Any:
    """The dense convolution, pruned, and the module that takes its place when it is packed."""
    conv = conv.to(dtype).eval().requires_grad_(False)
    conv.weight.copy_(pruned(*conv.weight.shape, sparsity=sparsity))
    weight_OI = conv.weight.movedim(1, -1).flatten(1)
    module = packed_module(packed := pack(weight_OI.contiguous(), weight_OI != 0, bits), copy.deepcopy(conv))
    if bits:
        from prunella.sparse.format import as_parameter, unpack

        conv.weight.copy_(as_parameter(unpack(packed, dtype), {"kernel": conv.kernel_size}))
    assert isinstance(module, SparseConv)
    return conv, module


# ---------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize(
    ("rows", "columns", "places"), [(5, 7, 1), (9, 300, 1), (4, 6 * 49, 49), (3, 513, 9), (2, 512, 256)]
)
def test_a_weight_comes_back_from_its_strips(rows: int, columns: int, places: int) -> None:
    weight_OI = pruned(rows, columns, sparsity=0.6)
    mask_OI = weight_OI != 0
    kernel = (1, places)
    parameter = weight_OI.view(rows, 1, places, -1).movedim(-1, 1)
    for dtype, bits in ((torch.float32, None), (torch.bfloat16, None), (torch.float32, 8)):
        packed = pack(weight_OI.to(dtype), mask_OI, bits)
        weight = striped(packed, places)
        assert weight.strip % places == 0
        assert weight.strip <= 256
        assert int(weight.index.max()) < weight.strip
        assert torch.allclose(
            kernel_weight(weight, kernel), parameter, atol=0 if dtype == torch.float32 and not bits else 0.05
        )
    assert torch.equal(dense_weight(striped(pack(weight_OI, mask_OI))), weight_OI)
    assert torch.equal(kernel_weight(striped_dense(weight_OI, places), kernel), parameter)


def test_a_matrix_in_float32_shares_its_values_with_the_packed_weight() -> None:
    weight_OI = pruned(8, 200)
    packed = pack(weight_OI, weight_OI != 0)
    assert striped(packed).values.data_ptr() == packed.values.data_ptr()


# ---------------------------------------------------------------------------------------------------------
# Products


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_products_are_torchs(processor: None, sparsity: float) -> None:
    for rows, columns, positions in ((3, 5, 1), (16, 40, 17), (100, 300, 130), (801, 97, 33), (33, 96, 49)):
        weight_OI, bias, x = (
            pruned(rows, columns, sparsity=sparsity),
            torch.randn(rows),
            torch.randn(positions, columns),
        )
        weight = striped_dense(weight_OI)
        wanted = functional.linear(x.double(), weight_OI.double(), bias.double()).float()
        assert close(sparse_product(x, *parts(weight), bias, columns, weight.strip), wanted)
        found = sparse_product(x.view(1, positions, columns), *parts(weight), None, columns, weight.strip)
        assert close(found[0], wanted - bias)
        found = sparse_product(x.bfloat16(), *parts(weight), bias, columns, weight.strip)
        assert found.dtype == torch.bfloat16
        assert close(found.float(), wanted, 0.02)
    assert sparse_product(torch.empty(0, 96), *parts(weight), bias, 96, weight.strip).shape == (0, 33)


@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
def test_what_a_step_does_at_its_end(processor: None, act: str) -> None:
    if kernels.library() is None:
        pytest.skip("no kernels were compiled")
    rows, columns, positions = 19, 130, 45
    weight_OI, x, ld = pruned(rows, columns), torch.randn(positions, columns), 64
    scale, bias, residual = torch.rand(rows) + 0.5, torch.randn(rows), torch.randn(rows, ld)
    x_IT, y_OT = torch.full((columns, ld), torch.nan), torch.empty(rows, ld)  # what lies between positions is anything
    x_IT[:, :positions] = x.T
    weight = striped_dense(weight_OI)
    c = StripedWeight(rows, columns, weight.strip, weight.starts.shape[1] - 1, *(p.data_ptr() for p in parts(weight)))
    function = {"none": lambda y: y, "relu": torch.relu, "gelu": functional.gelu}[act]
    for last in (0, 1):
        product = step(
            "product", weight=ctypes.addressof(c), scale=scale, bias=bias, x=(x_IT.data_ptr(), ld),
            y=(y_OT.data_ptr(), ld), residual=(residual.data_ptr(), ld), residual_last=last, act=act,
            positions=positions,
        )  # fmt: skip
        run([product])
        wanted, more = x @ weight_OI.T * scale + bias, residual[:, :positions].T
        wanted = function(wanted) + more if last else function(wanted + more)
        assert close(y_OT[:, :positions].T, wanted, 1e-5)


@pytest.mark.parametrize("wild", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_infinity_come_out_as_of_a_dense_product(processor: None, wild: float) -> None:
    weight_OI, x = pruned(20, 250), torch.randn(150, 250)
    x[3, 7] = x[140, 249] = x[3, 100] = wild
    weight = striped_dense(weight_OI)
    found, wanted = sparse_product(x, *parts(weight), None, 250, weight.strip), x @ weight_OI.T
    assert torch.equal(found.isnan(), wanted.isnan())
    assert found.isnan().any()
    assert torch.equal(found.isinf(), wanted.isinf())
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------
# Convolutions: batch, channels, rows, height, width, and the options of nn.Conv2d

CONVS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((1, 3, 8, 9, 11), {"kernel_size": 3, "padding": 1}),
    ((2, 5, 7, 14, 14), {"kernel_size": 3, "stride": 2, "padding": 1}),
    ((2, 8, 8, 15, 12), {"kernel_size": 5, "padding": 2, "bias": False}),
    ((1, 3, 16, 33, 30), {"kernel_size": 7, "stride": 2, "padding": 3}),
    ((2, 12, 12, 10, 10), {"kernel_size": 3, "padding": 2, "dilation": 2}),
    ((2, 12, 8, 10, 10), {"kernel_size": 3, "padding": 1, "groups": 4}),
    ((2, 6, 6, 9, 9), {"kernel_size": 3, "padding": 1, "groups": 6}),
    ((2, 6, 8, 9, 9), {"kernel_size": 1, "stride": 2, "groups": 2}),
    ((1, 4, 4, 6, 6), {"kernel_size": 3, "stride": 3}),
    ((2, 4, 6, 12, 5), {"kernel_size": (3, 1), "stride": (2, 1), "padding": (1, 0)}),
    ((1, 2, 3, 5, 5), {"kernel_size": 5}),
    ((1, 2, 3, 9, 9), {"kernel_size": 2, "stride": 4}),
    ((2, 4, 5, 6, 6), {"kernel_size": 3, "padding": (4, 3)}),
    ((2, 4, 4, 12, 12), {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}),
    ((1, 2, 20, 17, 17), {"kernel_size": 16, "padding": 5}),
    ((1, 3, 3, 8, 8), {"kernel_size": 1, "padding": 2}),
    ((1, 40, 3, 7, 8), {"kernel_size": 4, "padding": "same"}),
    ((1, 4, 3, 7, 8), {"kernel_size": (2, 3), "padding": "same", "dilation": 2}),
    ((1, 4, 3, 7, 8), {"kernel_size": 3, "padding": "valid"}),
]


@pytest.mark.parametrize(("shape", "options"), CONVS)
def test_convolutions_are_torchs(processor: None, shape: tuple[int, ...], options: Any) -> None:
    batch, channels, rows, *size = shape
    conv, module = convolution(nn.Conv2d(channels, rows, **options))
    x = torch.randn(batch, channels, *size)
    wanted = conv(x)
    assert close(module._by_strips(x), wanted)
    assert close(module._expanded(x), wanted)
    assert close(module(x), wanted)
    inner = module(x.contiguous(memory_format=torch.channels_last))
    assert close(inner, wanted)
    if batch > 1:
        assert inner.is_contiguous(memory_format=torch.channels_last)
        assert close(module(x[::2]), wanted[::2])
    assert close(module(x[0]), wanted[0])


@pytest.mark.slow  # a thousand shapes
def test_convolutions_of_any_shape_are_torchs(processor: None) -> None:
    import random

    chance = random.Random(0)
    for _ in range(120):
        groups, kernel = chance.choice([1, 1, 2, 3]), [chance.randint(1, 5), chance.randint(1, 5)]
        stride, dilation = ([chance.choice([1, 1, 2, 3]) for _ in "yx"] for _ in range(2))
        padding = [chance.randint(0, 6) for _ in "yx"]
        size = [
            chance.randint(max(1, d * (k - 1) + 1 - 2 * p), 30)
            for d, k, p in zip(dilation, kernel, padding, strict=True)
        ]
        channels, rows = groups * chance.randint(1, 20), groups * chance.randint(1, 40)
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        conv = nn.Conv2d(channels, rows, kernel, **options)  # type: ignore[arg-type]
        conv, module = convolution(conv, chance.random())
        x = torch.randn(chance.randint(1, 3), channels, *size)
        assert close(module._by_strips(x), conv(x)), (conv, x.shape)


@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"stride": 2, "padding": "valid"}, {"padding": "same", "groups": 2}]
)
def test_convolutions_of_one_dimension(options: Any) -> None:
    conv, module = convolution(nn.Conv1d(6, 10, 4, **options))
    x = torch.randn(3, 6, 50)
    assert close(module(x), conv(x))
    assert close(module._by_strips(x), conv(x))
    assert close(module(x[0]), conv(x)[0])


@pytest.mark.parametrize("wild", [torch.nan, torch.inf])
def test_nan_and_infinity_come_out_as_of_a_dense_convolution(processor: None, wild: float) -> None:
    conv, module = convolution(nn.Conv2d(40, 6, 3, stride=2, padding=1))
    x = torch.randn(2, 40, 15, 15)
    x[0, 11, 4, 3] = x[1, 39, 14, 0] = wild
    patches = functional.unfold(x, 3, stride=2, padding=1)  # what lies around a picture is 0, and times a weight 0
    wanted = (conv.weight.flatten(1) @ patches).view(2, 6, 8, 8) + conv.bias.view(-1, 1, 1)
    found = module._by_strips(x)
    assert torch.equal(found.isnan(), wanted.isnan())
    assert found.isnan().any()
    assert torch.equal(found.isinf(), wanted.isinf())
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_no_pictures_and_pictures_that_are_too_small() -> None:
    conv, module = convolution(nn.Conv2d(4, 6, 3))
    assert module(torch.empty(0, 4, 8, 8)).shape == conv(torch.empty(0, 4, 8, 8)).shape
    for way in (conv, module, module._by_strips):
        with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
            way(torch.randn(1, 4, 2, 8))
    with pytest.raises(ValueError, match="4 channels"):
        module(torch.randn(1, 5, 8, 8))


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.bfloat16, None), (torch.float16, None), (torch.float32, 8), (torch.bfloat16, 4)]
)
def test_other_dtypes(dtype: torch.dtype, bits: int | None) -> None:
    conv, module = convolution(nn.Conv2d(8, 6, 3, padding=1), dtype=dtype, bits=bits)
    x = torch.randn(2, 8, 9, 9, dtype=dtype)
    for found in (module(x), module._by_strips(x), module._expanded(x)):
        assert found.dtype == dtype
        assert close(found.float(), conv(x).float(), 0.02)
    for wrong in (torch.int64, torch.bool):
        with pytest.raises(ValueError, match="floating-point"):
            module(torch.ones(2, 8, 9, 9, dtype=wrong))
    if not bits:
        with pytest.raises(ValueError, match=r"got an input of torch\.float32"):
            module(x.float())
        assert close(module.to(torch.float32)(x.float()), conv.float()(x.float()), 1e-5)
    else:
        assert close(module(x.float()).float(), conv.float()(x.float()), 0.02)


def test_integers_are_refused_by_linear_layers() -> None:
    weight_OI = pruned(8, 64)
    module = SparseLinear(pack(weight_OI, weight_OI != 0))
    for tokens in (2, 40):
        with pytest.raises(ValueError, match="floating-point"):
            module(torch.ones(tokens, 64, dtype=torch.int64))


# ---------------------------------------------------------------------------------------------------------
# Modules


def modules() -> list[tuple[Any, Any, Tensor]]:
    """Dense and packed, and an input of many positions."""
    linear = nn.Linear(96, 24).eval().requires_grad_(False)
    linear.weight.copy_(pruned(24, 96))
    packed = SparseLinear(pack(linear.weight.clone(), linear.weight != 0), linear.bias)
    return [
        (linear, packed, torch.randn(3, 30, 96)),
        (*convolution(nn.Conv2d(6, 8, 3, padding=1)), torch.randn(2, 6, 10, 10)),
        (*convolution(nn.Conv2d(48, 8, 1)), torch.randn(2, 48, 10, 10)),
    ]


@pytest.mark.parametrize("number", range(3))
def test_values_that_change_in_place_are_noticed(number: int) -> None:
    dense, module, x = modules()[number]
    for inference in (False, True):
        with torch.inference_mode(inference):
            assert close(module(x), dense(x))
            assert close(module._by_strips(x), dense(x))
            dense.weight.mul_(2)
            module.weight_values.mul_(2)
            assert close(module(x), dense(x))
            assert close(module._by_strips(x), dense(x))
    module.load_state_dict({k: v * 3 if k == "weight_values" else v for k, v in module.state_dict().items()})
    dense.weight.mul_(3)
    assert close(module._by_strips(x), dense(x))
    other = pruned(*dense.weight.shape)
    dense.weight.copy_(other)
    weight_OI = other.movedim(1, -1).flatten(1) if other.ndim > 2 else other
    for name, part in pack(weight_OI.contiguous(), weight_OI != 0).parts().items():
        setattr(module, name, part)
    assert close(module._by_strips(x), dense(x))


def test_buffers_that_were_made_in_inference_mode_are_watched_too() -> None:
    with torch.inference_mode():
        dense, module, x = modules()[1]
        assert close(module(x), dense(x))
        module.weight_values.mul_(2)
        dense.weight.mul_(2)
        assert close(module._by_strips(x), dense(x))


@pytest.mark.parametrize("number", range(3))
def test_copies_and_pickles(number: int) -> None:
    dense, module, x = modules()[number]
    wanted = dense(x)
    assert close(module._by_strips(x), wanted)
    file = io.BytesIO()
    torch.save(module, file)
    assert file.tell() < 20_000  # without what is made of the weight
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert close(other(x), wanted)
        other.weight_values.zero_()
        assert not close(other._by_strips(x), wanted)
    assert close(module._by_strips(x), wanted)


@pytest.mark.parametrize("number", range(3))
def test_no_gradient_passes_unnoticed(number: int) -> None:
    _, module, x = modules()[number]
    y = module(x.requires_grad_())
    assert y.requires_grad
    with pytest.raises(TrainingError):
        y.sum().backward()


@pytest.mark.parametrize("number", range(3))
def test_autocast(number: int) -> None:
    """Activations come to the weight's dtype."""
    dense, module, x = modules()[number]
    with torch.autocast("cpu", torch.bfloat16):
        assert close(module(x.bfloat16()).float(), dense(x).float(), 0.03)
        assert close(module(x).float(), dense(x).float(), 0.03)


@pytest.mark.parametrize("number", range(3))
def test_threads_side_by_side(number: int) -> None:
    dense, module, x = modules()[number]
    wanted, wrong = dense(x), []

    def work() -> None:
        for _ in range(10):
            with torch.no_grad():
                if not close(module(x), wanted) or not close(module._by_strips(x), wanted):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_devices(sim: Any) -> None:
    """There a convolution keeps its weight dense."""
    for dense, module, x in modules()[1:]:
        module.to(sim)
        module.settle()
        assert close(module(x.to(sim)).cpu(), dense(x), 1e-5)
        module.weight_values.mul_(2)
        dense.weight.mul_(2)
        assert close(module(x.to(sim)).cpu(), dense(x), 1e-5)
        assert close(module.to("cpu")(x), dense(x), 1e-5)


def test_compiled_and_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "prunella.sparse.conv.fastest", lambda key, ways: ways["expanded"]()
    )  # where it is not compiled
    dense, module, x = modules()[1]
    dense, module = nn.Sequential(dense, nn.ReLU()), nn.Sequential(module, nn.ReLU())
    module[0].settle()
    with torch.no_grad():
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert close(compiled(x), dense(x))
        exported = torch.export.export(module, (x,))
        assert "sparse_conv" in str(exported.graph)
        assert close(exported.module()(x), dense(x))
        module[0].weight_values.mul_(2)
        with pytest.raises(ModelError, match=r"once without torch\.compile"):
            compiled(x)
        dense[0].weight.mul_(2)
        assert close(module(x), dense(x))
        assert close(compiled(x), dense(x))


# ---------------------------------------------------------------------------------------------------------
# Operators


def test_operators_are_sound() -> None:
    weight = striped_dense(pruned(6, 70))
    check = torch.library.opcheck
    check(
        torch.ops.prunella.sparse_product.default,
        (torch.randn(3, 9, 70), *parts(weight), torch.randn(6), 70, weight.strip),
    )
    conv = pruned(6, 4, 3, 3)
    weight = striped_dense(conv.movedim(1, -1).flatten(1), 9)
    how = ([3, 3], [2, 1], [1, 0], [1, 2], 1)
    x = torch.randn(2, 4, 9, 9)
    for batch in (x, x.contiguous(memory_format=torch.channels_last), x.bfloat16(), x.double()):
        check(torch.ops.prunella.sparse_conv.default, (batch, *parts(weight), None, 36, weight.strip, *how))
        check(torch.ops.prunella.dense_conv.default, (batch, conv, torch.randn(6), *how))
    assert close(sparse_conv(x, *parts(weight), None, 36, weight.strip, *how), dense_conv(x, conv, None, *how))


@pytest.mark.parametrize(
    "change",
    [
        {"values": lambda w: w.values[:-1]},
        {"values": lambda w: w.values.double()},
        {"index": lambda w: w.index.int()},
        {"starts": lambda w: w.starts[:, :-1]},
        {"starts": lambda w: w.starts.T.contiguous().T},
        {"strip": lambda w: 257},
        {"strip": lambda w: 10},
        {"bias": lambda w: torch.randn(5)},
        {"x": lambda w: torch.randn(2, 10, 9, 9)},
        {"x": lambda w: torch.randn(2, 11, 9)},
        {"columns": lambda w: 98},
        {"columns": lambda w: 108},
        {"groups": lambda w: 0},
        {"groups": lambda w: 4},
        {"stride": lambda w: [0, 1]},
        {"padding": lambda w: [-1, 1]},
        {"kernel": lambda w: [9]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    weight = striped_dense(pruned(6, 11 * 9), 9)
    values = {
        "x": torch.randn(2, 11, 9, 9), "values": weight.values, "index": weight.index, "starts": weight.starts,
        "bias": None, "columns": 99, "strip": weight.strip, "kernel": [3, 3], "stride": [1, 1], "padding": [1, 1],
        "dilation": [1, 1], "groups": 1,
    }  # fmt: skip
    sparse_conv(*values.values())
    ((name, make),) = change.items()
    with pytest.raises(ValueError, match=r"do not fit|no convolution|got an input"):
        sparse_conv(*(values | {name: make(weight)}).values())


# ---------------------------------------------------------------------------------------------------------
# Which way is the fastest


def test_the_fastest_way_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = [0.0], []
    monkeypatch.setattr(measured.time, "perf_counter", lambda: now[0])

    def way(name: str, seconds: float) -> Any:
        def run() -> str:
            calls.append(name)
            now[0] += seconds
            return name

        return run

    slow, fast = way("slow", 2.0), way("fast", 1.0)
    measured.forget()
    assert measured.fastest("a", {"slow": slow, "fast": fast}) == "fast"
    assert calls == [*["slow", "fast"] * measured.AGAIN, "fast"]
    assert measured.fastest("a", {"slow": slow, "fast": way("fast", 9.0)}) == "fast"
    assert calls[-1] == "fast"
    assert len(calls) == 2 * measured.AGAIN + 2
    assert measured.fastest("b", {"slow": way("slow", 0.5), "fast": fast}) == "slow"
    assert measured.fastest("a", {"slow": slow}) == "slow"  # the other is no longer to be had
    measured.forget()
    assert measured.fastest("a", {"slow": way("slow", 0.5), "fast": fast}) == "slow"
    kernels.use(None)  # other instructions are measured anew
    assert not measured._chosen
