"""Each step in C against torch: odd sizes, every instruction set, one thread and two, NaN.

Around and between the values lies NaN, which no result may see; beside them lies memory that no step may write."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from prunella.sparse import kernels
from prunella.sparse.steps import ACTS, DTYPES, STRUCTURES, run, step

pytestmark = pytest.mark.skipif(not kernels.instructions(), reason="no C kernels")
NAN, GUARD = float("nan"), 12345.0
NAMED = {
    "none": lambda x: x,
    "relu": functional.relu,
    "relu6": functional.relu6,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "tanh": torch.tanh,
}


@pytest.fixture(params=itertools.product(kernels.instructions(), (1, 2)), ids=lambda p: f"{p[0]}-{p[1]}")
def threads(request: Any) -> Iterator[int]:
    name, count = request.param
    kernels.use(name)
    torch.manual_seed(0)
    yield count
    kernels.use(None)
    ALIVE.clear()


ALIVE: list[Any] = []  # what steps have the addresses of


class Value:
    """Channel-major memory of a tensor (channels, …), with NaN behind its positions and a guard on either side."""

    def __init__(self, *shape: int):
        self.shape = shape
        positions = torch.Size(shape[1:]).numel()
        self.ld = -(-positions // 16) * 16 + 16
        self.memory = torch.full((shape[0] + 2, self.ld), NAN)
        self.memory[[0, -1]] = GUARD
        self.rows = self.memory[1:-1]
        self.place = (self.rows.data_ptr(), self.ld)
        ALIVE.append(self)

    @classmethod
    def of(cls, x: Tensor) -> Value:
        made = cls(*x.shape)
        made.memory[[0, -1]] = NAN
        made.rows[:, : x[0].numel()] = x.flatten(1)
        return made

    def get(self) -> Tensor:
        assert (self.memory[[0, -1]] == GUARD).all(), "written beside the value"
        return self.rows[:, : torch.Size(self.shape[1:]).numel()].reshape(self.shape)


def close(found: Tensor, wanted: Tensor, rtol: float = 1e-6, atol: float = 2e-6) -> None:
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=rtol, atol=atol, equal_nan=True)


# ---------------------------------------------------------------------------------------------------------
# Maps


@pytest.mark.parametrize("act", ACTS)
def test_map(threads: int, act: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 401), torch.tensor([0.0, NAN, 1e-20, -1e-3, 88.0, -88.0, 1e4, -1e4])])
    if act not in ("silu", "gelu", "gelu_tanh", "hardswish", "none"):  # which have infinity times 0
        x = torch.cat([x, torch.tensor([float("inf"), float("-inf")])])
    y = Value(1, len(x))
    run([step("map", x=Value.of(x[None]).place, y=y.place, act=act, channels=1, positions=len(x))], threads)
    wanted = NAMED[act](x[None].double())
    close(y.get(), wanted, atol=1e-7 if act != "gelu" else 1.5e-6)
    x = torch.randn(700, 67)
    y = Value(700, 67)
    run([step("map", x=Value.of(x).place, y=y.place, act=act, channels=700, positions=67)], threads)
    close(y.get(), NAMED[act](x), atol=2e-6)


@pytest.mark.parametrize(("positions", "period"), [(1, 1), (35, 35), (60, 20), (60, 1), (21, 7)])
@pytest.mark.parametrize("times", [0, 1])
def test_add(threads: int, positions: int, period: int, times: int) -> None:
    a, b = torch.randn(300, positions), torch.randn(300, period)
    a[0, 0] = NAN
    repeated = b.repeat(1, positions // period)
    wanted = functional.silu(a * repeated if times else a + repeated)
    for inside in (False, True):
        x, y = Value.of(a), Value(300, positions)
        if inside:
            x.memory[[0, -1]] = GUARD
            y = x
        made = step("add", a=x.place, b=Value.of(b).place, y=y.place, act="silu", channels=300, positions=positions,
                    b_positions=period, times=times)  # fmt: skip
        run([made], threads)
        close(y.get(), wanted)


@pytest.mark.parametrize(("batch", "places"), [(1, 1), (1, 49), (3, 50), (2, 200)])
def test_mean_and_scale(threads: int, batch: int, places: int) -> None:
    x, scale = torch.randn(150, batch, places), torch.randn(150, batch)
    x[3, 0, 0] = NAN
    sizes = {"channels": 150, "batch": batch, "places": places}
    y, z = Value(150, batch), Value(150, batch, places)
    there = Value.of(x)
    run([
        step("mean", x=there.place, y=y.place, act="relu", **sizes),
        step("scale", x=there.place, scale=Value.of(scale).place, y=z.place, act="hardswish", **sizes),
    ], threads)  # fmt: skip
    close(y.get(), functional.relu(x.mean(2)))
    close(z.get(), functional.hardswish(x * scale[..., None]))


# ---------------------------------------------------------------------------------------------------------
# Norms


@pytest.mark.parametrize(("channels", "positions"), [(1, 3), (37, 1), (96, 130), (384, 33)])
@pytest.mark.parametrize("rms", [0, 1])
@pytest.mark.parametrize("residual", [False, True])
def test_norm(threads: int, channels: int, positions: int, rms: int, residual: bool) -> None:
    x, r = torch.randn(channels, positions) + 100, torch.randn(channels, positions)
    x[0, 0] = NAN
    weight, bias = torch.randn(channels), torch.randn(channels)
    parts = {"weight": weight} if rms else {"weight": weight, "bias": bias}
    y = Value(channels, positions)
    made = step("norm", x=Value.of(x).place, y=y.place, channels=channels, positions=positions, rms=rms, eps=1e-5,
                **parts, **({"residual": Value.of(r).place} if residual else {}))  # fmt: skip
    run([made], threads)
    both = ((x + r) if residual else x).double()
    if rms:
        wanted = both / (both.square().mean(0) + 1e-5).sqrt() * weight[:, None]
    else:
        wanted = functional.layer_norm(both.T, (channels,), weight.double(), bias.double(), 1e-5).T
    close(y.get(), wanted, rtol=1e-5, atol=2e-5)


def test_norm_in_place(threads: int) -> None:
    x, r = torch.randn(40, 77), torch.randn(40, 77)
    y = Value.of(x)
    other = Value.of(r)
    other.memory[[0, -1]] = GUARD
    run([step("norm", x=y.place, y=other.place, residual=other.place, channels=40, positions=77, eps=1e-6)], threads)
    close(other.get(), functional.layer_norm((x + r).T, (40,), eps=1e-6).T, atol=2e-6)


# ---------------------------------------------------------------------------------------------------------
# Windows

# batch, channels, filters to a channel, height, width, kernel, stride, pad, dilation
DEPTHWISE = [
    (1, 5, 1, 112, 112, (3, 3), (1, 1), (1, 1), (1, 1)),
    (2, 3, 1, 113, 111, (3, 3), (2, 2), (1, 1), (1, 1)),
    (2, 4, 1, 56, 56, (5, 5), (2, 2), (2, 2), (1, 1)),
    (1, 70, 1, 7, 7, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 70, 1, 7, 7, (5, 5), (1, 1), (2, 2), (1, 1)),
    (2, 70, 1, 14, 14, (5, 5), (2, 2), (2, 2), (1, 1)),
    (16, 30, 1, 14, 14, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 9, 1, 14, 14, (7, 7), (1, 1), (3, 3), (1, 1)),
    (3, 31, 1, 3, 3, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 31, 2, 2, 5, (3, 3), (1, 1), (1, 1), (1, 1)),
    (5, 33, 1, 1, 1, (5, 5), (1, 1), (2, 2), (1, 1)),
    (2, 3, 3, 28, 29, (3, 5), (1, 2), (0, 2), (1, 1)),
    (2, 3, 1, 30, 40, (3, 3), (1, 1), (2, 2), (2, 2)),
    (2, 3, 1, 30, 40, (3, 3), (3, 3), (1, 1), (1, 2)),
    (2, 3, 1, 31, 30, (4, 4), (4, 4), (0, 0), (1, 1)),
    (1, 2, 1, 20, 300, (3, 3), (2, 2), (0, 1), (1, 1)),
    (1, 4, 1, 1, 90, (1, 9), (1, 1), (0, 4), (1, 1)),
    (2, 4, 1, 21, 21, (3, 3), (1, 1), (3, 4), (1, 1)),
    (2, 40, 1, 5, 5, (2, 2), (1, 1), (0, 0), (1, 1)),
]


def windows(x: Tensor, y: tuple[int, int], kernel: Any, stride: Any, pad: Any, dilation: Any) -> dict[str, Any]:
    return {"channels": x.shape[1], "batch": x.shape[0], "height": x.shape[2], "width": x.shape[3], "out_height": y[0],
            "out_width": y[1], "kernel": kernel, "stride": stride, "pad": pad, "dilation": dilation}  # fmt: skip


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise(threads: int, case: Any) -> None:
    batch, channels, share, height, width, kernel, stride, pad, dilation = case
    x = torch.randn(batch, channels, height, width)
    x[-1, -1, height // 2, width // 2] = NAN
    weight, bias = torch.randn(channels * share, 1, *kernel), torch.randn(channels * share)
    plain = functional.conv2d(x, weight, bias, stride, pad, dilation, groups=channels)
    rest = torch.randn_like(plain)
    about = windows(x, plain.shape[2:], kernel, stride, pad, dilation)
    for act, residual, last in (("relu6", False, 0), ("silu", True, 0), ("none", True, 1), ("hardswish", True, 1)):
        y = Value(channels * share, batch, *plain.shape[2:])
        parts = {"residual": Value.of(rest.transpose(0, 1)).place, "residual_last": last} if residual else {}
        made = step("depthwise", x=Value.of(x.transpose(0, 1)).place, y=y.place, weight=weight, bias=bias, act=act,
                    rows=channels * share, **about, **parts)  # fmt: skip
        run([made], threads)
        wanted = NAMED[act](plain + rest if residual and not last else plain)
        close(y.get(), (wanted + rest if last else wanted).transpose(0, 1), rtol=1e-5, atol=1e-5)


# batch, channels, height, width, kernel, stride, pad, dilation (of the largest only)
POOLS = [
    (2, 5, 112, 112, (3, 3), (2, 2), (1, 1), (1, 1)),
    (3, 50, 7, 7, (2, 2), (2, 2), (0, 0), (1, 1)),
    (3, 50, 7, 6, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 3, 35, 37, (5, 3), (2, 3), (2, 1), (1, 1)),
    (2, 3, 35, 37, (3, 3), (1, 2), (1, 1), (2, 3)),
    (1, 3, 9, 9, (7, 7), (1, 1), (0, 0), (1, 1)),
]


@pytest.mark.parametrize("case", POOLS, ids=str)
@pytest.mark.parametrize("ceil", [False, True])
def test_pool(threads: int, case: Any, ceil: bool) -> None:
    batch, channels, height, width, kernel, stride, pad, dilation = case
    x = torch.randn(batch, channels, height, width) - 3
    x[0, 0, 0, 0] = x[-1, -1, -1, -1] = x[0, 1, 4, 4] = NAN
    x[0, 2, 4, 4] = float("-inf")
    wanted = {
        (0, 0): functional.max_pool2d(x, kernel, stride, pad, dilation, ceil),
        (1, 0): functional.avg_pool2d(x, kernel, stride, pad, ceil, count_include_pad=False),
        (1, 1): functional.avg_pool2d(x, kernel, stride, pad, ceil, count_include_pad=True),
    }
    for (mean, count_pad), out in wanted.items():
        y = Value(channels, batch, *out.shape[2:])
        about = windows(x, out.shape[2:], kernel, stride, pad, (1, 1) if mean else dilation)
        made = step("pool", x=Value.of(x.transpose(0, 1)).place, y=y.place, act="none", mean=mean, count_pad=count_pad,
                    **about)  # fmt: skip
        run([made], threads)
        close(y.get(), out.transpose(0, 1), rtol=1e-6 if mean else 0, atol=2e-6 if mean else 0)


# ---------------------------------------------------------------------------------------------------------
# Attention

# batch, heads, heads of keys, dim, dim of values, queries, keys
ATTEND = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 32, 32, 128, 128),
    (2, 4, 2, 17, 9, 33, 70),
    (1, 2, 1, 64, 64, 200, 3),
    (3, 2, 2, 8, 21, 7, 149),
    (1, 2, 2, 16, 16, 65, 65),
]


def spread(x: Tensor) -> Tensor:
    """(batch, heads, positions, dim) -> (heads dim, batch positions)."""
    return x.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("case", ATTEND, ids=str)
@pytest.mark.parametrize("masks", ["none", "causal", "keys", "queries", "boolean", "each", "turned"])
def test_attend(threads: int, case: Any, masks: str) -> None:
    batch, heads, kv_heads, dim, dim_v, queries, keys = case
    q, k = torch.randn(batch, heads, queries, dim), torch.randn(batch, kv_heads, keys, dim)
    v = torch.randn(batch, kv_heads, keys, dim_v)
    scale = 0.7 * dim**-0.5
    mask: Tensor | None = None
    if masks == "keys":  # what transformers adds for texts of other lengths
        mask = torch.zeros(batch, 1, 1, keys).masked_fill(torch.rand(batch, 1, 1, keys) < 0.3, torch.finfo().min)
    elif masks == "queries":
        mask = torch.randn(batch, 1, queries, 1)
    elif masks == "turned":  # its queries follow one another
        mask = torch.randn(batch, 1, keys, queries).transpose(2, 3)
    elif masks == "boolean":
        mask = torch.rand(1, 1, queries, keys) < 0.6
        mask[:, :, queries // 2] = False  # sees nothing
    elif masks == "each":
        mask = torch.randn(batch, heads, queries, keys).masked_fill(
            torch.rand(batch, heads, queries, keys) < 0.2, -1e30
        )
    parts: dict[str, Any] = {"causal": int(masks == "causal")}
    if mask is not None:
        strides = [0 if n == 1 else stride for n, stride in zip(mask.shape, mask.stride(), strict=True)]
        parts |= {"mask": mask.data_ptr(), "mask_stride": strides, "mask_boolean": int(mask.dtype == torch.bool)}
    y = Value(heads * dim_v, batch * queries)
    values = {name: Value.of(spread(x)) for name, x in (("q", q), ("k", k), ("v", v))}
    sizes = {"batch": batch, "heads": heads, "kv_heads": kv_heads, "dim": dim, "dim_v": dim_v, "queries": queries}
    about = {name: value.place for name, value in values.items()} | sizes | {"keys": keys, "scale": scale}
    run([step("attend", y=y.place, **about, **parts)], threads)
    wide = [x.double() for x in (q, k, v)]
    wanted = functional.scaled_dot_product_attention(
        *wide, mask if mask is None or mask.dtype == torch.bool else mask.double(), is_causal=masks == "causal",
        scale=scale, enable_gqa=True,
    )  # fmt: skip
    close(y.get(), spread(wanted), rtol=1e-5, atol=2e-6)
    run([step("attend", y=y.place, **about, **parts, empty_nan=1)], threads)
    scores = wide[0] @ wide[1].repeat_interleave(heads // kv_heads, 1).transpose(2, 3) * scale
    if masks == "causal":
        scores = scores.masked_fill(torch.ones(queries, keys).tril() == 0, float("-inf"))
    elif masks == "boolean":
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask.double()
    wanted = scores.softmax(3) @ wide[2].repeat_interleave(heads // kv_heads, 1)
    close(y.get(), spread(wanted), rtol=1e-5, atol=2e-6)


def test_attend_nan(threads: int) -> None:
    """A query, a key or a value that is NaN, and scores that are infinite."""
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    q[0, 0, 3, 1] = k[0, 1, 39, 2] = v[0, 0, 7, 3] = NAN
    q[0, 0, 5, 0], k[0, 0, :, 0] = float("inf"), 1.0
    y = Value(16, 40)
    sizes = {"batch": 1, "heads": 2, "kv_heads": 2, "dim": 8, "dim_v": 8, "queries": 40, "keys": 40, "scale": 1.0}
    values = {name: Value.of(spread(x)) for name, x in (("q", q), ("k", k), ("v", v))}
    run([step("attend", y=y.place, **{name: value.place for name, value in values.items()}, **sizes)], threads)
    wanted = (q @ k.transpose(2, 3)).softmax(3) @ v
    close(y.get(), spread(wanted), rtol=1e-5, atol=2e-6)


# ---------------------------------------------------------------------------------------------------------
# Packing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("positions", "channels"), [(1, 1), (5, 70), (130, 33), (64, 384)])
def test_pack_and_unpack(threads: int, dtype: torch.dtype, positions: int, channels: int) -> None:
    wide = torch.randn(positions, channels + 3).to(dtype)
    wide[0, 0] = NAN
    x = wide[:, :channels]
    y = Value(channels, positions)
    about = {"channels": channels, "positions": positions, "dtype": dtype}
    run([step("pack", x=wide.data_ptr(), x_stride=channels + 3, y=y.place, **about)], threads)
    assert torch.equal(y.get().nan_to_num(9), x.float().T.nan_to_num(9))
    y.rows[:, :positions] *= 1.37
    out = torch.full((positions, channels + 3), GUARD, dtype=dtype)
    run([step("unpack", x=y.place, y=out.data_ptr(), y_stride=channels + 3, **about)], threads)
    close(out[:, :channels], y.get().T.to(dtype), rtol=0, atol=0)
    assert (out[:, channels:] == out.new_tensor(GUARD)).all()


# ---------------------------------------------------------------------------------------------------------
# Structures


def test_structures_are_those_of_the_header() -> None:
    """Every field of steps.h, in its order."""
    import re
    from pathlib import Path

    import prunella

    header = (Path(prunella.__file__).parent / "sparse/csrc/steps.h").read_text()
    header = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    kinds = [name.lower() for name in re.findall(r"STEP_(\w+),", header)]
    assert kinds == list(STRUCTURES)
    assert [name.lower() for name in re.findall(r"ACT_(\w+),", header)] == list(ACTS)
    for kind in kinds:
        body = re.search(r"typedef struct \{([^}]*)\} " + kind + "_step_t;", header)
        assert body is not None, kind
        names = re.findall(r"(\w+)(?:\[\d\])?[,;]", body[1])
        assert names == [name for name, _ in STRUCTURES[kind]._fields_]


def test_sizes_that_do_not_fit_are_refused() -> None:
    x = Value(4, 20).place
    about = {"x": x, "y": x, "channels": 4, "positions": 20}
    with pytest.raises(ValueError, match="positions is 0"):
        step("map", **{**about, "positions": 0})
    with pytest.raises(ValueError, match="too small an ld"):
        step("map", **{**about, "y": (x[0], 16)})
    with pytest.raises(ValueError, match="weight of another size"):
        step("norm", **about, weight=torch.ones(5), eps=1e-5)
    with pytest.raises(ValueError, match="not contiguous"):
        step("norm", **about, weight=torch.ones(4, 2)[:, 0], eps=1e-5)
    with pytest.raises(ValueError, match="do not repeat"):
        step("add", a=x, b=x, y=x, channels=4, positions=20, b_positions=3)
