"""The recipes that come with Prunella."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

import prunella
from prunella import InputError, Recipe
from prunella.recipe import override

NAMES = ["balanced", "best", "fast"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wanted", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "4x1", "sparsity": 0.5}])
def test_a_named_recipe_prunes(name: str, wanted: dict[str, Any]) -> None:
    network = tiny.build("llama")
    report = prunella.prune(network, Recipe.read(name) | wanted, calibration=tiny.token_windows(4, 24))
    assert report.sparsity == pytest.approx(wanted["sparsity"], abs=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_a_pattern_on_the_command_line_goes_before_the_recipe(
    name: str, run: Callable[..., Any], llama: Path, tmp_path: Path
) -> None:
    outcome = run(
        *("prune", llama, "-o", tmp_path / "out", "--recipe", name, "--pattern", "2:4"),
        *("--samples", 4, "--length", 32, "--evaluate", "none"),
    )
    assert outcome.code == 0, outcome.err
    assert all(mask.view(-1, 4).sum(1).eq(2).all() for mask in prunella.read_masks(tmp_path / "out").values())


def test_healed_50_trains_the_dense_model_prunes_it_and_heals(
    run: Callable[..., Any], llama: Path, tmp_path: Path
) -> None:
    small = ("heal.tokens=512", "heal.length=32", "heal.adapt=256", "heal.held_out=2")
    outcome = run(
        *("prune", llama, "-o", tmp_path / "out", "--recipe", "healed-50", "--samples", 4, "--length", 32),
        *("--evaluate", "none", *(word for setting in small for word in ("--set", setting))),
    )
    assert outcome.code == 0, outcome.err
    report = prunella.Report.read(tmp_path / "out")
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert report.healing["tokens"] == 512
    assert report.recipe["model"] == str(llama)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown recipe 'bets'\. Did you mean 'best'") as error:
        Recipe.read("bets")
    assert "Available: balanced, best, best-images, fast, healed-50. Or give a YAML file." in str(error.value)
    with pytest.raises(InputError, match=r"recipe 'missing\.yaml' cannot be read"):
        Recipe.read("missing.yaml")


def test_options_of_an_allocation_can_be_set() -> None:
    plain = override(Recipe.read("best"), ["probe.growth=5", "sparsity=0.6"])
    assert Recipe.of(plain).allocate == {"probe": {"growth": 5}}
    assert override({}, ["allocate=owl", "owl.spread=0.1"])["allocate"] == {"owl": {"spread": 0.1}}
    with pytest.raises(InputError, match=r"unknown option of allocation ramp 'rice'\. Did you mean 'rise'"):
        override({"allocate": "ramp"}, ["ramp.rice=1"])


def test_best_images_prunes_a_network_with_batch_norms() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(n, 8, 3), nn.BatchNorm2d(8), nn.ReLU()) for n in (3, 8, 8)]
    network, pictures = nn.Sequential(*blocks).eval(), torch.randn(20, 3, 10, 10)
    report = prunella.prune(network, Recipe.read("best-images"), calibration=[pictures], loss=_loss)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert list(report.batch_norm["tried"]) == ["keep", "reset", "correct"]


def _loss(outputs: Tensor, batch: Any) -> Tensor:
    return outputs.square().flatten(1).mean(1)
