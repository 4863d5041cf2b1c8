"""What every healing method promises, whatever it trains."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from healing import prune_in_memory
from torch import Tensor

from prunella import InputError
from prunella.heal import Change, Part, groups, make_group, trains
from prunella.heal.parts import Chosen, LowRank, attach, choose, detach, parts_of
from prunella.layers import find_layers
from prunella.model.network import Model

NEEDS_BIAS = {"biases", "new-biases"}


def prepare(
    method: str, architecture: str = "llama", **overrides: Any
) -> tuple[Model, dict[str, Tensor], list[Chosen]]:
    """A pruned network and what a method trains of it, not attached yet."""
    if method in NEEDS_BIAS and architecture == "llama":
        overrides |= {"attention_bias": True, "mlp_bias": True}
    model, masks = prune_in_memory(tiny.build(architecture, **overrides))
    new = [name for name, _ in model.network.named_parameters() if name.endswith("proj.bias")]
    parts = parts_of(model, masks, new if method == "new-biases" else ())
    return model, masks, choose(parts, [make_group(method)])


def logits(model: Model, ids: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.network(input_ids=ids, use_cache=False).logits
    return out


def shake(chosen: list[Chosen]) -> None:
    """As if a few steps had been made."""
    with torch.no_grad():
        for item in chosen:
            for parameter in item.change.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
            item.change.forget()


def zeros_held(model: Model, masks: dict[str, Tensor]) -> bool:
    slots = [slot for block in model.blocks for slot in find_layers(model.module(block), block)]
    return all(not slot.read()[~masks[slot.name]].any() for slot in slots)


@pytest.mark.parametrize("method", sorted(groups))
def test_a_mask_held_as_bits_is_the_same_mask(method: str, ids: Tensor) -> None:
    model, masks, chosen = prepare(method)
    shake(chosen)
    attach(chosen)
    before = logits(model, ids)
    held = [item.change.mask for item in chosen]
    for item in chosen:
        item.change.pack_mask()
        item.change.forget()
    assert torch.equal(logits(model, ids), before)
    for item, mask in zip(chosen, held, strict=True):
        if mask is not None:
            assert item.change.mask is not None
            assert torch.equal(item.change.mask, mask)
            assert sum(buffer.numel() for buffer in item.change.buffers()) == -(-mask.numel() // 8)
    detach(chosen)
    assert zeros_held(model, masks)


@pytest.mark.parametrize("method", sorted(groups))
def test_before_the_first_step_it_is_the_pruned_model(method: str, ids: Tensor) -> None:
    model, _, chosen = prepare(method)
    before = logits(model, ids)
    attach(chosen)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", sorted(set(groups) - {"lora"}))
def test_merged_it_computes_what_it_computed_unmerged_and_no_zero_is_lost(
    method: str, dtype: torch.dtype, ids: Tensor
) -> None:
    model, masks, chosen = prepare(method, dtype=dtype)
    before = logits(model, ids)
    attach(chosen)
    shake(chosen)
    unmerged = logits(model, ids)
    assert not torch.equal(unmerged, before)
    detach(chosen)
    assert torch.equal(logits(model, ids), unmerged)
    assert zeros_held(model, masks)
    assert not any("parametrizations" in name for name, _ in model.network.named_parameters())


@pytest.mark.parametrize("method", ["mask-lora", "scale-lora"])
def test_it_is_made_in_float32_where_the_model_computes_in_bfloat16(method: str, ids: Tensor) -> None:
    model, _, chosen = prepare(method)
    attach(chosen)
    shake(chosen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unmerged = logits(model, ids)
    detach(chosen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(model, ids), unmerged)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("method", ["mask-lora", "scale-lora", "lora-prune", "all"])
def test_transposed_layers_and_experts_merge_alike(method: str, architecture: str, ids: Tensor) -> None:
    model, masks, chosen = prepare(method, architecture)
    attach(chosen)
    shake(chosen)
    unmerged = logits(model, ids)
    detach(chosen)
    assert torch.equal(logits(model, ids), unmerged)
    assert zeros_held(model, masks)


@pytest.mark.parametrize("method", sorted(set(groups) - {"lora", "lora-prune"}))
def test_pruned_places_get_no_gradient_and_no_step_moves_them(method: str, ids: Tensor) -> None:
    model, masks, chosen = prepare(method)
    attach(chosen)
    model.network.train()
    optimizer = torch.optim.AdamW([p for item in chosen for p in item.change.parameters()], lr=0.01, fused=True)
    for _ in range(2):
        model.network(input_ids=ids, labels=ids).loss.backward()
        for item in chosen:
            if item.part.mask is not None and method == "all":
                (master,) = item.change.parameters()
                assert master.grad is not None
                assert not master.grad[~item.part.mask].any()
                assert master.grad[item.part.mask].any()
        optimizer.step()
        optimizer.zero_grad()
        for item in chosen:
            if item.part.mask is not None:
                for module, key in item.part.places:
                    assert not getattr(module, key)[~item.part.mask].any()
    detach(chosen)
    assert zeros_held(model, masks)


def test_gradients_are_those_of_the_plain_formula(ids: Tensor) -> None:
    """The product is made once and its graph is never kept: the gradients are the same."""
    torch.manual_seed(0)
    mask = torch.rand(6, 8) > 0.5
    base = torch.randn(6, 8) * mask
    change = make_group("mask-lora", {"rank": 3}).change(Part("w", frozenset({"linear"}), base, mask))
    assert isinstance(change, LowRank)
    with torch.no_grad():
        change.left.normal_()
    x = torch.randn(5, 8)
    plain = (x @ (base + mask * (2 * change.left @ change.right)).T).square().sum()
    expected = torch.autograd.grad(plain, list(change.parameters()))
    for keep in (False, True):
        change.keep = keep
        change.zero_grad()
        for _ in range(2):  # two micro-batches
            (x @ change(base).T).square().sum().backward()
        for parameter, gradient in zip(change.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, 2 * gradient, rtol=1e-5, atol=1e-4)


def test_the_product_is_made_once_until_it_is_forgotten() -> None:
    made = []

    class Counting(Change):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def make(self, base: Tensor) -> Tensor:
            made.append(torch.is_grad_enabled())
            return base * self.scale

    change = Counting()
    change.keep = True
    base = torch.ones(3)
    for _ in range(3):
        change(base)
    assert len(made) == 1
    with torch.no_grad():
        change.scale += 1
    change.forget()
    assert change(base).tolist() == [2, 2, 2]
    assert len(made) == 2


def test_scale_lora_moves_more_than_one_rank_only_from_its_broken_start() -> None:
    torch.manual_seed(0)
    mask = torch.ones(12, 10, dtype=torch.bool)
    base, goal = torch.randn(12, 10), torch.randn(12, 10)
    ranks = {}
    for start in ("broken", "constant"):
        change = make_group("scale-lora", {"rank": 4, "start": start}).change(Part("w", frozenset(), base, mask))
        assert change is not None
        assert torch.allclose(change(base), base)
        optimizer = torch.optim.AdamW(change.parameters(), lr=0.05, weight_decay=0.0)
        for _ in range(30):
            optimizer.zero_grad()
            (change(base) - goal).square().sum().backward()
            optimizer.step()
        left, right = change.parameters()
        ranks[start] = int((torch.linalg.svdvals(left @ right) > 1e-3).sum())
    assert ranks == {"broken": 4, "constant": 1}


def test_a_tied_head_stays_tied(ids: Tensor) -> None:
    for method in ("head", "embeddings", "all"):
        model, _, chosen = prepare(method, tie_word_embeddings=True)
        attach(chosen)
        shake(chosen)
        unmerged = logits(model, ids)
        detach(chosen)
        network = model.network
        assert network.lm_head.weight is network.model.embed_tokens.weight
        assert torch.equal(logits(model, ids), unmerged)


def test_methods_combine_and_each_tensor_trains_once() -> None:
    model, masks = prune_in_memory(tiny.build("llama"))
    names = ["norms", "mask-lora", "head", "all"]
    chosen = choose(parts_of(model, masks), [make_group(name) for name in names])
    owner = {item.part.name: item.group.name for item in chosen}
    assert len(owner) == len(chosen) == len(list(model.network.parameters()))
    assert owner["model.norm.weight"] == "norms"
    assert owner["model.layers.0.mlp.up_proj.weight"] == "mask-lora"
    assert owner["lm_head.weight"] == "head"
    assert owner["model.embed_tokens.weight"] == "all"


@pytest.mark.parametrize("architecture", ["opt", "gpt2", "llama", "gemma3_text"])
def test_norms_and_biases_are_told_apart(architecture: str) -> None:
    model, masks = prune_in_memory(tiny.build(architecture))
    parts = parts_of(model, masks)
    linear = {f"{name}.weight" for name in masks}
    for part in parts:
        if part.name in linear:
            assert part.kinds == {"linear"}
        elif part.value.ndim == 1:
            assert part.kinds & {"norm", "bias"}
            assert ("bias" in part.kinds) == part.name.endswith("bias")
            assert ("norm" in part.kinds) == ("norm" in part.name or ".ln_" in part.name)
        else:
            assert part.kinds & {"embedding", "head"}


def test_what_is_wrong_is_said(ids: Tensor) -> None:
    with pytest.raises(InputError, match="Did you mean 'mask-lora'"):
        make_group("masklora")
    with pytest.raises(InputError, match=r"rank"):
        make_group("mask-lora", {"rank": 0})
    with pytest.raises(InputError, match="learning rate lies between 0 and 1"):
        make_group("norms", {"rate": 7.0})
    model, masks = prune_in_memory(tiny.build("llama"))
    with pytest.raises(InputError, match="'biases' finds nothing to train"):
        choose(parts_of(model, masks), [make_group("biases")])


def test_a_method_of_ones_own_is_a_function_with_a_rate() -> None:
    with pytest.raises(TypeError, match="rate"):

        @trains("rateless")
        def rateless(part: Part) -> Change | None:
            return None

    assert "rateless" not in groups
