from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import prunella
from prunella import InputError, ModelError, Recipe, load_model, read_masks
from prunella.model.checkpoint import read_header
from prunella.pattern import pack
from prunella.tensors import MASKS, TensorFile
from prunella.workshop import check_output

LEFT_OVER = {"journal.jsonl", "run.json", ".prunella"}


def files_of(directory: Path) -> dict[str, bytes]:
    """Weights and masks, byte for byte."""
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.suffix in (".safetensors", ".masks")}


# ---------------------------------------------------------------------------------------------------------
# Files of tensors


def test_a_tensor_file_written_in_any_order_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "c": torch.arange(9, dtype=torch.uint8)}
    layout = {"a": ("F32", (3, 5)), "b": ("BF16", (7,)), "c": ("U8", (9,))}
    file = TensorFile.create(tmp_path / "x", layout, {"format": "pt"})
    for name in ("c", "a", "b"):
        file.write(name, tensors[name])
    file.close()
    assert file.written == {"a", "b", "c"}
    found = load_file(tmp_path / "x")
    assert list(found) == ["a", "b", "c"]
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "x", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_a_copied_tensor_keeps_its_bytes(tmp_path: Path) -> None:
    save_file({"a": torch.randn(100, 7), "b": torch.randn(5)}, tmp_path / "source", {"format": "pt"})
    file = TensorFile.like(tmp_path / "copy", tmp_path / "source")
    for name, (_, _, start, end) in read_header(tmp_path / "source")[0].items():
        file.copy(name, tmp_path / "source", start, end)
    file.close()
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "source").read_bytes()


def test_a_tensor_of_another_shape_is_not_written(tmp_path: Path) -> None:
    file = TensorFile.create(tmp_path / "x", {"a": ("F32", (3, 5))}, {})
    with pytest.raises(ModelError, match=r"tensor 'a' has shape \(5, 3\), but its place in the file \(3, 5\)"):
        file.write("a", torch.zeros(5, 3))
    file.close()
    assert not file.written


def test_writes_and_copies_survive_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    tensor = torch.randn(50)
    file = TensorFile.create(tmp_path / "x", {"a": ("F32", (50,))}, {})
    file.write("a", tensor)
    file.close()
    assert torch.equal(load_file(tmp_path / "x")["a"], tensor)


@pytest.mark.parametrize(("code", "claimed"), [(errno.EOPNOTSUPP, True), (errno.ENOSPC, False), (errno.EDQUOT, False)])
def test_space_is_claimed_ahead_where_the_file_system_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, claimed: bool
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    if claimed:
        TensorFile.create(tmp_path / "x", {"a": ("F32", (1000,))}, {}).close()
        assert (tmp_path / "x").stat().st_size > 4000
    else:
        with pytest.raises(OSError, match=os.strerror(code)):
            TensorFile.create(tmp_path / "x", {"a": ("F32", (1000,))}, {})


# ---------------------------------------------------------------------------------------------------------
# Masks


@given(st.integers(1, 9), st.integers(1, 21), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_a_packed_mask_holds_a_bit_for_each_weight_row_after_row(rows: int, columns: int, seed: int) -> None:
    mask_OI = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.5
    packed = pack(mask_OI)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-rows * columns // 8)
    bits = [bool(packed[k // 8] >> (7 - k % 8) & 1) for k in range(rows * columns)]
    assert bits == mask_OI.flatten().tolist()


def test_masks_come_back_as_they_were_saved(llama: Path, tmp_path: Path, ids: Tensor) -> None:
    prunella.prune(llama, {"steps": ["wanda"], "skip": ["q_proj"]}, output=tmp_path / "out", calibration=ids)
    masks = read_masks(tmp_path / "out")
    assert len(masks) == 3 * 6
    assert not any("q_proj" in name for name in masks)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, mask_OI in masks.items():
        assert torch.equal(network.get_submodule(name).weight != 0, mask_OI)
    size = sum(-(-mask.numel() // 8) for mask in masks.values())
    assert size <= (tmp_path / "out" / MASKS).stat().st_size < size + 8192


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: save_file({"a": torch.zeros(3, dtype=torch.uint8)}, path),
        lambda path: save_file({"a": torch.zeros(3, dtype=torch.uint8)}, path, {"shapes": "{"}),
        lambda path: save_file({"a": torch.zeros(3, dtype=torch.uint8)}, path, {"shapes": '{"a": [9, 9]}'}),
        lambda path: save_file({"a": torch.zeros(3, dtype=torch.uint8)}, path, {"shapes": '{"b": [3, 8]}'}),
    ],
)
def test_damaged_masks_are_named(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    TensorFile.create(tmp_path / MASKS, {"a": ("U8", (3,))}, {"shapes": '{"a": [3, 8]}'}).close()
    assert not read_masks(tmp_path)["a"].any()
    damage(tmp_path / MASKS)
    with pytest.raises(ModelError, match=r"prunella\.masks' is damaged"):
        read_masks(tmp_path)


def test_a_model_that_was_not_pruned_has_no_masks(llama: Path) -> None:
    with pytest.raises(ModelError, match="holds no masks"):
        read_masks(llama)


def test_a_kept_weight_may_be_zero_and_is_still_kept(tmp_path: Path, ids: Tensor) -> None:
    """The mask is data, not `weight == 0`."""
    network = tiny.build()
    network.model.layers[0].mlp.up_proj.weight.data[:, :20] = 0
    prunella.prune(network, {"steps": ["magnitude"]}, output=tmp_path / "out", calibration=ids)
    mask_OI = read_masks(tmp_path / "out")["model.layers.0.mlp.up_proj"]
    assert mask_OI.float().mean() == 0.5
    assert mask_OI[:, :20].any()
    assert (network.model.layers[0].mlp.up_proj.weight == 0).float().mean() > 0.5


# ---------------------------------------------------------------------------------------------------------
# The directory


def test_the_directory_is_whole_and_loads_with_transformers_alone(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    recipe = {"steps": ["wanda"], "calibration": {"samples": 4, "length": 32}, "evaluate": {"windows": 1}}
    prunella.prune(llama, recipe, output=out)
    assert not (tmp_path / "out.partial").exists()
    names = {path.name for path in out.iterdir()}
    assert {path.name for path in llama.iterdir()} | {"prunella.json", "prunella.masks", "README.md"} == names
    assert not names & LEFT_OVER
    assert sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(out).parameters())
    text = "Trees grow back."
    before, after = AutoTokenizer.from_pretrained(llama), AutoTokenizer.from_pretrained(out)
    assert after(text) == before(text)
    assert after.chat_template == before.chat_template
    assert GenerationConfig.from_pretrained(out) == GenerationConfig.from_pretrained(llama)
    assert (out / "config.json").read_bytes() == (llama / "config.json").read_bytes()


def test_companions_of_the_weights_come_along_but_not_the_old_card(tmp_path: Path, ids: Tensor) -> None:
    source = tmp_path / "source"
    tiny.build().save_pretrained(source)
    (source / "LICENSE").write_text("mine")
    (source / "merges.txt").write_text("a b")
    (source / "README.md").write_text("the old card")
    (source / "training.log").write_text("long")
    prunella.prune(source, {"steps": ["wanda"]}, output=tmp_path / "out", calibration=ids)
    assert (tmp_path / "out" / "LICENSE").read_text() == "mine"
    assert (tmp_path / "out" / "merges.txt").exists()
    assert not (tmp_path / "out" / "training.log").exists()
    assert "the old card" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")]
)
def test_another_dtype_is_that_of_all_floats_in_the_files_and_of_the_config(
    tmp_path: Path, ids: Tensor, stored: str, wanted: str
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    network = tiny.build("gpt2", dtype=getattr(torch, stored))
    network.save_pretrained(source, max_shard_size="30KB")
    report = prunella.prune(source, {"steps": ["wanda"], "dtype": wanted}, output=out, calibration=ids)
    assert report.sparsity == 0.5
    dtype = getattr(torch, wanted)
    reloaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert reloaded.dtype == dtype
    masks = read_masks(out)
    size = 0
    for path in out.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            assert tensor.dtype == dtype
            size += tensor.numel() * tensor.element_size()
            dense = network.get_parameter(name if name.startswith("transformer.") else f"transformer.{name}").to(dtype)
            mask_OI = masks.get(("transformer." + name.removeprefix("transformer.")).removesuffix(".weight"))
            assert torch.equal(tensor, dense if mask_OI is None else dense * mask_OI.T), name
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size


def test_the_resolved_recipe_repeats_the_run_byte_for_byte(llama: Path, tmp_path: Path) -> None:
    recipe = {"steps": ["sparsegpt"], "calibration": {"samples": 4}, "evaluate": {"windows": 1}}
    report = prunella.prune(llama, recipe, output=tmp_path / "one")
    again = Recipe.of(json.loads((tmp_path / "one" / "prunella.json").read_text())["recipe"])
    assert again.plain() == report.recipe
    prunella.prune(llama, again, output=tmp_path / "two")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_pruned_model_can_be_pruned_again(llama: Path, tmp_path: Path, ids: Tensor) -> None:
    recipe: dict[str, Any] = {"steps": ["magnitude"], "sparsity": 0.3}
    prunella.prune(llama, recipe, output=tmp_path / "one", calibration=ids)
    second = prunella.prune(tmp_path / "one", {"steps": ["magnitude"]}, output=tmp_path / "two", calibration=ids)
    assert second.sparsity == 0.5
    assert prunella.Report.read(tmp_path / "two").model["name"] == str(tmp_path / "one")
    once = prunella.prune(llama, {"steps": ["magnitude"]}, output=tmp_path / "three", calibration=ids)
    assert once.sparsity == 0.5
    assert files_of(tmp_path / "two") == files_of(tmp_path / "three")


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "mixtral"])
def test_a_model_in_memory_is_saved_whole(architecture: str, llama: Path, tmp_path: Path, ids: Tensor) -> None:
    network = tiny.build(architecture)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    out = tmp_path / "out"
    prunella.prune(network, {"steps": ["wanda"], "evaluate": {"source": None}}, output=out, tokenizer=tokenizer)
    reloaded = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(reloaded[name], tensor) for name, tensor in network.state_dict().items())
    assert AutoTokenizer.from_pretrained(out)("Trees") == tokenizer("Trees")
    assert set(read_masks(out)) == {la.name for la in prunella.Report.read(out).layers}
    assert load_model(str(out)).dtype == torch.float32


# ---------------------------------------------------------------------------------------------------------
# Where it may go


def test_an_empty_directory_may_be_the_output_and_a_full_one_not(llama: Path, tmp_path: Path, ids: Tensor) -> None:
    out = tmp_path / "out"
    out.mkdir()
    prunella.prune(llama, {"steps": ["magnitude"]}, output=out, calibration=ids)
    before = files_of(out)
    with pytest.raises(InputError, match="exists and is not empty"):
        prunella.prune(llama, {"steps": ["wanda"]}, output=out, calibration=ids)
    assert files_of(out) == before


def test_missing_parents_of_the_output_are_made(llama: Path, tmp_path: Path, ids: Tensor) -> None:
    out = tmp_path / "a" / "b" / "out"
    prunella.prune(llama, {"steps": ["magnitude"]}, output=out, calibration=ids)
    assert (out / "prunella.json").exists()


def test_an_output_that_cannot_be_a_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="exists and is not a directory"):
        check_output(tmp_path / "file")
    with pytest.raises(InputError, match="cannot be made"):
        check_output(tmp_path / "file" / "below")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match="is not writable"):
        check_output(tmp_path / "new")


def test_no_file_stays_open_after_a_run(llama: Path, tmp_path: Path, ids: Tensor) -> None:
    def opened() -> set[str]:
        found = set()
        for number in os.listdir("/proc/self/fd"):
            try:
                found.add(os.readlink(f"/proc/self/fd/{number}"))
            except OSError:
                continue
        return {path for path in found if str(tmp_path) in path}

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc here")
    prunella.prune(llama, {"steps": ["magnitude"]}, output=tmp_path / "out", calibration=ids)
    assert not opened()


def test_numpy_reads_the_masks_as_documented(llama: Path, tmp_path: Path, ids: Tensor) -> None:
    prunella.prune(llama, {"steps": ["magnitude"]}, output=tmp_path / "out", calibration=ids)
    with safe_open(tmp_path / "out" / MASKS, framework="np") as file:
        shapes = json.loads(file.metadata()["shapes"])
        for name, mask_OI in read_masks(tmp_path / "out").items():
            bits = np.unpackbits(file.get_tensor(name), count=mask_OI.numel()).reshape(shapes[name])
            assert np.array_equal(bits.astype(bool), mask_OI.numpy())
