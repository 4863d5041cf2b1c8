from __future__ import annotations

import copy
import errno
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tiny
import torch
from torch import Tensor, nn

import prunella
from prunella import InputError, Layer, NumericalError, keep, make, register
from prunella.layers import Slot, find_layers, matches
from prunella.order import pick_order
from prunella.pattern import unpack
from prunella.registry import steps
from prunella.stream import Stream
from prunella.tasks.text import wrap_model
from prunella.unlabelled import through


def slots_of(model: prunella.Model, index: int, sparsity: float = 0.5) -> list[Slot]:
    name = model.blocks[index]
    return [replace(slot, sparsity=sparsity) for slot in find_layers(model.module(name), name)]


def prune_first_block(order: Any, step: str, ids: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """A pruned first block, and the masks that the stream chose."""
    model = wrap_model(tiny.build("llama"))
    result = Stream(model, ids, order=order).prune(model.at(0), slots_of(model, 0), [make(step)])
    shapes = {layer.name: layer.shape for layer in result.layers}
    return model, {name: unpack(bits, shapes[name]) for name, bits in result.masks.items()}


def inputs_of(network: Any, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    """What enters these layers, seen by ordinary hooks on the whole model."""
    seen: dict[str, Tensor] = {}
    handles = [
        network.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].flatten(0, 1))
        )
        for name in names
    ]
    with torch.no_grad():
        network(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def wanda_mask(weight_OI: Tensor, x_TI: Tensor) -> Tensor:
    return keep(weight_OI.abs() * x_TI.square().mean(0).sqrt(), 0.5, group="row")


def test_block_order_makes_statistics_from_the_dense_block() -> None:
    ids = tiny.token_windows(40, 64)  # two batches: the second pass stops early
    _, masks = prune_first_block("block", "wanda", ids)
    dense = tiny.build("llama")
    for name, x_TI in inputs_of(dense, ids, list(masks)).items():
        assert torch.equal(masks[name], wanda_mask(dense.get_submodule(name).weight, x_TI)), name


def test_layer_order_makes_statistics_from_what_each_layer_really_sees(ids: Tensor) -> None:
    _, masks = prune_first_block("layer", "wanda", ids)
    network = tiny.build("llama")
    for name in masks:  # in the order in which they are called
        layer = network.get_submodule(name)
        x_TI = inputs_of(network, ids, [name])[name]
        assert torch.equal(masks[name], wanda_mask(layer.weight, x_TI)), name
        layer.weight.data *= masks[name]


@pytest.mark.parametrize("order", ["block", "layer"])
def test_the_next_block_sees_the_pruned_block(order: Any, ids: Tensor) -> None:
    model = wrap_model(tiny.build("llama"))
    stream = Stream(model, ids, order=order)
    before = copy.deepcopy(model.network.state_dict())
    result = stream.prune(model.at(0), slots_of(model, 0), [make("sparsegpt")])
    assert all(torch.equal(value, before[key]) for key, value in model.network.state_dict().items())  # who keeps it?
    model.at(0).keep(result.changed)
    expected = inputs_of(model.network, ids, ["model.layers.1.input_layernorm"])["model.layers.1.input_layernorm"]
    assert torch.equal(torch.cat([stream.hidden[b] for b in range(len(stream.hidden))]).flatten(0, 1), expected)


@pytest.mark.parametrize("order", ["block", "layer"])
def test_every_token_is_counted_once(order: Any) -> None:
    ids = tiny.token_windows(40, 64)
    for architecture in ("llama", "gpt2", "mamba", "bloom"):
        report = prunella.prune(tiny.build(architecture), {"steps": ["wanda"], "order": order}, calibration=ids)
        assert {la.tokens for la in report.layers} == {ids.numel()}


@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize(("architecture", "inputs"), [("llama", 4), ("phi3", 4), ("gpt2", 4), ("opt", 4)])
def test_layers_fed_by_one_tensor_share_its_factorization(
    architecture: str, inputs: int, order: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    cholesky = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda *a, **k: calls.append(1) or cholesky(*a, **k))
    prunella.prune(tiny.build(architecture), {"steps": ["sparsegpt"], "order": order}, calibration=ids)
    assert len(calls) == 2 * inputs


def test_hidden_states_on_disk_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = tiny.token_windows(40, 64)
    expected = tiny.build("llama")
    prunella.prune(expected, {"steps": ["sparsegpt"], "order": "block"}, calibration=ids)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 10))
    network = tiny.build("llama")
    assert Stream(wrap_model(network), ids).hidden.shelf.on_disk
    prunella.prune(network, {"steps": ["sparsegpt"], "order": "block"}, calibration=ids)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_hidden_states_that_do_not_fit_lie_beside_the_output_and_claim_their_space(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ids: Tensor
) -> None:
    folders: list[Path] = []

    def watch(*arguments: Any, **options: Any) -> Any:
        folders.append(options["dir"])
        return NamedTemporaryFile(*arguments, **options)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 10))
    monkeypatch.setattr("prunella.hidden.NamedTemporaryFile", watch)
    recipe: dict[str, Any] = {"steps": ["wanda"], "order": "block", "evaluate": {"source": None}}
    prunella.prune(llama, recipe, output=tmp_path / "out", calibration=ids)
    assert set(folders) == {tmp_path / "out.partial"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.setattr("prunella.hidden.claim", full)
    with pytest.raises(InputError, match=r"no space left on the disk of '.*other\.partial'"):
        prunella.prune(llama, recipe, output=tmp_path / "other", calibration=ids)
    with pytest.raises(InputError, match=r"no space left on the disk of '.*hidden'"):  # no output: in the cache
        prunella.prune(tiny.build(), recipe, calibration=ids)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_recording_leaves_no_trace_on_the_blocks(ids: Tensor) -> None:
    model = wrap_model(tiny.build("llama"))
    through(model, ids, what="nothing")
    assert all("forward" not in vars(model.module(name)) for name in model.blocks)
    model.network.model.embed_tokens.weight.data[:] = float("nan")
    with pytest.raises(NumericalError):
        prunella.prune(model, {"steps": ["wanda"]}, calibration=ids)
    assert all("forward" not in vars(model.module(name)) for name in model.blocks)


@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(order: str, bad: float, ids: Tensor) -> None:
    network = tiny.build("llama")
    network.model.layers[1].mlp.up_proj.weight.data[3, 5] = bad
    with pytest.raises(NumericalError, match=r"'model\.layers\.1\.mlp\.up_proj' has NaN or infinite weights"):
        prunella.prune(network, {"steps": ["magnitude"], "order": order}, calibration=ids)


@pytest.mark.parametrize("order", ["block", "layer"])
def test_activations_that_are_not_finite_name_the_layer_they_enter(order: str, ids: Tensor) -> None:
    network = tiny.build("llama")
    network.model.layers[0].post_attention_layernorm.weight.data[2] = float("nan")
    with pytest.raises(NumericalError, match=r"inputs of layer 'model\.layers\.0\.mlp\.\w+_proj' hold NaN"):
        prunella.prune(network, {"steps": ["wanda"], "order": order}, calibration=ids)


def test_the_error_of_a_layer_is_measured_against_its_dense_weight(ids: Tensor) -> None:
    network = tiny.build("llama")
    report = prunella.prune(network, {"steps": ["magnitude"], "order": "block"}, calibration=ids)
    dense = tiny.build("llama")
    layer = report.layers[0]
    x_TI = inputs_of(dense, ids, [layer.name])[layer.name]
    before, after = (n.get_submodule(layer.name).weight for n in (dense, network))
    expected = ((x_TI @ (after - before).T).square().sum() / (x_TI @ before.T).square().sum()).item()
    assert layer.error == pytest.approx(expected, rel=1e-4)


def test_updating_the_survivors_lowers_the_error_of_nearly_every_layer(ids: Tensor) -> None:
    plain, updated = (
        prunella.prune(tiny.build("llama"), {"steps": s, "order": "block"}, calibration=ids)
        for s in (["wanda"], ["wanda", "sparsegpt"])
    )
    better = [b.error < a.error for a, b in zip(plain.layers, updated.layers, strict=True) if a.error and b.error]
    assert len(better) == 14
    assert sum(better) >= 12


# ---------------------------------------------------------------------------------------------------------
# Layers of a block


def names_of(architecture: str) -> set[str]:
    model = wrap_model(tiny.build(architecture))
    return {slot.name.removeprefix(b + ".") for b in model.blocks for slot in find_layers(model.module(b), b)}


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ("gpt2", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
        ("phi3", {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"}),
        ("mamba", {"mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"}),
        (
            "falcon",
            {"self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        ),
    ],
)
def test_the_linear_layers_of_a_block_are_found_and_nothing_else(architecture: str, expected: set[str]) -> None:
    assert names_of(architecture) == expected


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_routers_norms_convolutions_and_embeddings_are_left_out(architecture: str) -> None:
    for name in names_of(architecture):
        assert not any(word in name for word in ("norm", "conv1d", "router", "embed", "lm_head")), name
        assert not name.endswith(".gate")


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_oss", "mixtral", "llama"])
def test_a_slot_shows_the_weight_as_outputs_by_inputs_in_the_networks_memory(architecture: str) -> None:
    model = wrap_model(tiny.build(architecture))
    name = model.blocks[0]
    for slot in find_layers(model.module(name), name):
        weight_OI = slot.read()
        assert tuple(weight_OI.shape) == slot.shape
        weight_OI[0, 1] = 123
        if slot.part is None:
            parameter = model.network.get_parameter(f"{slot.name}.weight")
        else:
            parameter = model.network.get_parameter(slot.name.rpartition(".")[0])[slot.part]
        assert (parameter[1, 0] if slot.lens.transposed else parameter[0, 1]) == 123
        bias = slot.bias()
        assert bias is None or bias.shape == (slot.shape[0],)


@pytest.mark.parametrize(
    ("glob", "yes"),
    [
        ("*", True),
        ("down_proj", True),
        ("mlp.down_proj", True),
        ("mlp", True),
        ("*down_proj", True),
        ("model.layers.1.*", True),
        ("model.layers.1", True),
        ("layers.1", True),
        ("layers.?.mlp.*", True),
        ("own_proj", False),
        ("up_proj", False),
        ("layers.11", False),
        ("DOWN_PROJ", False),
    ],
)
def test_a_name_pattern_matches_whole_parts_of_a_name(glob: str, yes: bool) -> None:
    assert matches("model.layers.1.mlp.down_proj", glob) is yes


# ---------------------------------------------------------------------------------------------------------
# Which order


def test_auto_takes_layer_order_by_sizes_alone(ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap_model(tiny.build("llama"))
    assert pick_order("auto", [make("wanda")], ids, model) == "layer"
    assert pick_order("auto", [make("magnitude")], ids, model) == "block"
    assert pick_order("layer", [make("magnitude")], ids, model) == "layer"
    many = torch.zeros(1, 1, dtype=torch.int64).expand(1 << 14, 1 << 10)
    assert pick_order("auto", [make("wanda")], many, model) == "block"
    assert pick_order("layer", [make("wanda")], many, model) == "layer"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 10))
    assert pick_order("auto", [make("wanda")], ids, model) == "layer"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 50))
    assert pick_order("auto", [make("wanda")], many, model) == "block"


def test_the_built_in_model_is_pruned_in_layer_order_on_the_default_windows_and_on_128() -> None:
    """Its figures in the log were made so."""
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    network = tiny.build("llama", num_hidden_layers=1, head_dim=64, dtype=torch.bfloat16, **sizes)
    windows_NL = torch.zeros(1, 1, dtype=torch.int64).expand(128, 2048)
    for names in (["sparsegpt"], ["wanda"], ["align", "wanda", "update"]):
        assert pick_order("auto", [make(name) for name in names], windows_NL, wrap_model(network)) == "layer"


def test_a_layer_that_is_used_is_visited_once_in_its_order_of_use(ids: Tensor) -> None:
    visited: list[str] = []

    @register("visitor", needs={"norm"})
    def visitor(layer: Layer) -> Layer:
        """Write down who comes."""
        visited.append(layer.name)
        return layer.pruned(layer.weight_OI, keep(layer.weight_OI.abs(), layer.sparsity))

    try:
        prunella.prune(tiny.build("llama"), {"steps": ["visitor"], "order": "layer"}, calibration=ids)
    finally:
        del steps["visitor"]
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert [name.rpartition(".")[2] for name in visited] == [*parts, *parts]


def test_blocks_that_are_not_called_one_after_the_other_are_refused(ids: Tensor) -> None:
    network = tiny.build("llama")
    network.model.config.num_hidden_layers = 1  # the model calls only the first
    model = wrap_model(network)
    with pytest.raises(prunella.ModelError, match="has 2 blocks but called 1"):
        Stream(model, ids)


def test_a_layer_in_use_elsewhere_keeps_its_module(ids: Tensor) -> None:
    """Pruning writes into the parameters and replaces neither them nor their modules."""
    network = tiny.build("gpt2")
    before = {name: (id(module), [id(p) for p in module.parameters()]) for name, module in network.named_modules()}
    prunella.prune(network, {"steps": ["sparsegpt"]}, calibration=ids)
    after = {name: (id(module), [id(p) for p in module.parameters()]) for name, module in network.named_modules()}
    assert after == before
    assert isinstance(network.lm_head, nn.Linear)


def test_layer_order_with_a_step_on_whole_blocks_is_refused() -> None:
    whole = prunella.Step("whole", frozenset(), lambda block: block, per_layer=False, prunes=True, options={})
    with pytest.raises(InputError, match="step 'whole' works on whole blocks: use --order block"):
        pick_order("layer", [whole], tiny.token_windows(), wrap_model(tiny.build()))
