"""The masks of a pruned network, held in trainings that are not ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from healing import prune_in_memory
from transformers import Trainer, TrainingArguments

from prunella import InputError
from prunella.train.callback import HoldMasks, hold


def zeros(network: Any) -> dict[str, torch.Tensor]:
    return {name: value == 0 for name, value in network.named_parameters() if "proj" in name or "c_" in name}


@pytest.mark.parametrize("architecture", ["llama", "gpt2", pytest.param("mixtral", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_zeros_are_held_in_any_loop(architecture: str, optimizer: Any) -> None:
    """Though the optimizer has moments of pruned weights, from before."""
    network = tiny.build(architecture)
    training = optimizer(network.parameters(), lr=1e-2, **({"momentum": 0.9} if optimizer is torch.optim.SGD else {}))
    ids = tiny.token_windows(2, 16)

    def step() -> None:
        network(input_ids=ids, labels=ids).loss.backward()
        training.step()
        training.zero_grad()

    step()
    model, masks = prune_in_memory(network)
    model.give_back()
    before = zeros(network)
    assert any(zero.any() for zero in before.values())
    kept = {name: value.clone() for name, value in network.named_parameters()}
    with hold(network, masks):
        for _ in range(2):
            step()
    after = zeros(network)
    assert all(not (zero & ~after[name]).any() for name, zero in before.items())
    assert all(not torch.equal(value, kept[name]) for name, value in network.named_parameters() if name in before)
    step()
    assert any((zero & ~zeros(network)[name]).any() for name, zero in before.items())  # nothing is held any more


def test_a_trainer_holds_them(tmp_path: Path) -> None:
    network = tiny.build("llama")
    model, _ = prune_in_memory(network)
    model.give_back()
    before = zeros(network)
    data = [{"input_ids": ids, "labels": ids} for ids in tiny.token_windows(8, 16)]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True
    )
    kept = network.model.layers[0].mlp.up_proj.weight.clone()
    Trainer(network, arguments, train_dataset=data, callbacks=[HoldMasks()]).train()
    assert all(torch.equal(zeros(network)[name], zero) for name, zero in before.items())
    assert not torch.equal(network.model.layers[0].mlp.up_proj.weight, kept)


def test_what_cannot_be_held_is_said() -> None:
    network = tiny.build("llama")
    for masks, message in (
        (None, "there are no zeros to hold"),
        ({"model.layers.0.mlp.up": torch.ones(2, 2, dtype=torch.bool)}, "is neither a layer nor a parameter"),
        ({"lm_head.weight": torch.ones(2, 2, dtype=torch.bool)}, r"is \(2, 2\), not"),
    ):
        with pytest.raises(InputError, match=message), hold(network, masks):
            pass
