"""What transformers does not read in a GGUF file: how rotary positions are stretched, and whether it is a part."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelError


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says beside its weights.

    rope:    those of the config's rope_parameters that stretch rotary positions; empty where nothing does
    tensors: names of all tensors
    """

    path: Path
    rope: dict[str, Any]
    tensors: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> GgufHeader:
        """Raises ModelError for one part of several, and for a way of stretching that no config can say."""
        from gguf import GGUFReader

        reader = GGUFReader(path)

        def field(key: str, default: Any = None) -> Any:
            return reader.fields[key].contents() if key in reader.fields else default

        parts = int(field("split.count", 1))
        if parts > 1:
            raise ModelError(
                f"'{path}' is part {int(field('split.no', 0)) + 1} of a GGUF file in {parts} parts: put them together"
                " first (llama-gguf-split --merge FIRST-PART WHOLE.gguf) and give the whole."
            )
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        place = f"{field('general.architecture')}.rope."
        said = {key.removeprefix(place): field(key) for key in reader.fields if key.startswith(place)}
        factors = tensors.get("rope_freqs.weight")
        base = float(said.get("freq_base", 10000.0))
        rope = _scaling(path, said) or (_by_frequency(path, factors.data, base) if factors is not None else {})
        if long := next((name for name in sorted(tensors) if name.startswith("rope_factors")), None):
            raise _unknown(path, f"tensor '{long}'")
        return cls(path, rope, frozenset(tensors))

    def complete(self, network: Any) -> None:
        """Put into the network's config what transformers left out. Raises ModelError where it has no place for it."""
        if any(name.endswith(".bias") for name in self.tensors) and not any("bias" in n for n in network.state_dict()):
            name = min(name for name in self.tensors if name.endswith(".bias"))
            raise ModelError(
                f"'{self.path}' holds '{name}', for which {type(network).__name__} has no place: convert the model"
                " from its original safetensors."
            )
        if not self.rope:
            return
        known = getattr(network.config, "rope_parameters", None)
        if not isinstance(known, dict) or "rope_theta" not in known:
            raise _unknown(self.path, f"{self.rope['rope_type']} in a {network.config.model_type} model")
        network.config.rope_parameters = {**known, **self.rope}


def _scaling(path: Path, said: dict[str, Any]) -> dict[str, Any]:
    """The stretching that the keys `rope.scaling.*` say. A factor without a type is linear, as in llama.cpp."""
    scaling = {key.removeprefix("scaling."): value for key, value in said.items() if key.startswith("scaling.")}
    kind = scaling.pop("type", "linear")
    factor = float(scaling.pop("factor", said.get("scale_linear", 0.0)) or 1.0)
    length = scaling.pop("original_context_length", None)
    scaling.pop("finetuned", None)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return {}
    rope: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        for key, name in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
            if key in scaling:
                rope[name] = float(scaling.pop(key))
        if length is not None:
            rope["original_max_position_embeddings"] = int(length)
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if scaling.get(key) == 1.0:  # as it is where nothing is said
            del scaling[key]
    if kind not in ("linear", "yarn") or scaling:
        raise _unknown(path, f"rope.scaling.{min(scaling)}" if kind in ("linear", "yarn") else f"type '{kind}'")
    return rope


def _by_frequency(path: Path, factors: Any, base: float) -> dict[str, Any]:
    """Llama 3.1's way of stretching. GGUF stores the divisor of each frequency: find the setting that gives them."""
    factor_F = np.asarray(factors, dtype=np.float64).ravel()
    if np.allclose(factor_F, 1.0):
        return {}
    wavelength_F = 2 * math.pi * base ** (np.arange(len(factor_F)) / len(factor_F))
    factor, low, high = float(factor_F.max()), 1.0, 4.0
    for length in (1 << k for k in range(8, 21)):
        smooth_F = ((length / wavelength_F - low) / (high - low)).clip(0.0, 1.0)
        if np.allclose(factor_F, 1 / ((1 - smooth_F) / factor + smooth_F), rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": length,
            }
    raise _unknown(path, "tensor 'rope_freqs.weight'")


def _unknown(path: Path, what: str) -> ModelError:
    return ModelError(
        f"'{path}' stretches its rotary positions in a way that its config cannot say ({what}): give the model's"
        " original safetensors in place of the GGUF file."
    )
