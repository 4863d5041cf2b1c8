from __future__ import annotations

import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import prunella
from prunella import NumericalError, Perplexity, load_model, perplexity
from prunella.evaluate.difference import difference
from prunella.model.checkpoint import Checkpoint
from prunella.tasks.text import wrap_model


def plain_losses(network: object, ids: Tensor) -> list[float]:
    """The loss that transformers itself computes, window by window."""
    with torch.no_grad():
        return [network(row[None], labels=row[None]).loss.item() for row in ids]  # type: ignore[operator]


def test_an_interval_takes_little_memory_and_is_the_same_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)

    def some(count: int) -> Perplexity:
        nll = random.normal(3, 1, count)
        return Perplexity(math.exp(nll.mean()), count, 32, tuple(nll.tolist()))

    one, other = some(50), some(50)
    found = difference(one, other)
    monkeypatch.setattr("prunella.evaluate.difference._DRAWN", 777)
    assert difference(one, other) == found
    monkeypatch.undo()
    one, other = some(1500), some(1500)
    tracemalloc.start()
    difference(one, other)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100e6  # 360e6 at once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt", "bloom", "mamba", "mixtral", "cohere2"])
def test_perplexity_is_the_plain_transformers_computation(architecture: str, dtype: torch.dtype, ids: Tensor) -> None:
    network = tiny.build(architecture, dtype=dtype)
    expected = plain_losses(network, ids)
    found = perplexity(wrap_model(network), ids)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    assert found.nll == pytest.approx(expected, rel=tolerance)
    assert found.perplexity == pytest.approx(math.exp(sum(found.nll) / 5))
    assert (found.windows, found.length) == (5, 32)


def test_every_window_is_scored_on_its_own() -> None:
    model, ids = wrap_model(tiny.build()), tiny.token_windows(40, 64)
    whole = perplexity(model, ids)
    assert perplexity(model, ids.flip(0)).nll == pytest.approx(whole.nll[::-1], rel=1e-5)
    for n in (0, 33, 39):
        assert perplexity(model, ids[n : n + 1]).nll[0] == pytest.approx(whole.nll[n], rel=1e-5)


def test_a_model_on_disk_scores_as_one_in_memory(llama: Path, ids: Tensor) -> None:
    network = AutoModelForCausalLM.from_pretrained(llama)
    assert perplexity(load_model(str(llama)), ids) == perplexity(wrap_model(network), ids)


def test_weights_may_come_from_another_checkpoint(llama: Path, tmp_path: Path, ids: Tensor) -> None:
    prunella.prune(llama, {"steps": ["wanda"]}, output=tmp_path / "out", calibration=ids)
    model = load_model(str(llama))
    before = perplexity(model, ids)
    found = perplexity(model, ids, checkpoint=Checkpoint(tmp_path / "out"))
    assert found == perplexity(load_model(str(tmp_path / "out")), ids)
    assert found != before
    assert perplexity(model, ids) == before


def test_an_enormous_loss_is_still_a_number(ids: Tensor) -> None:
    network = tiny.build()
    network.lm_head.weight.data *= 1e5
    found = perplexity(wrap_model(network), ids)
    assert math.isfinite(found.perplexity)
    assert sum(found.nll) / 5 > 700


@pytest.mark.parametrize(
    "parameter",
    [
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_a_damaged_weight_is_named(parameter: str, ids: Tensor, tmp_path: Path) -> None:
    network = tiny.build()
    network.get_parameter(parameter).data.view(-1)[::3] = float("nan")
    with pytest.raises(NumericalError, match=parameter):
        perplexity(wrap_model(network), ids)
    network.save_pretrained(tmp_path)
    with pytest.raises(NumericalError, match=parameter):
        perplexity(load_model(str(tmp_path)), ids)


def test_activations_that_overflow_name_the_first_block(ids: Tensor) -> None:
    network = tiny.build()
    network.model.layers[1].input_layernorm.weight.data[:] = 1e38
    network.model.layers[1].self_attn.v_proj.weight.data[:] = 1e38
    with pytest.raises(NumericalError, match=r"model\.layers\.1"):
        perplexity(wrap_model(network), ids)
