"""The clock of phases: what stands within another phase counts for itself alone, and no clock costs nothing."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
from torch import Tensor

import prunella
from prunella.phases import measured, phase


def test_a_phase_within_another_counts_for_itself_alone() -> None:
    ticks = itertools.count()
    with measured(lambda: next(ticks)) as clock:  # each turn takes a second
        with phase("forward"), phase("statistics"):
            pass
        with pytest.raises(ValueError, match="why"), phase("solve"), phase("write"):
            raise ValueError("why")
    assert clock.seconds() == {"other": 3, "forward": 2, "statistics": 1, "solve": 2, "write": 1}


def test_nothing_is_marked_where_no_clock_runs() -> None:
    ticks = itertools.count()
    with phase("forward"):
        pass
    with measured(lambda: next(ticks)) as clock:
        beside = threading.Thread(target=phase("load").__enter__)  # what a thread does beside is not waited for
        beside.start()
        beside.join()
    with phase("write"):
        pass
    assert clock.seconds() == {"other": 1}


@pytest.mark.parametrize("order", ["block", "layer"])
def test_a_run_tells_all_phases_apart(order: str, llama: Path, ids: Tensor, tmp_path: Path) -> None:
    recipe = {"steps": ["wanda"], "order": order, "evaluate": {"source": None}}
    with measured() as clock:
        report = prunella.prune(str(llama), recipe, output=tmp_path / "out", calibration=ids)
    spent = clock.seconds()
    assert set(spent) == {"load", "forward", "statistics", "solve", "write", "other"}
    assert min(spent.values()) > 0
    assert sum(spent.values()) >= report.run["seconds"]["all"]
