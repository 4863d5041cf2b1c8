"""Every architecture, from the files of a tiny random model to the files of a pruned one."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import prunella
from prunella.layers import Slot, find_layers
from prunella.model.checkpoint import read_header
from prunella.stream import Stream
from prunella.tasks.text import load_model, wrap_model

RECIPES = {
    "unstructured": {"steps": ["sparsegpt"], "order": "layer"},
    "2:4": {"steps": ["wanda"], "order": "block", "pattern": "2:4"},
}
DTYPES = {"unstructured": torch.float32, "2:4": torch.bfloat16}
QUICK = [f"{architecture}-{pattern}" for architecture, pattern in zip(tiny.QUICK, itertools.cycle(RECIPES))]


def slots_of(network: Any) -> dict[str, Slot]:
    model = wrap_model(network)
    return {slot.name: slot for name in model.blocks for slot in find_layers(model.module(name), name)}


@dataclass(frozen=True)
class Run:
    """One architecture pruned twice: from its files, and as a model in memory."""

    source: Path
    output: Path
    skipped: tuple[str, ...]
    report: prunella.Report
    ids: Tensor
    in_memory: Any

    @functools.cached_property
    def reloaded(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.output, dtype="auto")

    @functools.cached_property
    def dense(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.source, dtype="auto")


@pytest.fixture(scope="module", params=tiny.at_length([f"{a}-{p}" for a in tiny.ARCHITECTURES for p in RECIPES], QUICK))
def pruned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    architecture, _, pattern = request.param.partition("-")
    directory = tmp_path_factory.mktemp(architecture)
    source, output = directory / "dense", directory / "pruned"
    network = tiny.build(architecture, dtype=DTYPES[pattern])
    network.save_pretrained(source, max_shard_size="24KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    columns = prunella.Pattern.parse(pattern).columns
    skipped = tuple(name for name, slot in slots_of(network).items() if slot.shape[1] % columns)
    recipe = {**RECIPES[pattern], "skip": skipped}
    ids = tiny.token_windows(40, 64)
    report = prunella.prune(source, recipe, output=output, calibration=ids)
    in_memory = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    # As what is read: torch chooses its products by that too, and one may round where another does not.
    in_memory.requires_grad_(False)
    prunella.prune(in_memory, recipe, calibration=ids)
    yield Run(source, output, skipped, report, ids, in_memory)
    shutil.rmtree(directory)


@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_blocks_replayed_one_by_one_give_the_models_logits_exactly(architecture: str, order: Any) -> None:
    model = wrap_model(tiny.build(architecture))
    stream = Stream(model, tiny.token_windows(40, 64), order=order)
    assert len(stream.batches) == (1 if order == "layer" else 2)
    for _, block in model.walk():
        stream.advance(block)
    for number, batch in enumerate(stream.batches):
        with torch.no_grad():
            whole = model.network(**batch, use_cache=False).logits
        assert torch.equal(stream.outputs(number).logits, whole)


def test_each_layer_has_exactly_the_zeros_that_were_asked_for(pruned: Run) -> None:
    masks = prunella.read_masks(pruned.output)
    slots = slots_of(pruned.reloaded)
    assert set(masks) == set(slots) - set(pruned.skipped)
    for name, mask_OI in masks.items():
        weight_OI = slots[name].read()
        assert (weight_OI[~mask_OI] == 0).all()
        assert int((~mask_OI).sum()) == mask_OI.numel() // 2
        if pruned.report.recipe["pattern"] == "2:4":
            assert (mask_OI.reshape(-1, 4).sum(1) == 2).all()
    for layer in pruned.report.layers:
        assert layer.sparsity == (0.0 if layer.name in pruned.skipped else 0.5)


def test_streaming_from_files_equals_pruning_in_memory(pruned: Run) -> None:
    expected, found = pruned.in_memory.state_dict(), pruned.reloaded.state_dict()
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different
    assert all(found[name].dtype == expected[name].dtype for name in expected)


def test_only_pruned_tensors_differ_from_the_source_by_a_single_byte(pruned: Run) -> None:
    changed = 0
    for path in sorted(pruned.source.glob("*.safetensors")):
        tensors, metadata = read_header(path)
        assert read_header(pruned.output / path.name) == (tensors, metadata)
        before, after = path.read_bytes(), (pruned.output / path.name).read_bytes()
        for name, (code, shape, start, end) in tensors.items():
            if before[start:end] != after[start:end]:
                changed += 1
                kind = {"F32": torch.float32, "BF16": torch.bfloat16}[code]
                tensor = torch.frombuffer(bytearray(after[start:end]), dtype=kind).view(shape)
                assert tensor.ndim >= 2, name
                assert (tensor == 0).float().mean() > 0.4, name  # of a fused half, about half
    assert changed

    touched = {la.name for la in pruned.report.layers if la.sparsity}
    for name, dense in pruned.dense.state_dict().items():
        owner = name.removesuffix(".weight")
        if owner not in touched and not any(layer.startswith(name + ".") for layer in touched):
            assert torch.equal(pruned.reloaded.state_dict()[name], dense), name


def test_tied_embeddings_stay_tied(pruned: Run) -> None:
    network = pruned.reloaded
    same = network.get_input_embeddings().weight is network.get_output_embeddings().weight
    assert same == network.config.tie_word_embeddings
    index = json.loads((pruned.output / "model.safetensors.index.json").read_text())["weight_map"]
    assert ("lm_head.weight" in index or "embed_out.weight" in index) != same


def test_the_pruned_model_has_a_finite_perplexity(pruned: Run) -> None:
    found = prunella.perplexity(load_model(str(pruned.output)), pruned.ids)
    assert 1 < found.perplexity < float("inf")
    assert found == prunella.perplexity(wrap_model(pruned.in_memory), pruned.ids)


# ---------------------------------------------------------------------------------------------------------
# Mixtures of experts


@pytest.mark.parametrize("architecture", tiny.MIXTURES)
def test_each_expert_is_a_layer(architecture: str) -> None:
    network = tiny.build(architecture)
    names = [name for name in slots_of(network) if ".experts." in name or ".input_linear." in name]
    whole = {name.rpartition(".")[0] for name in names}
    assert whole
    assert len(names) == 4 * len(whole)
    assert {name.rpartition(".")[2] for name in names} == {"0", "1", "2", "3"}
    assert not any("router" in name or name.endswith(".gate") for name in slots_of(network))


def router_that_never_picks_the_last_expert() -> Any:
    """A Mixtral whose router ranks four experts by ±v·h and gives the fifth a zero: it is always third."""
    network = tiny.build("mixtral", num_local_experts=5)
    with torch.no_grad():
        for block in network.model.layers:
            v = torch.randn(32)
            block.mlp.gate.weight.copy_(torch.stack([v, 0.9 * v, -0.9 * v, -v, 0 * v]))
    return network


@pytest.mark.parametrize("order", ["layer", "block"])
def test_an_expert_that_saw_too_few_tokens_is_pruned_by_magnitude_and_says_so(order: str, ids: Tensor) -> None:
    network = router_that_never_picks_the_last_expert()
    dense = {name: slot.read().clone() for name, slot in slots_of(network).items()}
    report = prunella.prune(network, {"steps": ["sparsegpt"], "order": order}, calibration=ids)
    slots = slots_of(network)
    starved = [la for la in report.layers if la.name.endswith(".4")]
    assert len(starved) == 4
    for layer in starved:
        assert layer.tokens == 0
        assert layer.notes == ("saw 0 tokens: pruned by magnitude",)
        mask_OI = prunella.keep(dense[layer.name].abs(), 0.5)
        assert torch.equal(slots[layer.name].read(), dense[layer.name] * mask_OI)
    for layer in report.layers:
        if layer not in starved:
            assert layer.tokens >= 32
            assert not layer.notes
            assert layer.error is not None


@pytest.mark.parametrize("order", ["layer", "block"])
def test_min_tokens_decides_which_experts_starve(order: str, ids: Tensor) -> None:
    recipe = {"steps": ["wanda"], "order": order}
    first = prunella.prune(tiny.build("qwen3_moe"), recipe, calibration=ids)
    counts = sorted({la.tokens for la in first.layers})
    assert len(counts) > 2
    recipe["calibration"] = {"min_tokens": counts[1]}
    second = prunella.prune(tiny.build("qwen3_moe"), recipe, calibration=ids)
    for before, after in zip(first.layers, second.layers, strict=True):
        if after.name.startswith("model.layers.0."):
            assert bool(after.notes) == (before.tokens < counts[1])


@pytest.mark.parametrize("order", ["layer", "block"])
def test_experts_together_see_each_token_as_often_as_the_router_picks(order: str, ids: Tensor) -> None:
    report = prunella.prune(tiny.build("mixtral"), {"steps": ["wanda"], "order": order}, calibration=ids)
    tokens: dict[str, int] = {}
    for layer in report.layers:
        if ".experts." in layer.name:
            parameter = layer.name.rpartition(".")[0]
            tokens[parameter] = tokens.get(parameter, 0) + layer.tokens
        else:
            assert layer.tokens == ids.numel()
    assert set(tokens.values()) == {2 * ids.numel()}
