"""2:4 weights on sparse tensor cores. Without a GPU a dense tensor stands in for the compressed one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from prunella.sparse import semi
from prunella.sparse.format import pack
from prunella.sparse.linear import SparseLinear


def layer(pattern: str = "2:4", dtype: torch.dtype = torch.bfloat16, bits: int | None = None) -> SparseLinear:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(64, 128, generator=generator).to(dtype)
    order = torch.rand(64, 32, 4, generator=generator).argsort(-1).argsort(-1)
    mask_OI = (order < 2).view(64, 128) if pattern == "2:4" else torch.rand(64, 128, generator=generator) < 0.5
    return SparseLinear(pack(weight_OI * mask_OI, mask_OI, bits), nn.Parameter(torch.ones(64, dtype=dtype)))


class Stand(torch.Tensor):
    """A dense tensor with the one method of a compressed one that is counted with."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data"], None


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi, "_compress", lambda weight: (2 * weight).as_subclass(Stand))  # to tell them apart


def test_only_weights_of_16_bits_that_are_two_of_four_are_taken() -> None:
    assert semi.is_two_of_four(layer())
    assert semi.is_two_of_four(layer(dtype=torch.float16))
    assert not semi.is_two_of_four(layer("unstructured"))
    assert not semi.is_two_of_four(layer(dtype=torch.float32))
    assert not semi.is_two_of_four(layer(bits=8))


@pytest.mark.usefixtures("compressed")
def test_many_tokens_take_the_copy_and_few_the_packed_weight() -> None:
    model = nn.Sequential(layer(), layer("unstructured"))
    before = dict(model.state_dict())
    assert semi.add_semi_structured(model) == 64 * 128 * 2
    assert semi.add_semi_structured(model) == 0  # it is there already
    assert model.state_dict().keys() == before.keys()
    few, many = torch.randn(2, 3, 128).bfloat16(), torch.randn(4, semi.MANY, 128).bfloat16()
    weight_OI = model[0].weight
    with torch.no_grad():
        assert torch.allclose(model[0](few).float(), (few @ weight_OI.T + 1).float(), atol=0.2)
        assert torch.allclose(model[0](many).float(), (many @ (2 * weight_OI).T + 1).float(), atol=0.4)


@pytest.mark.usefixtures("compressed")
def test_the_copy_goes_when_the_module_moves() -> None:
    module: Any = layer()
    semi.add_semi_structured(nn.Sequential(module))
    assert type(module) is semi.SemiStructuredLinear
    module.to(torch.float16)
    assert type(module) is SparseLinear
    assert not hasattr(module, "copy")
    assert module.weight_values.dtype == torch.float16


def test_where_no_gpu_is_nothing_happens() -> None:
    module = layer()
    assert semi.add_semi_structured(nn.Sequential(module)) == 0
    assert type(module) is SparseLinear


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_copy_multiplies_as_the_weight_does() -> None:
    module = layer().cuda()
    x = torch.randn(100, 128, device="cuda").bfloat16()
    with torch.no_grad():
        wanted = module(x).double()
        if not semi.add_semi_structured(nn.Sequential(module)):
            pytest.skip("this GPU has no sparse tensor cores that torch can use")
        assert (module(x).double() - wanted).norm() / wanted.norm() < 8e-3
