from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prunella import ModelError, load_model

LENGTH = 256  # of which Llama 3.1's way of stretching makes 8 times as much


def llama3_factors(base: float = 10_000.0, pairs: int = 4, factor: float = 8.0) -> np.ndarray:
    """What llama.cpp's converter stores for rope_type llama3."""
    out = []
    for pair in range(pairs):
        wavelength = 2 * math.pi * base ** (pair / pairs)
        if wavelength < LENGTH / 4:
            out.append(1.0)
        elif wavelength > LENGTH:
            out.append(factor)
        else:
            smooth = (LENGTH / wavelength - 1) / 3
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


def scaling(kind: str, **more: float) -> Callable[[Any], None]:
    def add(writer: Any) -> None:
        writer.add_string("llama.rope.scaling.type", kind)
        for key, value in more.items():
            writer.add_float32(f"llama.rope.scaling.{key}", value)

    return add


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (scaling("none"), {"rope_type": "default"}),
        (scaling("linear", factor=4.0), {"rope_type": "linear", "factor": 4.0}),
        (lambda w: w.add_float32("llama.rope.scale_linear", 2.0), {"rope_type": "linear", "factor": 2.0}),
        (
            lambda w: (
                scaling("yarn", factor=4.0)(w),
                w.add_uint32("llama.rope.scaling.original_context_length", 64),
            ),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, dtype=np.float32)), {"rope_type": "default"}),
        (
            lambda w: w.add_tensor("rope_freqs.weight", llama3_factors()),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": LENGTH,
            },
        ),
    ],
)
def test_stretched_positions_reach_the_config(
    llama: Path, tmp_path: Path, more: Callable[[Any], object], expected: dict[str, Any]
) -> None:
    tiny.write_gguf(tmp_path / "tiny.gguf", llama, more=more)
    model = load_model(str(tmp_path / "tiny.gguf"))
    found = model.network.config.rope_parameters
    assert {key: found[key] for key in expected} == expected
    assert found["rope_theta"] == 10_000.0
    # The rotary frequencies are those of a model with this config.
    config = AutoConfig.from_pretrained(llama)
    config.rope_parameters = {**config.rope_parameters, **expected}
    wanted = AutoModelForCausalLM.from_config(config).model.rotary_emb.inv_freq
    torch.testing.assert_close(model.network.model.rotary_emb.inv_freq, wanted)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (scaling("longrope", factor=4.0), "type 'longrope'"),
        (scaling("yarn", factor=4.0, yarn_log_multiplier=0.1), "rope.scaling.yarn_log_multiplier"),
        (scaling("linear", factor=4.0, attn_factor=1.5), "rope.scaling.attn_factor"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.array([1, 2, 1, 3], dtype=np.float32)), "rope_freqs.weight"),
        (lambda w: w.add_tensor("rope_factors_long.weight", np.ones(4, dtype=np.float32)), "rope_factors_long.weight"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(32, dtype=np.float32)), "blk.0.attn_q.bias"),
    ],
)
def test_what_a_config_cannot_say_is_refused_by_name(
    llama: Path, tmp_path: Path, cache: Path, more: Callable[[Any], object], named: str
) -> None:
    path = tmp_path / "tiny.gguf"
    tiny.write_gguf(path, llama, more=more)
    with pytest.raises(ModelError, match="original safetensors") as error:
        load_model(str(path))
    assert named in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_one_part_of_several_is_refused(llama: Path, tmp_path: Path) -> None:
    def part(writer: Any) -> None:
        writer.add_uint16("split.no", 1)
        writer.add_uint16("split.count", 3)

    tiny.write_gguf(tmp_path / "tiny.gguf", llama, more=part)
    with pytest.raises(ModelError, match=r"is part 2 of a GGUF file in 3 parts: put them together first"):
        load_model(str(tmp_path / "tiny.gguf"))


def test_a_tensor_that_the_file_lacks_is_named(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import GGUFWriter

    add = GGUFWriter.add_tensor
    monkeypatch.setattr(
        GGUFWriter, "add_tensor", lambda self, name, data: None if "blk.1.ffn_up" in name else add(self, name, data)
    )
    tiny.write_gguf(tmp_path / "tiny.gguf", llama)
    with pytest.raises(ModelError, match=r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' is missing from '.*gguf'"):
        load_model(str(tmp_path / "tiny.gguf"))
