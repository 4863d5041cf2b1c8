"""The built-in model, once: what no random model can show."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import prunella

pytestmark = pytest.mark.slow


def test_wanda_at_half_keeps_the_built_in_model_a_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PRUNELLA_CACHE")  # the user's own: it may hold the model already
    recipe = {
        "steps": ["wanda"],
        "calibration": {"source": "pydoc", "samples": 8, "length": 256},
        "evaluate": {"source": "pydoc", "windows": 4},
    }
    report = prunella.prune("smollm2-135m", recipe, output=tmp_path / "out")
    assert report.sparsity == 0.5
    assert {layer.sparsity for layer in report.layers} == {0.5}
    assert len(report.layers) == 30 * 7
    dense, pruned = report.dense["perplexity"], report.pruned["perplexity"]
    assert 2 < dense < 40
    assert dense < pruned < 3 * dense
    assert math.isfinite(sum(layer.error or 0 for layer in report.layers))
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    for layer in report.layers:
        zeros = (network.get_submodule(layer.name).weight == 0).sum().item()
        assert zeros >= layer.shape[0] * layer.shape[1] // 2, layer.name
    assert network.get_input_embeddings().weight is network.get_output_embeddings().weight
