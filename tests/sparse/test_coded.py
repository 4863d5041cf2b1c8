"""Machine code for pruned weights: the products that torch makes of the same zeros, wherever the code lies."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunella.machine import threaded
from prunella.sparse import coded, kernels
from prunella.sparse.format import pack
from prunella.sparse.steps import run, step
from prunella.sparse.striped import leading

pytestmark = pytest.mark.skipif(not coded.available(), reason="no AVX-512, or code cannot be made here")
ACTS = {"none": lambda x: x, "relu": functional.relu, "relu6": functional.relu6, "gelu": functional.gelu}


def pruned(weight: Tensor, sparsity: float) -> Tensor:
    return weight * (torch.rand(weight.shape) >= sparsity)


def product(weight: coded.Coded, x_TI: Tensor, **options: Any) -> Tensor:
    """W x by the code, for channel-major values that end where their memory ends."""
    positions = len(x_TI)
    ld = leading(positions)
    x, y = torch.full((weight.columns, ld), float("nan")), torch.empty(weight.rows, ld)
    x[:, :positions] = x_TI.T
    residual = options.pop("residual", None)
    if residual is not None:
        beside = torch.empty(weight.rows, ld)
        beside[:, :positions] = residual.T
        options["residual"] = (beside.data_ptr(), ld)
    struct = weight.weight()
    fields = {"x": (x.data_ptr(), ld), "y": (y.data_ptr(), ld), "positions": positions, **options}
    run([step("product", weight=ctypes.addressof(struct), **fields)])
    return y[:, :positions].T


def sealed(weight_OI: Tensor, places: int = 1, groups: int = 1) -> coded.Coded:
    code = coded.generate_dense(weight_OI, places, groups)
    assert code is not None
    found = coded.seal([code])
    assert found is not None
    return found[0]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sparsity", [0.0, 0.7, 0.95, 1.0])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (28, 64, 16), (29, 65, 17), (100, 300, 130), (60, 1300, 40), (900, 70, 300)]
)
def test_products_are_torchs(shape: tuple[int, int, int], sparsity: float, threads: int) -> None:
    rows, columns, positions = shape
    weight, x = pruned(torch.randn(rows, columns), sparsity), torch.randn(positions, columns)
    with threaded(threads):
        y = product(sealed(weight), x)
    wanted = x.double() @ weight.double().T
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5 * columns**0.5)


@pytest.mark.parametrize("columns", [20, 90, 1500])  # one strip, and several
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("act", ACTS)
def test_bias_residual_and_activation_come_in_their_order(act: str, last: int, apart: bool, columns: int) -> None:
    weight, x = pruned(torch.randn(40, columns), 0.8), torch.randn(50, columns)
    scale, bias, residual = torch.randn(40), torch.randn(40), torch.randn(50, 40)
    inner = (x @ weight.T) * scale.view(1, -1) + bias
    for beside in (None, residual):
        own = act if act in ("relu", "relu6") and not (beside is not None and last) else "none"
        for ends in (
            coded.Ends(apart=apart),
            coded.Ends(own, beside is not None and (not last or act == "none"), apart),
        ):
            if ends.act != "none" and beside is not None and not ends.residual:
                continue
            code = coded.generate(pack(weight, weight != 0), scale=scale, ends=ends)
            assert code is not None
            found = coded.seal([code])
            assert found is not None
            y = product(found[0], x, bias=bias, residual=beside, residual_last=last, act=act)
            if beside is None:
                wanted = ACTS[act](inner)
            else:
                wanted = ACTS[act](inner) + beside if last else ACTS[act](inner + beside)
            torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-3)


def test_code_that_does_something_else_is_refused() -> None:
    weight, x = pruned(torch.randn(40, 90), 0.8), torch.randn(50, 90)
    for ends, options in (
        (coded.Ends("relu"), {"act": "gelu"}),
        (coded.Ends("relu6"), {}),
        (coded.Ends(residual=True), {}),
        (coded.Ends(), {"scale": torch.ones(40)}),
    ):
        code = coded.generate_dense(weight, ends=ends)
        assert code is not None
        found = coded.seal([code])
        assert found is not None
        with pytest.raises(AssertionError):
            product(found[0], x, **options)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(20, 40, 3, padding=1),
        nn.Conv2d(6, 30, 7, stride=2, padding=3),
        nn.Conv2d(8, 60, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(5, 7, (1, 3), dilation=2),
        nn.Conv2d(16, 33, 1, stride=3),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])
def test_convolutions_are_torchs(conv: nn.Conv2d, batch: int) -> None:
    conv.weight.data = pruned(conv.weight.data, 0.8)
    x = torch.randn(batch, conv.in_channels, 13, 11)
    wanted = conv(x).detach()
    weight = sealed(conv.weight.data.movedim(1, -1).flatten(1), conv.weight[0, 0].numel(), conv.groups)
    struct, y = weight.weight(), torch.empty_like(wanted)
    sizes: dict[str, Any] = {"batch": batch, "channels": x.shape[1], "height": 13, "width": 11, "groups": conv.groups}
    sizes |= {"rows": conv.out_channels, "out_height": y.shape[2], "out_width": y.shape[3]}
    sizes |= {"x": (x.data_ptr(), 13 * 11), "y": (y.data_ptr(), y.shape[2] * y.shape[3])}
    sizes |= {
        "x_batch": x[0].numel(),
        "y_batch": y[0].numel(),
        "bias": conv.bias.data if conv.bias is not None else None,
    }
    how = {"kernel": conv.kernel_size, "stride": conv.stride, "pad": conv.padding, "dilation": conv.dilation}
    run([step("conv", weight=ctypes.addressof(struct), **sizes, **{key: list(value) for key, value in how.items()})])
    torch.testing.assert_close(y, wanted, rtol=1e-4, atol=1e-5)


def test_nan_and_infinity_make_all_results_of_their_position_nan() -> None:
    weight, x = pruned(torch.randn(40, 90), 0.9), torch.randn(50, 90)
    x[3, 7], x[20, 11] = float("nan"), float("inf")
    rest = [t for t in range(50) if t not in (3, 20)]
    for ends in (coded.Ends(), coded.Ends("relu", apart=True)):
        code = coded.generate_dense(weight, ends=ends)
        assert code is not None
        found = coded.seal([code])
        assert found is not None
        y = product(found[0], x, act=ends.act)
        assert y[[3, 20]].isnan().all()
        torch.testing.assert_close(y[rest], ACTS[ends.act](x[rest] @ weight.T), rtol=1e-4, atol=1e-4)


def test_weights_that_are_sealed_together_keep_to_themselves() -> None:
    weights = [pruned(torch.randn(30 + i, 70), 0.5) for i in range(5)]
    codes = [coded.generate(pack(weight, weight != 0)) for weight in weights]
    found = coded.seal([code for code in codes if code is not None])
    assert found is not None
    assert len({id(one.region) for one in found}) == 1
    x = torch.randn(33, 70)
    last, wanted = found[-1], weights[-1]
    for one, weight in zip(found, weights, strict=True):
        torch.testing.assert_close(product(one, x), x @ weight.T, rtol=1e-4, atol=1e-4)
    del found, one
    gc.collect()  # the code stays as long as one weight uses it
    torch.testing.assert_close(product(last, x), x @ wanted.T, rtol=1e-4, atol=1e-4)


def test_every_kept_weight_is_one_instruction() -> None:
    weight = pruned(torch.randn(56, 400), 0.8)
    code = coded.generate_dense(weight)
    assert code is not None
    kept = int((weight != 0).sum())
    assert code.values.shape == (kept,)
    assert torch.equal(code.values.sort().values, weight[weight != 0].sort().values)
    assert 7 * kept < code.code.numel() < 10 * kept
    assert code.nbytes <= coded.size_of(kept, 56, 400)


def test_a_system_that_allows_no_code_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.library(), "prunella_seal", lambda *_: None)
    assert not coded.available()
