"""Blocks are called as the model calls them, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tiny
import torch
import zoo
from torch import Tensor, nn

import prunella
from prunella import stream as stream_module
from prunella.model.network import Model
from prunella.stream import Stream
from prunella.tasks.text import Text, wrap_model

# What blocks are called with differs from batch to batch, or travels from block to block.
DEPENDENT = ("gemma4_text", "gemma3n_text", "zamba", "zamba2", "deepseek_v4", "qwen4_exp_text", "inkling_text", "zaya")


@pytest.fixture(autouse=True)
def three_batches(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Six windows that make three batches of one shape."""
    monkeypatch.setattr(stream_module, "TOKENS", 48)
    return tiny.token_windows(6, 24)


def whole(network: Any, ids_BL: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = network(input_ids=ids_BL, use_cache=False).logits
    return logits


@pytest.mark.parametrize("order", ["block", "layer"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", *DEPENDENT])
def test_every_batch_gets_the_models_logits_exactly(kind: str, order: Any, three_batches: Tensor) -> None:
    model = wrap_model(zoo.build(kind))
    stream = Stream(model, three_batches, order=order)
    assert len(stream.batches) == 1 if order == "layer" else len(stream.batches) in (3, 6)
    for _, block in model.walk():
        stream.advance(block)
    for number, batch in enumerate(stream.batches):
        assert torch.equal(stream.outputs(number).logits, whole(model.network, batch["input_ids"]))


@pytest.mark.parametrize("kind", ["llama", *DEPENDENT])
def test_a_window_alone_is_what_it_is_among_others(kind: str, three_batches: Tensor) -> None:
    model = wrap_model(zoo.build(kind))
    stream = Stream(model, three_batches)
    for _, block in model.walk():
        run = stream.runner(block, {})
        alone = [run({}, n) for n in range(len(three_batches))]
        stream.advance(block)
        for n, found in enumerate(alone):
            torch.testing.assert_close(found, stream.window(n), rtol=1e-4, atol=1e-5)


def test_two_streams_beside_each_other_do_not_mix_what_travels(three_batches: Tensor) -> None:
    """Keys and values that blocks share belong to one hidden state, not to the model."""
    model = wrap_model(zoo.build("gemma4_text"))
    stream = Stream(model, three_batches, beside=True)
    assert stream.dense is not None
    for batch in range(len(stream.dense)):
        stream.dense[batch] = stream.dense[batch] + 1.0
    for _, block in model.walk():
        stream.advance(block)
        stream.advance(block, stream.dense)
    last = [stream.outputs(batch).logits for batch in range(len(stream.batches))]
    for logits_BLV, batch in zip(last, stream.batches, strict=True):
        assert torch.equal(logits_BLV, whole(model.network, batch["input_ids"]))


def test_arguments_that_two_batches_have_in_common_are_kept_once(three_batches: Tensor) -> None:
    stream = Stream(wrap_model(zoo.build("gemma4_text", num_kv_shared_layers=0)), three_batches, order="layer")
    stream.calls.record_windows(stream.samples)
    first, second = (calls[0] for calls in stream.calls.windows[:2])
    per_layer_inputs = 0
    assert first.args[per_layer_inputs] is not second.args[per_layer_inputs]
    for name in ("attention_mask", "position_embeddings", "position_ids"):
        assert first.kwargs[name] is second.kwargs[name], name


@pytest.mark.parametrize("kind", ["gemma4_text", "zaya"])
def test_what_does_not_fit_into_memory_waits_on_disk(
    kind: str, three_batches: Tensor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 10))
    model = wrap_model(zoo.build(kind))
    model.scratch = tmp_path / "hidden"
    stream = Stream(model, three_batches)
    assert stream.hidden.shelf.on_disk
    for _, block in model.walk():
        stream.advance(block)
    for number, batch in enumerate(stream.batches):
        assert torch.equal(stream.outputs(number).logits, whole(model.network, batch["input_ids"]))
    assert model.scratch.is_dir()  # they were there
    assert not any(model.scratch.iterdir())  # without names


# ---------------------------------------------------------------------------------------------------------
# What is refused


class Changed(nn.Module):
    """A block in place of another, which it runs."""

    def __init__(self, block: nn.Module, change: Callable[..., Any]):
        super().__init__()
        self.block = block
        self.change = change
        self.attention_type = getattr(block, "attention_type", None)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.change(self.block, hidden_states, *args, **kwargs)


def changed(change: Callable[..., Any], only: int = 1) -> Any:
    network = tiny.build("llama", num_hidden_layers=3)
    network.model.layers[only] = Changed(network.model.layers[only], change)
    return network


def refused(network: Any, ids_NL: Tensor, reason: str) -> None:
    with pytest.raises(prunella.ModelError, match=reason) as caught:
        prunella.perplexity(Model(network, None, None, network.device, "", Text()), ids_NL)  # whatever its config says
    assert type(network).__name__ in str(caught.value)


def test_a_block_that_remembers_is_refused(three_batches: Tensor) -> None:
    seen: list[Tensor] = []

    def remembers(block: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(hidden)
        return block(hidden, *args, **kwargs) + 0.1 * len(seen)

    refused(changed(remembers), three_batches, "block 1 gives something else on its own than inside the model")


def test_a_block_that_overwrites_its_input_is_refused(three_batches: Tensor) -> None:
    def overwrites(block: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden.add_(block(hidden, *args, **kwargs))

    refused(changed(overwrites), three_batches, "block 1 overwrites what it is given")


def test_a_model_that_works_between_its_blocks_is_refused(three_batches: Tensor) -> None:
    network = tiny.build("llama", num_hidden_layers=3)
    network.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0] * 1.0, *args[1:]))
    refused(network, three_batches, "it changes the hidden state between blocks 0 and 1")


def test_a_model_that_calls_a_block_twice_is_refused(three_batches: Tensor) -> None:
    network = tiny.build("llama", num_hidden_layers=2)
    network.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: (network.model.layers[0](*args, **kwargs), *args[1:]), with_kwargs=True
    )
    refused(network, three_batches, "it calls block 0 in place of block 1")


def test_a_second_output_that_the_model_works_on_is_refused(three_batches: Tensor) -> None:
    network = zoo.build("zaya")
    network.model.layers[1].register_forward_pre_hook(lambda module, args: (args[0], args[1] * 2, *args[2:]))
    refused(network, three_batches, "argument '0' of block 1 is made of an earlier block's")


def test_a_head_that_uses_a_second_output_of_the_last_block_is_refused(three_batches: Tensor) -> None:
    refused(zoo.build("reformer"), three_batches, "more than one thing that its last block puts out is used")


@pytest.mark.parametrize("kind", ["bert", "cpmant", "xlnet"])
def test_a_model_that_sees_later_tokens_is_refused(kind: str, three_batches: Tensor) -> None:
    refused(zoo.build(kind), three_batches, "reads a text from both sides")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "mamba"])
def test_a_causal_model_is_not(kind: str, dtype: torch.dtype, three_batches: Tensor) -> None:
    assert prunella.perplexity(wrap_model(tiny.build(kind, dtype=dtype)), three_batches).windows == 6


def test_layers_that_are_spread_over_several_lists_are_refused(three_batches: Tensor) -> None:
    refused(zoo.build("xlm"), three_batches, "it changes the hidden state between blocks 0 and 1")


def test_the_examination_happens_once_a_model(three_batches: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    count: list[int] = []
    real = stream_module.examine
    monkeypatch.setattr(stream_module, "examine", lambda *args: count.append(1) or real(*args))
    model = wrap_model(tiny.build("llama"))
    prunella.perplexity(model, three_batches)
    prunella.perplexity(model, three_batches[:2])
    assert count == [1]
