"""Convolutions are layers: their patches are what the convolution multiplies by, and every step prunes them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import nets
import pytest
import tiny
import torch
import zoo
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import prunella
from prunella import Layer, keep, register
from prunella.allocate import allocations
from prunella.layers import find_layers, survey
from prunella.lenses import Convolution, conv, fitting
from prunella.model.checks import check_plain
from prunella.packing import pack_model, unpack_model
from prunella.registry import steps
from prunella.samples import Samples
from prunella.tasks import register_task
from prunella.train.parts import Part, choose, make_group
from prunella.types import Stats
from prunella.watch import Watch, stats_of

CONVS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PICTURES = ("resnet", "efficientnet", "convnext")
BUILT_IN = sorted(name for name, step in steps.items() if step.function.__module__.startswith("prunella."))


def prune(network: nn.Module, samples: Samples, output: Path | None = None, **recipe: Any) -> prunella.Report:
    """Prune for a task whose loss is the mean square of what is put out."""

    @register_task("sum")
    class Sum(nets.Sum):
        def __init__(self) -> None:
            super().__init__(samples.groups[0])

    return prunella.prune(network, {"task": "sum", **recipe}, output=output, calibration=samples)


def rows_of(module: nn.Module, x: Tensor) -> dict[str, list[Tensor]]:
    """The inputs of a convolution's layers in a call, in chunks."""
    slots = {slot.name: slot for slot in find_layers(module, "conv")}
    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad(), Watch(slots, lambda name, rows, _: seen.__setitem__(name, list(rows()))):
        module(x)
    return seen


# ---------------------------------------------------------------------------------------------------------
# What a convolution multiplies by


@pytest.mark.parametrize("padding", [0, "valid", "same", 1, (2, 1, 3), "reflect", "circular"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_rows_times_matrices_are_what_the_convolution_makes(
    dims: int, padding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conv, "ROWS", 16)
    torch.manual_seed(0)
    mode = padding if padding in ("reflect", "circular") else "zeros"
    pads = 1 if mode != "zeros" else padding[:dims] if isinstance(padding, tuple) else padding
    kernels = [(1, 1, 1), (3, 3, 3), (2, 3, 1)]
    for kernel, stride, dilation, groups in itertools.product(kernels, [1, (2, 1, 3)], [1, (1, 2, 2)], [1, 2]):
        if padding == "same" and stride != 1:
            continue
        steps = stride[:dims] if isinstance(stride, tuple) else stride
        apart = dilation[:dims] if isinstance(dilation, tuple) else dilation
        module = CONVS[dims - 1](
            4, 6, kernel[:dims], steps, pads, apart, groups, padding_mode=mode, dtype=torch.float64
        )
        x = torch.randn(3, 4, *(9, 8, 7)[:dims], dtype=torch.float64)
        for given in (x, x[0]):
            expected = module(given) if given.ndim > dims + 1 else module(given)[None]
            slots = find_layers(module, "conv")
            assert [slot.part for slot in slots] == ([None] if groups == 1 else [0, 1])
            seen = rows_of(module, given)
            made = []
            for slot, bias in zip(slots, module.bias.view(groups, -1), strict=True):
                assert torch.equal(slot.bias(), bias)
                assert all(len(chunk) <= 16 or dims == 3 for chunk in seen[slot.name])
                made.append(torch.cat(seen[slot.name]) @ slot.read().T + bias)
            found = torch.cat(made, 1).view(len(expected), *expected.shape[2:], 6).movedim(-1, 1)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_stand_side_by_side_and_a_kernel_of_one_place_is_a_view(groups: int) -> None:
    module = nn.Conv2d(4, 6, (2, 3), groups=groups)
    for weight in (module.weight.detach(), module.weight.detach().to(memory_format=torch.channels_last)):
        lens = fitting(module, "weight")
        assert isinstance(lens, Convolution)
        matrices = lens.matrices(weight)
        assert matrices.shape == (groups, 6 // groups, 6 * 4 // groups)
        assert lens.channels(weight) == 4 // groups
        for o, c, i, j in itertools.product(range(6), range(4 // groups), range(2), range(3)):
            group, row = divmod(o, 6 // groups)
            assert matrices[group, row, (i * 3 + j) * (4 // groups) + c] == weight[o, c, i, j]
        assert torch.equal(lens.tensor(matrices, weight.shape), weight)
        other = weight.clone()
        lens.write(other, groups - 1, torch.zeros(6 // groups, matrices.shape[2]))
        assert torch.equal(other[: 6 - 6 // groups], weight[: 6 - 6 // groups])
        assert not other[6 - 6 // groups :].any()
    one = nn.Conv2d(4, 6, 1)
    (slot,) = find_layers(one, "conv")
    assert slot.read().data_ptr() == one.weight.data_ptr()


def test_statistics_take_a_chunk_at_a_time_and_keep_an_even_sample() -> None:
    torch.manual_seed(0)
    x_TI = torch.randn(1000, 5)
    chunks = x_TI.split(30)
    found = stats_of(lambda: iter(chunks), {"gram"}, 16)
    whole = Stats.of(x_TI, {"gram"})
    assert found.tokens == 1000
    torch.testing.assert_close(found["gram"], whole["gram"])
    assert found.sample_TI is not None
    places = [int((x_TI == row).all(1).nonzero()) for row in found.sample_TI]
    assert len(places) == 16
    assert len({b - a for a, b in itertools.pairwise(places)}) == 1  # evenly
    assert places[-1] > 450
    one = stats_of(lambda: iter((x_TI,)), {"norm"}, 16)
    assert torch.equal(one.sample_TI, x_TI[:: 1000 // 16][:16])  # type: ignore[arg-type]


def test_patches_are_never_held_all_at_once() -> None:
    module = nn.Conv2d(3, 8, 7, stride=2, padding=3)
    x = torch.randn(2, 3, 224, 224)
    chunks = rows_of(module, x)["conv"]
    assert sum(map(len, chunks)) == 2 * 112 * 112
    assert max(map(len, chunks)) <= conv.ROWS


def test_what_is_overwritten_before_it_was_seen_is_refused() -> None:
    module = nn.Conv2d(3, 8, 3)
    slots = {slot.name: slot for slot in find_layers(module, "conv")}
    x, kept = torch.randn(1, 3, 8, 8), []
    with torch.no_grad(), Watch(slots, lambda name, rows, _: kept.append(rows)):
        module(x)
    x.relu_()
    with pytest.raises(prunella.errors.DefectError, match="enters layer 'conv' is overwritten"):
        list(kept[0]())


# ---------------------------------------------------------------------------------------------------------
# Which are layers


def test_depthwise_and_transposed_ones_are_left_out_by_name() -> None:
    network = nn.ModuleDict(
        {
            "whole": nn.Conv2d(8, 8, 3),
            "gray": nn.Conv2d(1, 8, 3),
            "grouped": nn.Conv2d(8, 8, 3, groups=4),
            "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "several": nn.Conv2d(8, 16, 3, groups=8),
            "one": nn.Conv2d(8, 1, 3),
            "transposed": nn.ConvTranspose2d(8, 8, 3),
        }
    )
    slots, left = survey(network, "net")
    grouped = [f"net.grouped.weight.{part}" for part in range(4)]
    assert [slot.name for slot in slots] == ["net.whole", "net.gray", *grouped]
    assert {item.name.split(".")[1]: item.why for item in left} == {
        "depthwise": "convolution",
        "several": "convolution",
        "one": "a single input or output",
        "transposed": "transposed convolution",
    }


def test_lazy_ones_are_refused() -> None:
    with pytest.raises(prunella.ModelError, match=r"is lazy, '0\.weight' has no shape yet"):
        check_plain(nn.Sequential(nn.LazyConv2d(4, 3)))


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_those_of_language_models_stay_left_out(kind: str) -> None:
    model = nets.wrapped(tiny.build(kind), Samples.of({"input_ids": torch.ones(1, 8, dtype=torch.long)}))
    left = [item for name in model.blocks for item in survey(model.module(name), name)[1]]
    assert "convolution" in {item.why for item in left}
    assert not any("conv1d" in slot.name for name in model.blocks for slot in find_layers(model.module(name), name))


def test_a_pattern_that_does_not_divide_the_channels_is_refused() -> None:
    network = nn.Sequential(nn.Conv2d(6, 8, 2), nn.ReLU(), nn.Conv2d(8, 8, 2), nn.ReLU(), nn.Conv2d(8, 4, 2))
    samples = Samples.of({"input": torch.randn(2, 6, 8, 8)})
    with pytest.raises(prunella.InputError, match=r"2:4 does not divide layer '0': it has 6 channels.*--skip '0'"):
        prune(network, samples, steps=["magnitude"], pattern="2:4")
    prune(network, samples, steps=["magnitude"], pattern="2:4", skip=["0"])
    for weight in (network[2].weight, network[4].weight):
        assert ((weight.unflatten(1, (-1, 4)) != 0).sum(2) == 2).all()


# ---------------------------------------------------------------------------------------------------------
# Every step, pattern and allocation


def entering(network: nn.Module, names: list[str], run: Any) -> dict[str, list[Tensor]]:
    """What enters these modules."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        network.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name in names
    ]
    with torch.no_grad():
        run(network)
    for handle in handles:
        handle.remove()
    return seen


def chain() -> nn.Sequential:
    """Blocks of one convolution each, of all kinds."""
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, (3, 2), padding="same", dilation=2, groups=2),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3, padding=1, groups=16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 8, 1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", bias=False),
    )


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("step", BUILT_IN)
def test_every_step_reports_the_true_error(step: str, order: str, pattern: str) -> None:
    if (order == "layer" and not steps[step].per_layer) or (pattern == "2:4" and step == "besa"):
        pytest.skip("not what this step does")
    network, dense = chain(), chain()
    samples = Samples.of({"input": torch.randn(8, 4, 12, 12)})
    chosen = [step] if steps[step].prunes else ["wanda", step]
    report = prune(network, samples, steps=chosen, order=order, pattern=pattern)
    layers = {layer.name: layer for layer in report.layers}
    assert list(layers) == ["0", "2.weight.0", "2.weight.1", "6", "8"]
    assert [(item.name, item.why) for item in report.left_out] == [("4.weight", "convolution")]
    assert not report.notes()
    inputs = entering(network, ["0", "2", "6", "8"], lambda net: net(samples.groups[0]["input"]))
    for name in inputs if step != "align" else ["0"]:  # which aims at others than the dense weights
        module, before = network.get_submodule(name), dense.get_submodule(name)
        weight, old = module.weight.detach(), before.weight.detach()
        if step != "besa":  # which chooses sparsities within a block
            assert (weight == 0).float().mean() == pytest.approx(0.5, abs=0.01)
        if pattern == "2:4":
            assert ((weight.unflatten(1, (-1, 4)) != 0).sum(2) <= 2).all()
        with torch.no_grad():
            (x,) = inputs[name]
            lost = module._conv_forward(x, weight - old, None).chunk(module.groups, 1)
            whole = module._conv_forward(x, old, None).chunk(module.groups, 1)
        parts = [name] if name in layers else [f"{name}.weight.{part}" for part in range(module.groups)]
        for part, change, made in zip(parts, lost, whole, strict=True):
            error = (change.square().sum() / made.square().sum()).item()
            assert layers[part].error == pytest.approx(error, rel=1e-3), part


QUICK = {"magnitude", "sparsegpt", "update", "reconstruct"}


def many(names: Any) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("step", many(BUILT_IN))
@pytest.mark.parametrize("kind", PICTURES)
def test_every_step_prunes_a_network_of_pictures(kind: str, step: str, order: str) -> None:
    if order == "layer" and not steps[step].per_layer:
        pytest.skip("not what this step does")
    network: Any = nets.build(kind)
    samples = nets.samples_of(kind)
    samples = Samples(samples.groups[:1]) if order == "layer" else samples
    chosen = [step] if steps[step].prunes else ["wanda", step]
    report = prune(network, samples, steps=chosen, order=order, calibration={"min_tokens": 1})
    assert {item.why for item in report.left_out} <= {"convolution", "a single input or output"}
    assert report.sparsity > 0.4
    for layer in report.layers:
        assert layer.error is not None, layer.name
        if step != "besa":
            assert layer.sparsity == pytest.approx(0.5, abs=0.05), layer.name
    state = network.state_dict()
    zeros = {name: (state[name] == 0).sum().item() for name in state if state[name].ndim == 4}
    assert all(zeros[f"{la.name}.weight"] > 0 for la in report.layers if f"{la.name}.weight" in zeros)


@pytest.mark.parametrize("allocation", many(sorted(allocations)))
def test_every_allocation_spreads_over_convolutions(allocation: str) -> None:
    network: Any = nets.build("resnet")
    report = prune(
        network, nets.samples_of("resnet"), steps=["wanda"], allocate=allocation, calibration={"min_tokens": 1}
    )
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


def test_gradients_are_read_through_the_lens() -> None:
    network, dense = chain(), chain()
    samples = Samples.of({"input": torch.randn(3, 4, 12, 12)})
    found: dict[str, Tensor] = {}

    @register("read", needs={"fisher"})
    def read(layer: Layer) -> Layer:
        found[layer.name] = layer.stats["fisher"]
        return layer.pruned(layer.weight_OI, keep(layer.stats["fisher"], layer.sparsity, layer.pattern))

    prune(network, samples, steps=["read"], pattern="4x2")
    wanted = {slot.name: torch.zeros(slot.shape) for slot in find_layers(dense, "")}
    for batch in samples:
        dense.zero_grad()
        dense(**batch).square().mean().backward()
        for slot in find_layers(dense, ""):
            gradient = getattr(slot.module, slot.parameter).grad
            wanted[slot.name] += slot.read(gradient).square()
    assert found.keys() == wanted.keys()
    for name, fisher_OI in found.items():
        torch.testing.assert_close(fisher_OI, wanted[name], rtol=1e-3, atol=1e-9)
    blocks = (network[2].weight == 0).unflatten(0, (2, 2, 4)).unflatten(3, (2, 2))  # group, block, row, block, channel
    assert torch.equal(blocks.all(4).all(2), blocks.any(4).any(2))


def test_masks_are_laid_out_as_the_matrices(tmp_path: Path) -> None:
    network: Any = nets.build("resnet")
    report = prune(network, nets.samples_of("resnet"), tmp_path / "out", steps=["wanda"])
    masks = prunella.read_masks(tmp_path / "out")
    assert set(masks) == {layer.name for layer in report.layers if layer.sparsity}
    kernels = 0
    for name, mask_OI in masks.items():
        weight = network.get_submodule(name).weight
        outputs, channels, *kernel = weight.shape
        kernels += len(kernel)
        mask = mask_OI.view(outputs, *kernel, channels).movedim(-1, 1)
        assert not weight[~mask].any()
        assert weight[mask].all()
    assert kernels


def test_a_grouped_one_of_a_language_model_is_packed_and_runs_packed(tmp_path: Path, ids: Tensor) -> None:
    """Zaya has grouped convolutions, of heads."""
    zoo.build("zaya").save_pretrained(tmp_path / "m")
    prunella.prune(tmp_path / "m", {"steps": ["magnitude"]}, output=tmp_path / "p", calibration=ids)
    name = "model.layers.0.self_attn.qkv_proj.conv_qk_grouped.weight"
    assert f"{name}.5" in prunella.read_masks(tmp_path / "p")
    done = pack_model(str(tmp_path / "p"), tmp_path / "k")
    assert not done.expanded
    assert not any(layer.startswith(name) for layer in done.kept)
    unpack_model(str(tmp_path / "k"), tmp_path / "u")
    one, other = (
        {key: value for path in (tmp_path / folder).glob("*.safetensors") for key, value in load_file(path).items()}
        for folder in ("p", "u")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    masks, again = (prunella.read_masks(tmp_path / folder) for folder in ("p", "u"))
    assert masks.keys() == again.keys()
    assert all(torch.equal(masks[key], again[key]) for key in masks)
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(tmp_path / folder)(ids).logits for folder in ("p", "k")]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# Healing


@pytest.mark.parametrize("method", ["lora-prune", "mask-lora", "scale-lora"])
@pytest.mark.parametrize("groups", [1, 2])
def test_low_rank_changes_are_of_the_matrices(method: str, groups: int) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(8, 8, 3, groups=groups)
    lens = fitting(module, "weight")
    assert lens is not None
    value = module.weight.detach()
    mask = torch.rand(value.shape) > 0.5
    value *= mask
    part = Part("conv.weight", frozenset({"linear"}), value, mask, lens)
    ((chosen),) = choose([part], [make_group(method, {"rank": 2})])
    change: Any = chosen.change
    assert torch.equal(change(value), value)
    assert change.left.shape == (groups, 8 // groups, 2)
    assert change.right.shape == (groups, 2, 9 * 8 // groups)
    with torch.no_grad():
        change.left.normal_()
        change.right.normal_()
    made = change.eval()(value)
    assert made.is_contiguous()
    assert made.shape == value.shape
    assert not made[~mask].any()
    product = change.left @ change.right
    factor = product if method == "scale-lora" else change.scale * product
    for part_number in range(groups):
        old, new = lens.matrices(value)[part_number], lens.matrices(made)[part_number]
        kept = lens.matrices(mask)[part_number]
        wanted = old * factor[part_number] if method == "scale-lora" else old + factor[part_number] * kept
        torch.testing.assert_close(new, wanted, rtol=1e-4, atol=1e-6)


def test_an_adapter_has_no_place_for_them() -> None:
    module = nn.Conv2d(8, 8, 3)
    value = module.weight.detach()
    part = Part("conv.weight", frozenset({"linear"}), value, value > 0, fitting(module, "weight"))
    with pytest.raises(prunella.InputError, match=r"'conv\.weight' holds a convolution.*use mask-lora"):
        choose([part], [make_group("lora")])
