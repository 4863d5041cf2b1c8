from __future__ import annotations

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
from prunella import InputError, Model, ModelError, NumericalError, load_model
from prunella.back import gradients
from prunella.layers import find_layers
from prunella.model.checkpoint import Checkpoint
from prunella.stream import Stream
from prunella.tasks import text
from prunella.tasks.text import wrap_model

EXACT = ("llama", "gpt2", "mixtral")  # linear layers, transposed ones, experts
Found = dict[tuple[str, int], Tensor]


def next_token_loss(logits_LV: Tensor, ids_L: Tensor) -> Tensor:
    """What the model's gradients are of if nobody says so, in the simplest words."""
    return nn.functional.cross_entropy(logits_LV[:-1], ids_L[1:])


def by_autograd(network: Any, ids: Tensor, loss: Any = next_token_loss) -> Found:
    """The same by one backward pass through the whole network for each window."""
    model = wrap_model(network)
    slots = [slot for name in model.blocks for slot in find_layers(model.module(name), name)]
    parameters = {slot.key: getattr(slot.module, slot.parameter).requires_grad_() for slot in slots}
    found: Found = {}
    for n, ids_L in enumerate(ids):
        value = loss(network(ids_L[None], use_cache=False).logits[0], ids_L)
        grads = dict(zip(parameters, torch.autograd.grad(value, [*parameters.values()]), strict=True))
        found |= {(slot.name, n): slot.read(grads[slot.key]) for slot in slots}
    return found


def collect(model: Model, ids: Tensor, **options: Any) -> Found:
    found: Found = {}
    for _, window, layers in gradients(model, ids, **options):
        found |= {(name, window): gradient for name, gradient in layers.items()}
    return found


def on_disk(network: Any, path: Path) -> Model:
    """A model opened from files, in float64, which files are not read in otherwise."""
    network.float().save_pretrained(path)
    network.double()
    model = load_model(str(path))
    model.network.double()
    return model


def assert_same(found: Found, expected: Found, rtol: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert found[key].shape == gradient.shape, key
        assert gradient.norm() == 0 or (found[key] - gradient).norm() <= rtol * gradient.norm(), key


@pytest.mark.parametrize("files", [False, True], ids=["memory", "files"])
@pytest.mark.parametrize("architecture", EXACT)
def test_gradients_are_those_of_autograd_on_the_whole_network(
    architecture: str, files: bool, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "ROWS", 10)  # several parts of a window's logits, the last one shorter
    network = tiny.build(architecture, num_hidden_layers=3).double()
    model = on_disk(network, tmp_path) if files else wrap_model(network)
    found = collect(model, ids)
    assert_same(found, by_autograd(network, ids))
    weights = {slot.name: slot.shape for name in model.blocks for slot in find_layers(model.module(name), name)}
    assert {(name, tuple(gradient.shape)) for (name, _), gradient in found.items()} == set(weights.items())
    assert sum(gradient.count_nonzero() > 0 for gradient in found.values()) > 0.9 * len(found)


@pytest.mark.parametrize("architecture", ["gemma2", "mamba", "bloom", "gpt_oss", "cohere2"])
def test_of_other_architectures_too(architecture: str, ids: Tensor) -> None:
    """Logits that are scaled or capped, recurrences, experts that are stored the other way round."""
    network = tiny.build(architecture).double()
    assert_same(collect(wrap_model(network), ids[:2]), by_autograd(network, ids[:2]), rtol=1e-6)  # some use float32


def test_the_loss_may_be_any_function_of_logits_and_ids(ids: Tensor) -> None:
    def surprise(logits_LV: Tensor, ids_L: Tensor) -> Tensor:
        return logits_LV.logsumexp(1).square().mean() + logits_LV[ids_L % 7].mean()

    network = tiny.build().double()
    assert_same(collect(wrap_model(network), ids[:2], loss=surprise), by_autograd(network, ids[:2], surprise))


def test_the_losses_are_those_of_perplexity(ids: Tensor) -> None:
    model = wrap_model(tiny.build())
    assert Stream(model, ids, alone=True).back().losses == pytest.approx(prunella.perplexity(model, ids).nll, rel=1e-5)


def test_no_more_than_one_block_is_in_memory(ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.build(num_hidden_layers=4).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    block = sum(parameter.numel() for parameter in model.module(model.blocks[0]).parameters())
    most: set[int] = set()

    def count(*_: Any) -> None:
        most.add(
            sum(
                parameter.numel()
                for name, parameter in model.network.named_parameters()
                if model.block_of(name) and not parameter.is_meta
            )
        )

    load = Model.load

    def spy(model: Model, *arguments: Any) -> None:
        load(model, *arguments)
        count()

    monkeypatch.setattr(Model, "load", spy)
    for module in model.network.modules():
        module.register_forward_pre_hook(count)
    for index, _, _ in gradients(model, ids):
        count()
        outside = [p for name, p in model.network.named_parameters() if not name.startswith(model.blocks[index] + ".")]
        assert all(parameter.is_meta for parameter in outside)
    assert most == {0, block}
    assert all(parameter.is_meta for parameter in model.network.parameters())


def test_states_are_let_go_when_their_block_is_done(ids: Tensor) -> None:
    back = Stream(wrap_model(tiny.build(num_hidden_layers=4)), ids, alone=True).back()
    for index in (3, 2, 1, 0):
        assert len(back._entering) == index + 1
        assert [window for window, _ in back.advance(back.model.at(index))] == list(range(len(ids)))


def test_states_on_disk_give_the_same(ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = collect(wrap_model(tiny.build("mixtral")), ids)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 10))
    model = wrap_model(tiny.build("mixtral"))
    model.scratch = tmp_path / "hidden"
    found = collect(model, ids)
    assert Stream(model, ids, alone=True).back()._entering[0].shelf.on_disk
    assert model.scratch.is_dir()  # they were there
    assert not any(model.scratch.iterdir())  # without names
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())


def test_weights_may_come_from_another_checkpoint(llama: Path, tmp_path: Path, ids: Tensor) -> None:
    prunella.prune(llama, {"steps": ["wanda"], "evaluate": {"source": None}}, output=tmp_path / "out", calibration=ids)
    found = collect(load_model(str(llama)), ids[:2], checkpoint=Checkpoint(tmp_path / "out"))
    expected = collect(load_model(str(tmp_path / "out")), ids[:2])
    assert all(torch.equal(found[key], gradient) for key, gradient in expected.items())


def test_in_bfloat16_they_are_nearly_the_same(ids: Tensor) -> None:
    expected = collect(wrap_model(tiny.build()), ids[:2])
    found = collect(wrap_model(tiny.build().bfloat16()), ids[:2])
    assert {gradient.dtype for gradient in found.values()} == {torch.bfloat16}
    assert_same({key: gradient.float() for key, gradient in found.items()}, expected, rtol=0.1)


def test_the_model_is_left_as_it_was(ids: Tensor) -> None:
    network = tiny.build()
    frozen = network.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():  # whatever the caller has set
        for _ in gradients(wrap_model(network), ids[:1]):
            assert not torch.is_grad_enabled()
    assert not frozen.requires_grad
    assert sum(not parameter.requires_grad for parameter in network.parameters()) == 1
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_what_cannot_be_is_refused(ids: Tensor) -> None:
    with pytest.raises(ModelError, match=r"^the blocks of \w+ pass each other more than the hidden state: .*\.$"):
        next(gradients(wrap_model(zoo.build("zaya")), ids))
    with pytest.raises(InputError, match="single token"):
        next(gradients(wrap_model(tiny.build()), ids[:, :1]))
    network = tiny.build()
    network.lm_head.weight.data[5] = torch.nan
    with pytest.raises(NumericalError, match="the loss of window 0 is not finite"):
        next(gradients(wrap_model(network), ids))
