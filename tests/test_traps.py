"""Networks that other tools have fallen over: each is pruned as it should be, or refused with the place."""

from __future__ import annotations

from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import prunella
from prunella import register_task
from prunella.layers import survey
from prunella.model.network import Model
from prunella.samples import Batch, Samples
from prunella.stream import Stream
from prunella.trees import tensors


class Whatever(nets.Sum):
    name = "any"

    def __init__(self) -> None:
        super().__init__({})

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
        return network(*batch.values())

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        return super().losses(tensors(outputs)[0], batch)


def model_of(network: nn.Module, *groups: Tensor) -> tuple[Model, Samples]:
    register_task("any")(Whatever)
    samples = Samples.of([{"x": x} for x in groups])
    task = Whatever()
    task.batch = samples.groups[0]
    return Model(nets.shaken(network), None, None, torch.device("cpu"), "test", task), samples


def pruned(network: nn.Module, *groups: Tensor, **recipe: Any) -> prunella.Report:
    model, samples = model_of(network, *groups)
    recipe = {"steps": ["wanda"], "evaluate": {"source": None}, "calibration": {"min_tokens": 1}, **recipe}
    return prunella.prune(model, recipe, calibration=samples)


def walked(network: nn.Module, *groups: Tensor) -> Model:
    """All blocks, one after the other, give what the network gives, to the last bit."""
    model, samples = model_of(network, *groups)
    stream = Stream(model, samples)
    for _, block in model.walk():
        stream.advance(block)
    for number, batch in enumerate(stream.batches):
        with torch.no_grad():
            whole = tensors(model.task.run(model.network, batch))
        assert all(torch.equal(a, b) for a, b in zip(tensors(stream.outputs(number)), whole, strict=True))
    return model


# ---------------------------------------------------------------------------------------------------------
# Weights that are used without their module, or by several


def encoder(layers: int = 3) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


@pytest.mark.parametrize("step", ["wanda", "sparsegpt"])
def test_an_attention_whose_output_projection_is_not_called_is_pruned_on_what_its_weight_meets(step: str) -> None:
    """torch's own attention hands the weights of all its projections to one function, and calls no module; and its
    encoder has a path of its own, which is one function for the whole layer."""
    torch.manual_seed(0)
    network, x = encoder(), torch.randn(6, 5, 16)
    report = pruned(network, x, steps=[step])
    names = [layer.name for layer in report.layers]
    for n in range(3):
        assert f"layers.{n}.self_attn.out_proj" in names
        assert f"layers.{n}.self_attn.in_proj_weight" in names
        assert f"layers.{n}.linear1" in names
    assert all(layer.tokens == 30 for layer in report.layers)
    for layer in report.layers:
        weight = network.get_parameter(layer.name if layer.name.endswith("_weight") else f"{layer.name}.weight")
        assert (weight == 0).float().mean() == 0.5
    assert walked(network, x).blocks == [f"layers.{n}" for n in range(3)]


def test_the_statistics_of_that_projection_are_those_of_what_it_meets() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = attention, nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.attention(x, x, x, need_weights=False)[0])
            return out

    x = torch.randn(6, 5, 16)
    seen: dict[str, Tensor] = {}

    @prunella.register("look", needs={"norm"})
    def look(layer: prunella.Layer) -> prunella.Layer:
        """Prune nothing in particular."""
        seen[layer.name] = layer.stats.norm_I.clone()
        return layer.pruned(layer.weight_OI, prunella.keep(layer.weight_OI.abs(), layer.sparsity, layer.pattern))

    network = Net()
    model, _ = model_of(network, x)
    parts = zip(attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    q, k, v = (torch.nn.functional.linear(x, weight, bias) for weight, bias in parts)
    heads = [t.view(6, 5, 2, 8).transpose(1, 2) for t in (q, k, v)]
    met = torch.nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(-1, 16).detach()
    recipe = {"steps": ["look"], "evaluate": {"source": None}, "calibration": {"min_tokens": 1}}
    prunella.prune(model, recipe, calibration=Samples.of({"x": x}))
    torch.testing.assert_close(seen["attention.out_proj"], met.square().mean(0).sqrt(), rtol=1e-4, atol=1e-4)


def test_a_head_that_several_scales_share_is_one_layer_and_still_shared() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
            self.head = nn.Conv2d(8, 4, 1)
            self.heads = nn.ModuleList([self.head, self.head])

        def forward(self, x: Tensor) -> list[Tensor]:
            fine = self.stem(x)
            return [head(y) for head, y in zip(self.heads, (fine, self.down(fine)), strict=True)]

    network = Net()
    report = pruned(network, torch.randn(4, 3, 8, 8))
    assert sorted(layer.name for layer in report.layers) == ["down", "head", "stem"]
    (head,) = [layer for layer in report.layers if layer.name == "head"]
    assert head.tokens == 4 * (64 + 16)  # what both scales show it
    assert network.heads[0] is network.heads[1] is network.head
    assert (network.head.weight == 0).float().mean() == 0.5


# ---------------------------------------------------------------------------------------------------------
# Convolutions by their kind


def test_one_output_channel_is_not_depthwise_and_transposed_ones_go_by_name() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),  # depthwise
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ConvTranspose2d(8, 8, 2, stride=2),
        nn.Conv2d(8, 1, 1),  # one output, of all channels
    )
    model, samples = model_of(network, torch.randn(4, 3, 8, 8))
    found, left = survey(model.network, "")
    assert [slot.name for slot in found] == ["0", "2.weight.0", "2.weight.1"]
    assert {item.name: item.why for item in left} == {
        "1.weight": "convolution",
        "3.weight": "transposed convolution",
        "4.weight": "a single input or output",
    }
    report = prunella.prune(model, {"steps": ["sparsegpt"], "evaluate": {"source": None}}, calibration=samples)
    assert report.sparsity > 0
    assert (network[3].weight != 0).all()


# ---------------------------------------------------------------------------------------------------------
# Networks of other builds


class UNet(nn.Module):
    """Down and up again, with what was before put beside."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.middle, self.up = nn.Conv2d(16, 16, 3, padding=1), nn.Upsample(scale_factor=2)
        self.last = nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.one(x).relu()
        coarse = self.middle(self.two(fine).relu()).relu()
        out: Tensor = self.last(torch.cat([self.up(coarse), fine], 1))
        return out


@pytest.mark.parametrize("order", ["auto", "layer"])
def test_a_network_with_a_detour_is_pruned_layer_by_layer(order: str) -> None:
    network, x = UNet(), torch.randn(4, 3, 8, 8)
    report = pruned(network, x, order=order, steps=["sparsegpt"])
    assert {layer.name for layer in report.layers} | set(report.model["outside"]) == {
        name if name in report.model["outside"] else name.removesuffix(".weight")
        for name, p in network.named_parameters()
        if p.ndim > 1
    }
    assert "one" in {layer.name for layer in report.layers}
    walked(network, x)


def test_checkpoints_of_activations_change_nothing() -> None:
    class Net(nn.Module):
        def __init__(self, keeps: bool) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
            self.keeps = keeps

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x) if self.keeps else checkpoint(layer, x, use_reentrant=False)
            return x

    x, found = torch.randn(6, 8), []
    for keeps in (True, False):
        torch.manual_seed(0)
        network = Net(keeps)
        assert walked(network, x).blocks == [f"layers.{n}" for n in range(4)]
        pruned(network, x, steps=["sparsegpt"])
        found.append([layer.weight.clone() for layer in network.layers])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_pictures_in_channels_last_are_the_same_pictures() -> None:
    x, found = torch.randn(4, 3, 8, 8), []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        network = network.to(memory_format=layout)
        given = x.to(memory_format=layout)
        walked(network, given)
        pruned(network, given, steps=["sparsegpt"])
        found.append([p.detach().contiguous() for p in network.parameters() if p.ndim > 1])
    for one, other in zip(*found, strict=True):
        assert ((one == 0) == (other == 0)).float().mean() > 0.98  # scores that nearly tie round otherwise
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(dtype: torch.dtype) -> None:
    network = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(3)), nn.Linear(16, 3))
    network = network.to(dtype)
    report = pruned(network, torch.randn(8, 5, 16).to(dtype), steps=["sparsegpt"])
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert {p.dtype for p in network.parameters()} == {dtype}


def test_a_head_of_several_modules_is_among_the_blocks_or_named() -> None:
    body = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    network = nn.Sequential(body, nn.Sequential(nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)))
    report = pruned(network, torch.randn(8, 16))
    layers = {layer.name for layer in report.layers}
    assert layers | {name.removesuffix(".weight") for name in report.model["outside"]} == {
        "0.0",
        "0.1",
        "0.2",
        "1.1",
        "1.3",
    }


# ---------------------------------------------------------------------------------------------------------
# What depends on the data


class Depends(nn.Module):
    """Leaves a layer out for some samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        skips = bool(x.flatten()[0] > 0)
        for number, layer in enumerate(self.layers):
            if number != 2 or not skips:
                x = layer(x)
        return x


def test_a_network_whose_way_depends_on_the_data_is_refused_with_the_place() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 8)
    x[:2, 0], x[2:, 0] = -1, 1
    network = Depends()
    model, samples = model_of(network, x)
    before = [p.clone() for p in network.parameters()]
    with pytest.raises(prunella.ModelError, match=r"Depends cannot be .* it calls block 3 in place of block 2"):
        prunella.prune(model, {"steps": ["wanda"], "evaluate": {"source": None}}, calibration=samples)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
