from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import zoo
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import prunella
from prunella.errors import DefectError
from prunella.layers import NO_PRODUCT, UNSEEN, find_layers, survey
from prunella.products import products
from prunella.tasks.text import wrap_model
from prunella.watch import Watch

# Weights that are kept in other ways than as linear layers, and routers that own some.
ODD: dict[str, dict[str, Any]] = {
    "llama4_text": {"intermediate_size": 24, "intermediate_size_mlp": 64, "num_experts_per_tok": 1},
    "dbrx": {},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16},
    "jetmoe": {},
    "hunyuan_v1_moe": {},
    "gemma4_text": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    "zaya": {"router_hidden_size": 16},
    "longcat_flash": {"expert_ffn_hidden_size": 16, "zero_expert_num": 2},
    "xlstm": {},
}


@functools.cache
def _built(architecture: str) -> Any:
    return zoo.build(architecture, **ODD[architecture])


def build(architecture: str) -> Any:
    return copy.deepcopy(_built(architecture))


def names_in(network: Any) -> tuple[set[str], dict[str, str]]:
    """Of the first two blocks: layers, and what is left out with the reason."""
    model = wrap_model(network)
    layers: set[str] = set()
    left: dict[str, str] = {}
    for block in model.blocks[:2]:
        slots, others = survey(model.module(block), block)
        layers |= {slot.name.removeprefix(block + ".") for slot in slots}
        left |= {item.name.removeprefix(block + "."): item.why for item in others}
    return layers, left


@pytest.mark.parametrize("architecture", ODD)
def test_every_matrix_of_a_block_is_a_layer_or_left_out_with_a_reason(architecture: str) -> None:
    network = build(architecture)
    model = wrap_model(network)
    for block in model.blocks:
        slots, left = survey(model.module(block), block)
        named = {name for name, p in network.named_parameters() if name.startswith(block + ".") and p.ndim > 1}
        assert {slot.key for slot in slots} | {item.name for item in left} == named
        assert not {slot.key for slot in slots} & {item.name for item in left}
        assert all(item.why and item.why != UNSEEN for item in left)
        sizes = {slot.key: 0 for slot in slots}
        for slot in slots:
            sizes[slot.key] += slot.read().numel()
        assert all(network.get_parameter(name).numel() == size for name, size in sizes.items())


@pytest.mark.parametrize(
    ("architecture", "routers"),
    [
        ("jetmoe", {"mlp.router.layer.weight", "self_attention.experts.router.layer.weight"}),
        ("hunyuan_v1_moe", {"mlp.gate.wg.weight"}),
        ("gemma4_text", {"router.proj.weight"}),
        ("longcat_flash", {"mlp.router.classifier.weight"}),
        ("dbrx", {"ffn.router.layer.weight"}),
        ("llama4_text", {"feed_forward.router.weight"}),
        (
            "zaya",
            {
                "mlp.gate.down_proj.weight",
                "mlp.gate.router_mlp.fc1.weight",
                "mlp.gate.router_mlp.fc2.weight",
                "mlp.gate.router_mlp.out_proj.weight",
            },
        ),
    ],
)
def test_routers_are_known_by_what_they_are(architecture: str, routers: set[str]) -> None:
    _, left = names_in(build(architecture))
    assert {name for name, why in left.items() if why == "router"} == routers


def test_a_gate_that_routes_nothing_is_a_layer() -> None:
    layers, left = names_in(build("xlstm"))
    assert {"ffn.proj_up_gate", "mlstm_layer.ogate_preact"} <= layers
    assert not left


@pytest.mark.parametrize("order", ["block", "layer"])
def test_experts_multiplied_in_one_batch_are_pruned_along_their_inputs(order: str, ids: Tensor) -> None:
    network = build("llama4_text")
    recipe = {"steps": ["wanda"], "pattern": "2:4", "order": order, "calibration": {"min_tokens": 1}}
    report = prunella.prune(network, recipe, calibration=ids)
    experts = network.model.layers[0].feed_forward.experts
    for stored in (experts.gate_up_proj, experts.down_proj):  # (experts, in, out)
        assert ((stored.mT.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2).all()
    tokens = {la.name: la.tokens for la in report.layers if ".experts." in la.name}
    for name in ("gate_up_proj", "down_proj"):  # one expert a token; the others get it as zeros
        assert sum(n for key, n in tokens.items() if f"layers.0.feed_forward.experts.{name}." in key) == ids.numel()
    assert not report.notes()
    assert all(la.error for la in report.layers)


def test_experts_kept_as_one_matrix_are_layers(ids: Tensor) -> None:
    network = build("dbrx")
    report = prunella.prune(network, {"steps": ["wanda"], "pattern": "2:4"}, calibration=ids)
    mlp = network.transformer.blocks[0].ffn.experts.mlp
    for stored, transposed in ((mlp.w1, False), (mlp.v1, False), (mlp.w2, True)):
        each = stored.view(4, 64, 32)
        each = each.mT if transposed else each
        assert ((each.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2).all()
    for name in ("w1", "v1", "w2"):
        found = [la for la in report.layers if f".blocks.0.ffn.experts.mlp.{name}." in la.name]
        assert sum(la.tokens for la in found) == 2 * ids.numel()


def test_gates_without_a_module_are_read_head_by_head_as_the_product_reads_them() -> None:
    model = wrap_model(build("recurrent_gemma"))
    slots = {slot.name: slot for slot in find_layers(model.module(model.blocks[0]), "")}
    gate = model.network.model.layers[0].temporal_block.rg_lru.input_gate_weight  # (heads, in, out)
    for head in range(4):
        slot = slots[f"temporal_block.rg_lru.input_gate_weight.{head}"]
        assert torch.equal(slot.read(), gate[head].T)
        assert slot.lens.packed is None


@pytest.mark.parametrize(
    ("architecture", "skip"),
    [("llama", "0.self_attn"), ("mamba", "out_proj"), ("mixtral", "experts.*.3"), ("dbrx", "")],
)
def test_the_report_counts_all_matrices_of_the_blocks(architecture: str, skip: str, ids: Tensor) -> None:
    network = build(architecture) if architecture == "dbrx" else tiny.build(architecture)
    recipe = {"steps": ["wanda"], "skip": [skip] if skip else []}
    report = prunella.prune(network, recipe, calibration=ids)
    blocks = wrap_model(network).blocks
    matrices = [p for name in blocks for p in network.get_submodule(name).parameters() if p.ndim > 1]
    assert report.weights == sum(p.numel() for p in matrices)
    assert round(report.sparsity * report.weights) == sum(int((p == 0).sum()) for p in matrices)
    stayed = {name.removeprefix("stayed dense: ") for name, _, _ in report.rows() if name.startswith("stayed dense")}
    assert stayed == {item.why for item in report.left_out} | ({"skipped"} if skip else set())


def test_a_report_with_what_is_left_out_is_read_as_it_was(tmp_path: Path, ids: Tensor) -> None:
    tiny.build("mixtral").save_pretrained(tmp_path / "m")
    report = prunella.prune(tmp_path / "m", {"steps": ["magnitude"]}, output=tmp_path / "p", calibration=ids)
    assert [item.why for item in report.left_out] == ["router", "router"]
    assert prunella.Report.read(tmp_path / "p") == report
    said = json.loads((tmp_path / "p" / "prunella.json").read_text())
    del said["left_out"]
    for layer in said["layers"]:
        del layer["before"]
    (tmp_path / "p" / "prunella.json").write_text(json.dumps(said))
    assert prunella.Report.read(tmp_path / "p").sparsity == 0.5  # as it was written before there were any


# ---------------------------------------------------------------------------------------------------------
# What flows into a layer


def seen(weight_OI: Tensor, call: Any) -> Tensor:
    """What a product shows of the inputs of one weight."""
    found = [p.x() for p in products(*call, known=lambda t: t is weight_OI or t._base is weight_OI)]
    return torch.cat(found)


def test_every_kind_of_product_shows_the_inputs_of_its_weight() -> None:
    x, w = torch.randn(2, 5, 6), torch.randn(4, 6)
    flat = x.reshape(-1, 6)
    calls: list[Any] = [
        (nn.functional.linear, (x, w), {}),
        (nn.functional.linear, (x,), {"weight": w}),
        (torch.matmul, (x, w.T), {}),
        (Tensor.__matmul__, (w, x.mT), {}),
        (torch.mm, (flat, w.T), {}),
        (torch.addmm, (torch.zeros(4), flat, w.T), {}),
        (torch.einsum, ("bti,oi->bto", x, w), {}),
        (torch.einsum, ("oi,...i->...o", w, x), {}),
        (torch.bmm, (x, w.T.expand(2, 6, 4)), {}),
    ]
    for call in calls:
        assert torch.equal(seen(w, call), flat), call


def test_stacked_weights_meet_each_its_own_inputs() -> None:
    x, w = torch.randn(3, 5, 6), torch.randn(3, 4, 6)
    ends = torch.tensor([2, 2, 5])
    batched: list[Any] = [
        (torch.bmm, (x, w.mT), {}),
        (torch.baddbmm, (torch.zeros(3, 1, 4), x, w.mT), {}),
        (torch.einsum, ("eti,eoi->eto", x, w), {}),
        (torch.matmul, (w[:, None], x[:, None].mT), {}),
    ]
    for function, args, kwargs in batched:
        found = list(products(function, args, kwargs, lambda t: t is w or t._base is w))
        assert [p.weight_OI.data_ptr() for p in found] == [e.data_ptr() for e in w], function
        assert torch.equal(torch.stack([p.x() for p in found]), x)
        assert all(torch.equal(p.weight_OI, e) for p, e in zip(found, w, strict=True))
    grouped = products(torch._grouped_mm, (x[0], w.mT), {"offs": ends}, lambda t: t._base is w)
    assert [len(p.x()) for p in grouped] == [2, 0, 3]


class Odd(nn.Module):
    """A layer whose weight is not used as linear layers use theirs."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.inner = how, nn.Linear(8, 8, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self.inner.weight
        if self.how == "the other way round":
            return hidden_states @ weight
        return hidden_states @ weight[:4].T


@pytest.mark.parametrize("how", ["the other way round", "in part"])
def test_a_weight_that_is_multiplied_otherwise_than_it_was_found_stops_the_run(how: str) -> None:
    module = Odd(how)
    (slot,) = find_layers(module, "block")
    with (
        torch.no_grad(),
        pytest.raises(DefectError, match=r"'block\.inner' was taken for a matrix \(8, 8\).*--skip 'block\.inner'"),
        Watch({slot.name: slot}, lambda *_: None),
    ):
        module(torch.ones(2, 8))


@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("step", ["magnitude", "wanda"])
def test_a_layer_that_is_never_seen_at_work_stops_the_run(order: str, step: str, ids: Tensor) -> None:
    network = tiny.build()
    network.model.layers[1].mlp.idle = nn.Linear(32, 32)
    with pytest.raises(DefectError, match=r"'model\.layers\.1\.mlp\.idle' was not seen at work.*--skip mlp\.idle$"):
        prunella.prune(network, {"steps": [step], "order": order}, calibration=ids)
    network = tiny.build()
    network.model.layers[1].mlp.idle = nn.Linear(32, 32)
    prunella.prune(network, {"steps": [step], "order": order, "skip": ["idle"]}, calibration=ids)


def test_experts_that_are_all_idle_stop_the_run(ids: Tensor) -> None:
    network = tiny.build("mixtral")
    network.model.layers[0].mlp.forward = lambda hidden_states: hidden_states
    with pytest.raises(DefectError, match=r"'model\.layers\.0\.mlp\.experts\.gate_up_proj\.0' was not seen at work"):
        prunella.prune(network, {"steps": ["wanda"], "order": "block"}, calibration=ids)


def test_a_pattern_that_names_a_router_says_that_it_stays_dense(ids: Tensor) -> None:
    with pytest.raises(prunella.InputError, match=r"'mlp\.gate' matches no layer: '.*mlp\.gate' stays dense by itself"):
        prunella.prune(tiny.build("mixtral"), {"steps": ["wanda"], "skip": ["mlp.gate"]}, calibration=ids)


def test_a_parameter_that_is_cast_twice_is_not_taken_for_another() -> None:
    """Zamba casts A_log and D for each of its heads; what came of the first cast is gone at the second."""
    model = wrap_model(zoo.build("zamba").bfloat16())
    why = {
        left.name.rpartition(".")[2]: left.why for name in model.blocks for left in survey(model.module(name), name)[1]
    }
    assert why["A_log"] == why["D"] == NO_PRODUCT
    names = {slot.name for slot in find_layers(model.module(model.blocks[2]), model.blocks[2])}
    for key in ("x_proj_weight", "dt_proj_weight"):
        assert any(f".{key}." in name for name in names), key


# ---------------------------------------------------------------------------------------------------------
# What becomes of them


@pytest.mark.parametrize("architecture", ["dbrx", "llama4_text"])
def test_experts_that_cannot_run_packed_stay_dense_in_a_packed_model(
    architecture: str, tmp_path: Path, ids: Tensor
) -> None:
    build(architecture).save_pretrained(tmp_path / "m")
    recipe = {"steps": ["magnitude"]}
    prunella.prune(tmp_path / "m", recipe, output=tmp_path / "p", calibration=ids)
    prunella.prune(tmp_path / "m", {**recipe, "format": "packed"}, output=tmp_path / "k", calibration=ids)
    modules = json.loads((tmp_path / "k" / "config.json").read_text())["quantization_config"]["modules"]
    assert modules
    assert not any("experts" in name for name in modules)
    with torch.no_grad():
        one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits for name in ("p", "k"))
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("architecture", ["dbrx", "llama4_text"])
def test_reconstruction_holds_the_masks_of_experts_of_any_storage(architecture: str, ids: Tensor) -> None:
    network = build(architecture)
    before = {name: p.clone() for name, p in network.named_parameters()}
    report = prunella.prune(network, {"steps": ["wanda", "reconstruct"], "pattern": "2:4"}, calibration=ids)
    assert {la.sparsity for la in report.layers} == {0.5}
    for name, parameter in network.named_parameters():
        if "router" in name:
            assert torch.equal(parameter, before[name]), name
