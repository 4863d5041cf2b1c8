"""An allocation from a file of a third party's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

import prunella
from prunella import InputError

TOY = f"{Path(__file__).parent / 'extensions' / 'toy_allocation.py'}:toy"


@pytest.mark.parametrize("step", ["magnitude", "wanda", "sparsegpt"])
def test_an_allocation_from_a_file_spends_the_whole_budget(step: str, ids: Tensor) -> None:
    network = tiny.build()
    recipe = {"steps": [step], "allocate": {TOY: {"bend": 0.3}}, "sparsity": 0.4, "evaluate": {"source": None}}
    report = prunella.prune(network, recipe, calibration=ids)
    sizes = torch.tensor([float(torch.tensor(layer.shape).prod()) for layer in report.layers])
    shares = torch.tensor([layer.sparsity for layer in report.layers])
    assert shares.std() > 0.02
    assert (shares * sizes).sum() / sizes.sum() == pytest.approx(0.4, abs=5e-3)  # whole weights of rows


def test_its_options_are_checked(ids: Tensor) -> None:
    with pytest.raises(InputError, match="unknown option of allocation"):
        prunella.prune(tiny.build(), {"steps": ["magnitude"], "allocate": {TOY: {"bond": 1}}}, calibration=ids)
