"""Single tokens through whole blocks in C, beside the blocks' own forward."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import prunella
from prunella.machine import threaded
from prunella.packing import pack_model
from prunella.sparse import block, kernels
from prunella.sparse.bench import packed_copy
from prunella.sparse.block import FusedBlock, Stack, slow_down, speed_up
from prunella.sparse.format import Packed, pack, unpack
from prunella.sparse.placed import Weights

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="the C kernels were not compiled")
ALIKE = ("llama", "mistral", "qwen2", "qwen3")


def packed(architecture: str = "llama", bits: int | None = None, **overrides: Any) -> Any:
    return packed_copy(tiny.build(architecture, dtype=torch.bfloat16, **overrides), 0.5, bits)


def fused(network: Any) -> int:
    return sum(isinstance(module.__dict__.get("forward"), FusedBlock) for module in network.modules())


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """True for each time that a block's answer came from C."""
    found: list[bool] = []
    token = FusedBlock.token

    def spy(self: FusedBlock, *arguments: Any) -> Tensor | None:
        out = token(self, *arguments)
        if out is not None:
            found.append(True)
        return out

    monkeypatch.setattr(FusedBlock, "token", spy)
    return found


@torch.inference_mode()
def decode(network: Any, ids: Tensor, **options: Any) -> Tensor:
    """The logits of ids (T) after the first four, one token at a time: (T - 4, V)."""
    cache = network(ids[None, :4], use_cache=True).past_key_values
    out = [network(token[None, None], past_key_values=cache, use_cache=True, **options).logits for token in ids[4:]]
    return torch.cat(out, dim=1)[0].float()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("architecture", tiny.at_length(ALIKE, ["mistral", "qwen3"]))
def test_a_token_gets_what_the_block_itself_gives(architecture: str, bits: int | None, ran: list[bool]) -> None:
    network = packed(architecture, bits)
    assert fused(network) == 2
    ran.clear()
    ids = tiny.token_windows(1, 16)[0]
    got = decode(network, ids)
    assert ran == [True] * 24 if architecture != "mistral" else len(ran) == 6  # then its window of 8 wants a mask
    slow_down(network)
    assert fused(network) == 0
    assert distance(got, decode(network, ids)) < 0.01


@pytest.mark.parametrize("instructions", kernels.instructions())
def test_every_instruction_set(instructions: str, ran: list[bool]) -> None:
    network = packed("qwen3", hidden_size=72, intermediate_size=200, head_dim=24, num_attention_heads=6)
    ids = tiny.token_windows(1, 12)[0]
    kernels.use(instructions)
    try:
        ran.clear()
        got = decode(network, ids)
        assert ran == [True] * 16
        slow_down(network)
        assert distance(got, decode(network, ids)) < 0.01
    finally:
        kernels.use(None)


def test_layers_that_stay_dense_and_biases(ran: list[bool]) -> None:
    dense = tiny.build("qwen2", dtype=torch.bfloat16)
    network = copy.deepcopy(dense)
    for name, module in network.named_modules():  # k_proj and down_proj are not pruned
        if isinstance(module, torch.nn.Linear) and not name.endswith(("k_proj", "down_proj", "lm_head")):
            module.weight.data *= torch.rand(module.weight.shape) < 0.5
    pruned = packed_copy(network)
    assert fused(pruned) == 2
    assert pruned.model.layers[0].self_attn.q_proj.bias is not None
    ids = tiny.token_windows(1, 12)[0]
    ran.clear()
    assert distance(decode(pruned, ids), decode(network, ids)) < 0.01
    assert ran == [True] * 16


@pytest.mark.parametrize(
    ("architecture", "overrides", "count"),
    [
        ("granite", {"residual_multiplier": 0.5}, 0),
        ("smollm3", {}, 1),  # one of two blocks has no rotary embedding
        ("gemma2", {}, 0),
        ("olmo2", {}, 0),
        ("phi3", {}, 0),
        ("stablelm", {}, 0),
        ("mixtral", {}, 0),
        ("llama", {"hidden_act": "gelu"}, 0),
        ("llama", {"mlp_bias": True, "attention_bias": True}, 2),
    ],
)
def test_only_blocks_that_agree_are_replaced(architecture: str, overrides: dict[str, Any], count: int) -> None:
    assert fused(packed(architecture, **overrides)) == count


def test_what_is_not_one_plain_token_takes_the_usual_way(ran: list[bool]) -> None:
    network = packed()
    ids = tiny.token_windows(3, 12)
    plain = copy.deepcopy(network)
    slow_down(plain)

    def same(**inputs: Any) -> None:
        ran.clear()
        with torch.no_grad():
            assert torch.equal(network(**inputs).logits, plain(**inputs).logits)
        assert not ran

    same(input_ids=ids)  # many tokens
    same(input_ids=ids[:1, :1], use_cache=False)  # no cache
    for count, mask in ((3, None), (2, torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]))):  # several sequences, padding
        outs = []
        for model in (network, plain):
            ran.clear()
            with torch.no_grad():
                first = None if mask is None else mask[:, :4]
                cache = model(ids[:count, :4], attention_mask=first, use_cache=True).past_key_values
                outs.append(model(ids[:count, 4:5], attention_mask=mask, past_key_values=cache).logits)
            assert not ran
        assert torch.equal(*outs)
    with torch.inference_mode():
        for options in ({"cache_implementation": "static"}, {"num_beams": 2}):
            a, b = (m.generate(ids[:1, :4], max_new_tokens=6, do_sample=False, **options) for m in (network, plain))
            assert torch.equal(a, b)


def test_hooks_see_what_happens_inside(ran: list[bool]) -> None:
    network, ids = packed(), tiny.token_windows(1, 8)[0]
    seen: list[torch.Size] = []
    hook = network.model.layers[0].self_attn.v_proj.register_forward_hook(lambda m, args, out: seen.append(out.shape))
    ran.clear()
    decode(network, ids)
    assert len(seen) == 5
    assert len(ran) == 4
    hook.remove()
    decode(network, ids)
    assert len(seen) == 5
    assert len(ran) == 12
    shown = torch.nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(torch.Size([])))
    try:
        decode(network, ids)
    finally:
        shown.remove()
    assert len(ran) == 12


def test_hidden_states_and_attentions(ran: list[bool]) -> None:
    network, ids = packed(), tiny.token_windows(1, 8)
    plain = copy.deepcopy(network)
    slow_down(plain)
    found = []
    with torch.inference_mode():
        for model in (network, plain):
            cache = model(ids[:, :4], use_cache=True).past_key_values
            found.append(model(ids[:, 4:5], past_key_values=cache, output_hidden_states=True).hidden_states)
    assert len(found[0]) == 3
    for a, b in zip(*found, strict=True):
        assert distance(a.float(), b.float()) < 0.01


def test_weights_that_change_are_noticed(ran: list[bool]) -> None:
    network, ids = packed("qwen3"), tiny.token_windows(1, 8)[0]
    before = decode(network, ids)
    block = network.model.layers[1]

    def decoded() -> Tensor:
        """In C, all tokens of both blocks, and as the blocks themselves do it."""
        ran.clear()
        changed = decode(network, ids)
        assert ran == [True] * 8
        slow_down(network)
        assert distance(changed, decode(network, ids)) < 0.01
        speed_up(network)
        return changed

    with torch.no_grad():
        block.post_attention_layernorm.weight.mul_(3)  # in place
    assert distance(decoded(), before) > 0.01
    decode(network, ids)
    block.mlp.down_proj = copy.deepcopy(network.model.layers[0].mlp.down_proj)  # another module
    block.input_layernorm.weight.data = torch.rand(32).bfloat16()  # other memory in the same parameter
    block.self_attn.o_proj.weight_values = block.self_attn.o_proj.weight_values.clone()  # another buffer
    decoded()
    decode(network, ids)
    block.self_attn.q_proj.bias = torch.nn.Parameter(torch.rand(32).bfloat16())  # where there was none
    changed = decoded()
    network.float()  # no longer what the kernels take
    ran.clear()
    assert distance(decode(network, ids), changed) < 0.02
    assert not ran


def test_a_model_is_still_copied_pickled_saved_and_unpacked(tmp_path: Path, ran: list[bool]) -> None:
    network, ids = packed(), tiny.token_windows(1, 8)[0]
    logits = decode(network, ids)
    again = copy.deepcopy(network)
    assert again.model.layers[0].forward.block is again.model.layers[0]  # not the first one's
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    for other in (again, torch.load(file, weights_only=False)):
        ran.clear()
        assert torch.equal(decode(other, ids), logits)
        assert ran == [True] * 8

    source, target = tmp_path / "pruned", tmp_path / "packed"
    plain = tiny.build(dtype=torch.bfloat16)
    for module in plain.modules():
        if isinstance(module, torch.nn.Linear) and module is not plain.lm_head:
            module.weight.data *= torch.rand(module.weight.shape) < 0.5
    plain.save_pretrained(source)
    pack_model(str(source), target)
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert fused(loaded) == 2
    logits = decode(loaded, ids)
    assert distance(logits, decode(plain, ids)) < 0.01
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(decode(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), ids), logits)
    loaded.dequantize()
    assert fused(loaded) == 0
    assert distance(decode(loaded, ids), logits) < 0.01


def test_gradients_of_a_block_are_refused_as_before() -> None:
    network = packed()
    cache = network(tiny.token_windows(1, 4), use_cache=True).past_key_values
    embeddings = torch.randn(1, 1, 32).bfloat16().requires_grad_()
    out = network(inputs_embeds=embeddings, past_key_values=cache).logits
    with pytest.raises(prunella.PrunellaError, match="cannot be trained"):
        out.sum().backward()


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """With more than one thread where there are processors for them."""
    with threaded(2):
        yield


def test_the_cache_grows_in_place_and_holds_what_it_would_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    network = packed()
    ids = torch.randint(3, tiny.VOCABULARY, (1, 64))

    @torch.no_grad()
    def through(rounds: tuple[int, ...]) -> tuple[Tensor, Any]:
        """Some tokens at once, then one at a time, then some given back, and again; each part of `ids`."""
        at, out, cache = 4, [], network(ids[:, :4], use_cache=True).past_key_values
        for tokens in rounds:
            if tokens < 0:
                cache.crop(tokens)
                at += tokens
            for _ in range(tokens):
                with torch.inference_mode(at % 7 == 0):  # tensors made there may not be written to elsewhere
                    out.append(network(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
                at += 1
            if tokens > 0:
                out.append(network(ids[:, at : at + 3], past_key_values=cache, use_cache=True).logits)
                at += 3
        return torch.cat(out, 1), cache

    rounds = (5, -4, 40, -2, 3)
    monkeypatch.setattr("prunella.sparse.cache.ROOM", 16)
    found, cache = through(rounds)
    monkeypatch.setattr("prunella.sparse.placed.append", lambda cache, number, k, v: cache.update(k, v, number))
    wanted, other = through(rounds)
    assert torch.equal(found, wanted)
    for layer, beside in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(layer.keys, beside.keys)
        assert torch.equal(layer.values, beside.values)


@torch.inference_mode()
def test_a_cache_is_not_copied_for_every_token_and_copies_are_their_own() -> None:
    network = packed()
    cache = network(torch.arange(3, 11)[None], use_cache=True).past_key_values
    token = torch.tensor([[5]])
    network(token, past_key_values=cache, use_cache=True)
    place = cache.layers[1].keys.data_ptr()
    twin = copy.deepcopy(cache)
    first = network(token, past_key_values=cache, use_cache=True).logits
    assert cache.layers[1].keys.data_ptr() == place
    assert torch.equal(network(token, past_key_values=twin, use_cache=True).logits, first)
    assert twin.layers[1].keys.data_ptr() != place
    kept = cache.layers[1].keys.clone()
    network(torch.tensor([[7]]), past_key_values=twin, use_cache=True)
    assert torch.equal(cache.layers[1].keys, kept)
    cache.batch_repeat_interleave(2)
    assert network(token.repeat(2, 1), past_key_values=cache, use_cache=True).logits.shape[0] == 2


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of each block that had to compute its answer by itself."""
    found: list[int] = []
    run = Weights.run

    def spy(self: Weights, *arguments: Any) -> Tensor:
        found.append(self.layer)
        return run(self, *arguments)

    monkeypatch.setattr(Weights, "run", spy)
    return found


def blocks_alone(network: Any) -> Any:
    """A copy whose blocks foresee nothing."""
    other = copy.deepcopy(network)
    for module in other.modules():
        if isinstance(module.__dict__.get("forward"), FusedBlock):
            module.forward.stack = None
    return other


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_one_call_for_all_blocks_gives_what_they_give_alone(architecture: str, alone: list[int]) -> None:
    network = packed(architecture, 8, num_hidden_layers=5)
    ids = tiny.token_windows(1, 16)[0]
    alone.clear()
    got = decode(network, ids)
    assert not alone
    assert torch.equal(got, decode(blocks_alone(network), ids))
    assert alone == [0, 1, 2, 3, 4] * 12


def test_blocks_of_another_kind_divide_a_stack(alone: list[int]) -> None:
    network = packed("llama", num_hidden_layers=5)
    slow_down(network)
    network.model.layers[2].mlp.act_fn = torch.nn.Tanh()
    speed_up(network)
    stacks = [getattr(module.__dict__.get("forward"), "stack", None) for module in network.model.layers]
    assert stacks[0] is stacks[1] is not stacks[3] is stacks[4]
    assert [stack is None for stack in stacks] == [False, False, True, False, False]
    ids = tiny.token_windows(1, 12)[0]
    alone.clear()
    got = decode(network, ids)
    assert not alone
    assert torch.equal(got, decode(blocks_alone(network), ids))


def test_what_was_not_foreseen_is_computed(alone: list[int]) -> None:
    network, ids = packed(num_hidden_layers=4), tiny.token_windows(1, 40)[0]
    plain = blocks_alone(network)

    def compare(wanted: list[int]) -> None:
        alone.clear()
        with torch.inference_mode():
            logits, caches = [], []
            for model in (network, plain):
                cache = model(ids[None, :4], use_cache=True).past_key_values
                out = [model(ids[None, i : i + 1], past_key_values=cache).logits for i in range(4, 7)]
                logits.append(torch.cat(out))
                caches.append(cache)
                if model is network:
                    assert alone == wanted * 3
        assert torch.equal(*logits)
        for a, b in zip(*(cache.layers for cache in caches), strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)

    compare([])
    # a hook that changes what a block gives, in place: those after it are asked something else
    added = [m.model.layers[1].register_forward_hook(lambda module, args, out: out.add_(1)) for m in (network, plain)]
    compare([2, 3])
    for hook in added:
        hook.remove()
    # another tensor of the same bytes is not what was foreseen either
    same = [m.model.layers[1].register_forward_hook(lambda module, args, out: out.clone()) for m in (network, plain)]
    compare([2, 3])
    for hook in same:
        hook.remove()

    def exchange(module: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        layer = kwargs["past_key_values"].layers[3]
        if layer.is_initialized:
            layer.keys = layer.keys * 2

    hooks = [m.model.layers[0].register_forward_hook(exchange, with_kwargs=True) for m in (network, plain)]
    compare([3])
    for hook in hooks:
        hook.remove()
    network.model.layers[2].mlp.up_proj.register_forward_hook(lambda module, args, out: None)  # it wants to see inside
    alone.clear()
    decode(network, ids[:6])
    assert alone == [0, 1, 3] * 2


def test_nothing_is_foreseen_any_more_where_nobody_asks(alone: list[int]) -> None:
    network, ids = packed(num_hidden_layers=4), tiny.token_windows(1, 32)[0]
    stack = network.model.layers[0].forward.stack
    hook = network.model.layers[1].register_forward_hook(lambda module, args, out: out + 1)
    alone.clear()
    decode(network, ids)
    assert alone == [2, 3] * (Stack.PATIENCE + 1) + [0, 1, 2, 3] * (28 - Stack.PATIENCE - 1)
    assert stack.known is None
    hook.remove()
    network.config.num_hidden_layers = 3  # a model that ends early
    slow_down(network)
    speed_up(network)
    alone.clear()
    decode(network, ids)
    assert alone == [0, 1, 2] * 28  # the cache has no fourth layer


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_cache_is_let_go(interrupted: bool) -> None:
    network, ids = packed(num_hidden_layers=3), tiny.token_windows(1, 8)
    with torch.inference_mode():
        cache = network(ids[:, :4], use_cache=True).past_key_values
        if interrupted:
            network.model.layers[1].register_forward_hook(lambda module, args, out: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                network(ids[:, 4:5], past_key_values=cache)
        else:
            network(ids[:, 4:5], past_key_values=cache)
    assert (network.model.layers[0].forward.stack.known is not None) == interrupted
    room = weakref.ref(cache.layers[1].room)
    cache = weakref.ref(cache)
    gc.collect()
    assert cache() is None
    assert room() is None


def test_blocks_are_copied_and_let_go_one_by_one() -> None:
    network, ids = packed(num_hidden_layers=4), tiny.token_windows(1, 12)[0]
    layers = network.model.layers
    one = copy.deepcopy(layers[2])
    assert one.forward.stack.blocks.keys() == {2}
    assert one.forward.stack is not layers[2].forward.stack
    gone = weakref.ref(layers[3])
    last = layers[3].forward
    del layers[3], last
    gc.collect()
    assert gone() is None
    network.config.num_hidden_layers = 3
    assert torch.equal(decode(network, ids), decode(blocks_alone(network), ids))
    gone = weakref.ref(layers[1].forward)
    slow_down(network)
    assert gone() is None


def test_two_blocks_that_share_a_layer_of_the_cache(alone: list[int]) -> None:
    network, ids = packed(num_hidden_layers=4), tiny.token_windows(1, 12)[0]
    for number in (2, 3):
        network.model.layers[number].self_attn.layer_idx = number - 2
    slow_down(network)
    speed_up(network)
    alone.clear()
    got = decode(network, ids)
    assert alone == [0, 1, 0, 1] * 8
    slow_down(network)
    assert distance(got, decode(network, ids)) < 0.01


@torch.inference_mode()
def test_two_branches_of_a_text_do_not_write_over_each_other() -> None:
    network, ids = packed(), tiny.token_windows(1, 12)

    def logits(cache: Any, *tokens: int) -> Tensor:
        return torch.cat([network(torch.tensor([[t]]), past_key_values=cache).logits for t in tokens], 1)

    def start() -> Any:
        cache = network(ids[:, :4], use_cache=True).past_key_values
        logits(cache, 5)
        return cache

    wanted = [logits(start(), 6, 7), logits(start(), 8, 9)]
    cache = start()
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    first = logits(cache, 6)
    other = start()
    for layer, beside, (keys, values) in zip(other.layers, cache.layers, kept, strict=True):
        layer.keys, layer.values, layer.room = keys, values, beside.room  # as copies of the layers would have them
    assert torch.equal(logits(other, 8, 9), wanted[1])
    assert torch.equal(torch.cat([first, logits(cache, 7)], 1), wanted[0])


def test_without_kernels_a_model_from_elsewhere_runs(monkeypatch: pytest.MonkeyPatch, alone: list[int]) -> None:
    network, ids = packed(), tiny.token_windows(1, 8)[0]
    monkeypatch.setattr(block, "library", lambda: None)
    alone.clear()
    decode(network, ids)
    assert not alone


@pytest.mark.parametrize("tile", [1 << 26, 2 * 64 * 2])
def test_the_gradient_of_a_bare_product(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "TILE", tile)

    def random() -> Packed:
        mask_OI = torch.rand(6, 64) < 0.5
        return pack(torch.randn(6, 64).bfloat16() * mask_OI, mask_OI)

    one, two = random(), random()
    x = torch.randn(20, 64).bfloat16().requires_grad_()
    y = kernels.sparse_linear(x, one.mask, one.offsets, one.values, None, 64, 0)
    kernels.sparse_linear(x, two.mask, two.offsets, two.values * 2, None, 64, 0)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    wanted = unpack(one, torch.bfloat16).float().sum(0).expand(20, -1)
    torch.testing.assert_close(grad.float(), wanted, rtol=2e-2, atol=2e-2)


def test_two_threads_at_once() -> None:
    network = packed(num_hidden_layers=4)
    texts = tiny.token_windows(2, 60)
    wanted = [decode(network, ids) for ids in texts]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            for a, b in zip(pool.map(lambda ids: decode(network, ids), texts), wanted, strict=True):
                assert torch.equal(a, b)
