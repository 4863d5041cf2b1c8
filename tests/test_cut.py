"""The blocks of any network, found by identity and called as the network calls them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import nets
import pytest
import torch
import zoo
from test_zoo import LISTED
from torch import Tensor, nn

import prunella
from prunella.model.checkpoint import Checkpoint
from prunella.model.cut import WHOLE, find_stacks
from prunella.model.network import Model
from prunella.samples import Batch, Samples
from prunella.stream import Stream
from prunella.tasks.text import Text
from prunella.trees import tensors
from prunella.unlabelled import through

# Of each stack: how many blocks, the first and the last.
STACKS = {
    "resnet": [(10, "resnet.embedder.embedder.convolution", "resnet.encoder.stages.2.layers.1")],
    "efficientnet": [(7, "efficientnet.embeddings.convolution", "efficientnet.encoder.top_conv")],
    "convnext": [(10, "convnext.embeddings.patch_embeddings", "convnext.encoder.stages.2.layers.0")],
    "vit": [(5, "vit.embeddings", "vit.layers.3")],
    "swin": [
        (3, "swin.encoder.layers.0.blocks.0", "swin.encoder.layers.0.downsample"),
        (2, "swin.encoder.layers.1.blocks.0", "swin.encoder.layers.1.blocks.1"),
    ],
    "bert": [(5, "bert.encoder.layer.0", "bert.pooler")],
    "t5": [(3, "encoder.block.0", "encoder.block.2"), (3, "decoder.block.0", "decoder.block.2")],
    "whisper": [
        (3, "model.encoder.layers.0", "model.encoder.layers.2"),
        (3, "model.decoder.layers.0", "model.decoder.layers.2"),
    ],
}


def assert_walked(model: Model, samples: Samples, **options: Any) -> Stream:
    """All blocks, one after the other, give what the network gives."""
    stream = Stream(model, samples, **options)
    for _, block in model.walk():
        stream.advance(block)
    for number, batch in enumerate(stream.batches):
        with torch.no_grad():
            whole = model.task.run(model.network, batch)
        found = tensors(stream.outputs(number))
        assert len(found) == len(tensors(whole)) > 0
        for ours, theirs in zip(found, tensors(whole), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    return stream


def names(model: Model) -> list[list[str]]:
    return [list(stack) for stack in model.stacks]


# ---------------------------------------------------------------------------------------------------------
# Networks of transformers


@pytest.mark.parametrize("kind", list(nets.KINDS))
def test_the_blocks_are_found_and_give_what_the_network_gives(kind: str) -> None:
    samples = nets.samples_of(kind)
    model = nets.wrapped(nets.build(kind), samples)
    assert [(len(stack), stack[0], stack[-1]) for stack in model.stacks] == STACKS[kind]
    stream = assert_walked(model, samples)
    assert len(stream.batches) >= len(samples.groups)
    assert model.interface is not None
    assert model.interface.stateful == (kind == "t5")  # whose first block hands a table to the others


@pytest.mark.parametrize("kind", ["resnet", "whisper"])
def test_one_shape_goes_through_a_layer_together_and_several_do_not(kind: str) -> None:
    samples = nets.samples_of(kind)
    model = nets.wrapped(nets.build(kind), samples)
    assert len(assert_walked(model, Samples(samples.groups[:1]), order="layer").batches) == 1
    with pytest.raises(prunella.InputError, match="several shapes"):
        Stream(model, samples, order="layer")


@pytest.mark.parametrize("kind", ["resnet", "bert", "t5"])
def test_on_the_meta_device_the_same_blocks_are_found(kind: str) -> None:
    network = nets.build(kind)
    task = nets.Sum(nets.samples_of(kind).groups[0])
    assert find_stacks(network.to("meta"), task) == find_stacks(nets.build(kind), task)


@pytest.mark.parametrize("kind", ["vit", "swin", "t5"])
def test_a_sample_alone_is_what_it_is_among_others(kind: str) -> None:
    samples = nets.samples_of(kind)
    model = nets.wrapped(nets.build(kind), samples)
    stream = Stream(model, samples)
    last = model.spans[-1].stop - 1
    for index, block in model.walk():
        run = stream.runner(block, {})
        alone = [run({}, n) for n in range(len(samples))]
        stream.advance(block)
        if index == last or model.stack_of(index) == model.stack_of(index + 1):
            for n, found in enumerate(alone):
                torch.testing.assert_close(found, stream.window(n), rtol=1e-4, atol=1e-5)


def test_the_loss_is_the_tasks_after_the_last_block() -> None:
    samples = nets.samples_of("resnet")
    model = nets.wrapped(nets.build("resnet"), samples)
    stream = through(model, samples, what="loss")
    for number, batch in enumerate(stream.batches):
        with torch.no_grad():
            expected = model.task.losses(model.network(**batch), batch)
        assert torch.equal(model.task.losses(stream.outputs(number), batch), expected)


def test_a_cache_that_blocks_write_into_is_refused() -> None:
    class Caching(nets.Sum):
        def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
            return network(**batch, use_cache=True)

    samples = nets.samples_of("t5")
    model = Model(nets.build("t5"), None, None, torch.device("cpu"), "test", Caching(samples.groups[0]))
    with pytest.raises(prunella.ModelError, match="block 3 gives something else each time it is run"):
        Stream(model, samples)


@pytest.mark.parametrize("kind", ["resnet", "t5", "whisper"])
def test_weights_are_read_block_by_block_running_means_among_them(kind: str, tmp_path: Path) -> None:
    """Persistent buffers are weights: a network on the meta device has the file's, not those it was made with."""
    network: Any = nets.build(kind)
    samples = Samples(nets.samples_of(kind).groups[:1])
    task = nets.Sum(samples.groups[0])
    with torch.no_grad():
        expected = task.run(network, samples.groups[0]).logits
    network.save_pretrained(tmp_path)
    with accelerate.init_empty_weights(include_buffers=False):
        empty = type(network)(network.config).eval()
    model = Model(empty, None, Checkpoint(tmp_path), torch.device("cpu"), "test", task)
    assert model.stacks == nets.wrapped(network, samples).stacks
    stream = through(model, samples, what="nothing")
    assert all(parameter.is_meta for parameter in empty.parameters())
    with model.outside():
        found = [stream.outputs(number).logits for number in range(len(stream.batches))]
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)


def test_the_second_stack_of_a_stream_beside_another_follows_its_own_first() -> None:
    samples = Samples(nets.samples_of("whisper").groups[:1])
    model = nets.wrapped(nets.build("whisper"), samples)
    stream = Stream(model, samples, beside=True)
    assert stream.dense is not None
    for index, block in model.walk():
        stream.advance(block, stream.dense)
        halved = {name: value / 2 for name, value in block.tensors().items()}
        with block.use(halved if index == 0 else {}):
            stream.advance(block)
    with torch.no_grad():
        whole = model.task.run(model.network, samples.groups[0]).logits
    assert not torch.equal(stream.outputs(0).logits, whole)
    stream.hidden = stream.dense
    assert torch.equal(stream.outputs(0).logits, whole)


# ---------------------------------------------------------------------------------------------------------
# Networks by hand


class Layer(nn.Module):
    def __init__(self, width: int = 8, inplace: bool = False):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.act = nn.ReLU(inplace)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        x = x + self.linear(x)
        for tensor in more:
            x = x * tensor
        return self.act(x)  # type: ignore[no-any-return]


class Net(nn.Module):
    """Three layers, and a way to go through them."""

    def __init__(self, way: Callable[[Any, Tensor], Tensor], inplace: bool = False):
        super().__init__()
        self.layers = nn.ModuleList(Layer(inplace=inplace) for _ in range(4))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def through_all(net: Any, x: Tensor) -> Tensor:
    for layer in net.layers:
        x = layer(x)
    return x


def with_a_mask(net: Any, x: Tensor) -> Tensor:
    mask = (x > 0).float()  # from before the first block
    for layer in net.layers:
        x = layer(x, mask)
    return x


def with_a_table_from_inside(net: Any, x: Tensor) -> Tensor:
    x = net.layers[1](net.layers[0](x))
    table = x.sigmoid()
    return net.layers[3](net.layers[2](x), table)  # type: ignore[no-any-return]


def with_a_skip_to_the_head(net: Any, x: Tensor) -> Tensor:
    one = net.layers[1](net.layers[0](x))
    return net.layers[3](net.layers[2](one)) + one  # type: ignore[no-any-return]


def one_twice(net: Any, x: Tensor) -> Tensor:
    for layer in (*net.layers, net.layers[0]):
        x = layer(x)
    return x


def in_branches(net: Any, x: Tensor) -> Tensor:
    return sum((layer(x) for layer in net.layers[1:]), net.layers[0](x))


def model_of(way: Callable[[Any, Tensor], Tensor], **options: Any) -> tuple[Model, Samples]:
    torch.manual_seed(3)
    samples = Samples.of([{"x": torch.randn(4, 5, 8)}, {"x": torch.randn(3, 2, 8)}])
    return nets.wrapped(Net(way, **options), samples), samples


ALL = [f"layers.{i}" for i in range(4)]


@pytest.mark.parametrize(
    ("way", "stacks"),
    [
        (through_all, [ALL]),
        (with_a_mask, [ALL]),
        (with_a_table_from_inside, [ALL[:2], ALL[2:]]),
        (with_a_skip_to_the_head, [ALL[:2], ALL[2:]]),
        (one_twice, [ALL[1:]]),
        (in_branches, [[""]]),
    ],
)
def test_a_chain_is_cut_where_more_than_one_thing_passes(
    way: Callable[[Any, Tensor], Tensor], stacks: list[list[str]]
) -> None:
    model, samples = model_of(way)
    assert names(model) == stacks
    assert_walked(model, samples)


def test_what_is_no_chain_is_one_block_and_all_that_it_puts_out_is_kept() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, scale: Tensor) -> Any:
            return {"left": self.left(x) * scale, "both": (self.right(x), {"x": x})}

    torch.manual_seed(0)
    samples = Samples.of({"x": torch.randn(4, 8), "scale": torch.randn(4, 8)})
    model = nets.wrapped(Two(), samples)
    assert model.stacks == WHOLE
    assert model.undivided
    assert model.block_of("left.weight") == ""
    stream = assert_walked(model, samples)
    assert set(stream.outputs(0)) == {"left", "both"}
    assert torch.equal(stream.window(2)["left"], stream.hidden[0]["left"][2:3])


def test_a_block_that_works_in_place_gets_a_copy() -> None:
    network = nn.Sequential(nn.Linear(8, 8), nn.Hardswish(inplace=True), nn.Linear(8, 8), nn.Hardswish(True))
    torch.manual_seed(0)
    samples = Samples.of({"input": torch.randn(4, 8)})
    model = nets.wrapped(network, samples)
    assert names(model) == [["0", "1", "2"]]
    stream = Stream(model, samples)
    for _, block in model.walk():
        before = stream.hidden[0].clone()
        stream.run(block, stream.hidden, 0)
        assert torch.equal(stream.hidden[0], before)
        stream.advance(block)
    assert torch.equal(stream.outputs(0), network(**samples.groups[0]))


def test_a_block_that_overwrites_its_input_unsaid_is_refused() -> None:
    class Over(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.linear(x))

    torch.manual_seed(0)
    samples = Samples.of({"input": torch.randn(4, 8)})
    model = nets.wrapped(nn.Sequential(*(Over() for _ in range(3))), samples)
    with pytest.raises(prunella.ModelError, match="overwrites what it is given"):
        assert_walked(model, samples)


def test_a_weight_that_is_used_elsewhere_is_in_no_block() -> None:
    network = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    network[4].weight = network[0].weight
    samples = Samples.of({"input": torch.randn(4, 8)})
    assert names(nets.wrapped(network, samples)) == [["1", "2", "3"]]


def test_an_example_that_does_not_run_is_said() -> None:
    with pytest.raises(prunella.ModelError, match="Linear does not run on the example of its task, 'sum'"):
        nets.wrapped(nn.Linear(8, 8), Samples.of({"input": torch.randn(4, 7)}))


def test_a_task_without_an_example_has_one_block() -> None:
    class Without(nets.Sum):
        def example(self, network: nn.Module) -> Any:
            raise NotImplementedError

    network = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    samples = Samples.of({"input": torch.randn(4, 8)})
    model = Model(network, None, None, torch.device("cpu"), "", Without(samples.groups[0]))
    assert model.stacks == WHOLE
    assert_walked(model, samples)


# ---------------------------------------------------------------------------------------------------------
# Language models


# Blocks that share more than the hidden state, and networks whose head has matrices that a chain would take in.
NOT_BY_IDENTITY = {"deepseek_v4", "gemma3n_text", "gemma4_text", "hy_v4", "qwen4_exp_text", "zamba", "zamba2"}


QUICK = {"llama", "gpt2", "bloom", "mamba"}


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in QUICK else pytest.mark.slow)
        for kind in LISTED["Pruned"]
        if kind not in NOT_BY_IDENTITY
    ],
)
def test_every_language_model_has_the_same_blocks_by_identity(kind: str) -> None:
    class Unknown(Text):
        """Text, of whose networks nothing is known."""

        def stacks(self, network: nn.Module) -> None:
            return None

        def example(self, network: nn.Module) -> Batch:
            return {"input_ids": torch.arange(3, 19)[None]}

    network = zoo.build(kind)
    assert find_stacks(network, Unknown()) == Text().stacks(network)
