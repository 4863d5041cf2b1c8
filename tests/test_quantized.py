from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import prunella
from prunella import ModelError, load_model
from prunella.model.quantized import dequantize

FP8 = torch.float8_e4m3fn


def quantize(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """FP8 values, and what each block of them is to be multiplied by."""
    rows, columns = (-(-size // wide) for size, wide in zip(weight.shape, block, strict=True))
    values, scale = torch.empty(weight.shape, dtype=FP8), torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            part = (slice(r * block[0], (r + 1) * block[0]), slice(c * block[1], (c + 1) * block[1]))
            scale[r, c] = weight[part].abs().max() / 448
            values[part] = (weight[part] / scale[r, c]).to(FP8)
    return values, scale


@pytest.mark.parametrize(
    ("shape", "block", "said"),
    [
        ((256, 128), (128, 128), None),
        ((192, 320), (128, 128), None),  # blocks at the edge are smaller: 192 rows are not two times 96
        ((192, 320), (128, 128), (128, 128)),
        ((64, 96), (16, 32), (16, 32)),
        ((64, 96), (32, 48), None),  # equal parts, where 128 is no answer
        ((64, 96), (64, 96), None),
        ((64, 96), (1, 96), None),
        ((64, 96), (1, 32), None),
    ],
)
def test_every_value_is_multiplied_by_the_scale_of_its_block(
    shape: tuple[int, int], block: tuple[int, int], said: tuple[int, int] | None
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).cumsum(0)
    values, scale = quantize(weight, block)
    found = dequantize(values, scale, said)
    assert found is not None
    rows, columns = torch.arange(shape[0]) // block[0], torch.arange(shape[1]) // block[1]
    assert torch.equal(found, (values.float() * scale[rows][:, columns]).bfloat16())
    assert ((found.float() - weight).abs() <= weight.abs() / 8 + scale.max()).all()


def test_a_scale_may_be_a_number_a_column_or_a_row_of_rows_and_must_fit() -> None:
    values = torch.randn(4, 6).to(FP8)
    expected = (values.float() * 2).bfloat16()
    for scale in (torch.tensor(2.0), torch.full((1,), 2.0), torch.full((4, 1), 2.0), torch.full((4,), 2.0)):
        found = dequantize(values, scale, None)
        assert found is not None
        assert torch.equal(found, expected)
    assert dequantize(values, torch.ones(7, 1), None) is None
    assert dequantize(values, torch.ones(3, 4, 1), None) is None


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    """A tiny LLaMA whose projections are FP8 in blocks of 16, as DeepSeek and Qwen publish theirs, in several files;
    what it is worth is beside it, as plain tensors."""
    path = tmp_path / "fp8"
    tiny.build(dtype=torch.bfloat16).save_pretrained(path, max_shard_size="30KB")
    plain: dict[str, Tensor] = {}
    weight_map: dict[str, str] = {}
    scales: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            tensors[name], scale = quantize(tensors[name].float(), (16, 16))
            scales[f"{name}_scale_inv"] = scale
            plain[name] = dequantize(tensors[name], scale, (16, 16))  # type: ignore[assignment]
        plain = {name: tensor for name, tensor in tensors.items() if tensor.dtype != FP8} | plain
        weight_map |= dict.fromkeys(tensors, file.name)
        save_file(tensors, file, {"format": "pt"})
    save_file(scales, path / "model-scales.safetensors", {"format": "pt"})
    weight_map |= dict.fromkeys(scales, "model-scales.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    say_quantized(path, quant_method="fp8", weight_block_size=[16, 16], activation_scheme="dynamic")
    save_file(plain, tmp_path / "plain.safetensors")
    return path


def say_quantized(directory: Path, **said: Any) -> None:
    config = json.loads((directory / "config.json").read_text()) | {"quantization_config": said}
    (directory / "config.json").write_text(json.dumps(config))


def test_fp8_is_read_times_its_scales(fp8: Path) -> None:
    expected = load_file(fp8.parent / "plain.safetensors")
    model = load_model(str(fp8))
    assert model.dtype == torch.bfloat16
    with model.whole() as network:
        found = network.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    theirs = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.bfloat16).state_dict()  # transformers says the same
    assert all(torch.equal(theirs[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("format_", ["dense", "packed"])
def test_what_is_pruned_of_fp8_is_a_plain_model(fp8: Path, tmp_path: Path, ids: Tensor, format_: str) -> None:
    recipe = {"steps": ["wanda"], "skip": ["layers.0"], "format": format_}
    prunella.prune(fp8, recipe, output=tmp_path / "out", calibration=ids)
    files = {k: t for path in (tmp_path / "out").glob("*.safetensors") for k, t in load_file(path).items()}
    assert not any("scale_inv" in name for name in files)
    assert not any(tensor.dtype == FP8 for tensor in files.values())
    expected = load_file(fp8.parent / "plain.safetensors")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, tensor in expected.items():
        if "layers.1" not in name:
            assert torch.equal(network.get_parameter(name), tensor), name
    kept = network.model.layers[1].mlp.up_proj.weight
    whole = expected["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(kept[kept != 0], whole[kept != 0])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("quantization_config", {}).get("quant_method") == (None if format_ == "dense" else "prunella")


def test_scales_of_activations_and_of_whole_tensors_are_read_and_dropped(tmp_path: Path, ids: Tensor) -> None:
    """As llm-compressor and fbgemm write FP8."""
    tiny.build(dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    expected = {}
    for number, name in enumerate([name for name in tensors if name.endswith("_proj.weight")]):
        rows = tensors[name].shape[0] if number % 2 else 1
        values, scale = quantize(tensors[name].float(), (tensors[name].shape[0] // rows, tensors[name].shape[1]))
        scale = scale.bfloat16() if rows > 1 else scale.flatten()
        expected[name] = (values.float() * scale.float().reshape(-1, 1)).bfloat16()
        module = name.removesuffix(".weight")
        tensors |= {name: values, f"{name}_scale": scale, f"{module}.input_scale": torch.ones(1)}
    save_file(tensors, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    say_quantized(tmp_path / "m", quant_method="compressed-tensors", format="float-quantized")
    with load_model(str(tmp_path / "m")).whole() as network:
        assert all(torch.equal(network.get_parameter(name), tensor) for name, tensor in expected.items())
    prunella.prune(tmp_path / "m", {"steps": ["magnitude"]}, output=tmp_path / "out", calibration=ids)
    assert not any("scale" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


def test_a_dense_compressed_tensors_checkpoint_is_read(tmp_path: Path, ids: Tensor) -> None:
    tiny.build().save_pretrained(tmp_path / "m")
    say_quantized(tmp_path / "m", quant_method="compressed-tensors", format="dense", quantization_status="frozen")
    prunella.prune(tmp_path / "m", {"steps": ["magnitude"]}, output=tmp_path / "out", calibration=ids)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("method", "part", "named"),
    [
        (None, "qweight", "GPTQ or AWQ"),
        ("gptq", "qweight", "gptq"),
        ("awq", "qweight", "awq"),
        ("bitsandbytes", "weight", "bitsandbytes"),
        (None, "weight.absmax", "bitsandbytes"),
        ("mxfp4", "weight", "mxfp4"),
        ("compressed-tensors", "weight_packed", "compressed-tensors"),
        (None, "SCB", "bitsandbytes"),
    ],
)
def test_other_quantizations_are_refused_by_name(tmp_path: Path, method: str | None, part: str, named: str) -> None:
    tiny.build().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name.removesuffix("weight") + part] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    if method:
        say_quantized(tmp_path, quant_method=method)
    with pytest.raises(ModelError) as error:
        load_model(str(tmp_path))
    assert str(error.value) == f"'{tmp_path}' is quantized ({named}): dequantize it before pruning."


def test_integers_in_place_of_one_weight_are_refused_before_any_is_read(tmp_path: Path) -> None:
    tiny.build().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors |= {name: tensors[name].to(torch.int8), f"{name}_scale": torch.ones(64, 1)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"tensor '{name}' .* is stored as I8"):
        load_model(str(tmp_path))
