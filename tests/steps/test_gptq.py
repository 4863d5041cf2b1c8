"""Pruning and rounding in one pass, on grids that the packed format stores as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import prunella
from prunella import InputError, ModelError, Stats, make
from prunella.grid import Grid, fit, limit
from prunella.packing import pack_model, packed_config, unpack_model
from prunella.save import Output
from prunella.sparse.format import pack, unpack
from prunella.tensors import GRIDS, read_grids


def hessian_of(case: Any) -> Tensor:
    x_TI = case.x_TI.double()
    hessian_II = x_TI.T @ x_TI / len(x_TI)
    return hessian_II + 0.01 * hessian_II.diagonal().mean() * torch.eye(x_TI.shape[1])


def loss(case: Any) -> float:
    change_OI = case.layer.weight_OI.double() - case.layer.dense_OI.double()
    return float(((change_OI @ hessian_of(case)) * change_OI).sum())


def rounded(case: Any, bits: int, group: int) -> Any:
    """The case with its weights rounded to the nearest, each for itself."""
    layer = case.layer
    grid = fit(layer.weight_OI, bits, group)
    return replace(case, layer=layer.pruned(grid.round(layer.weight_OI), layer.mask_OI, grid=grid))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("group", [0, 128])
@pytest.mark.parametrize("before", [(), ("wanda",), ("sparsegpt",), ("sparsegpt", "update")])
def test_weights_lie_on_the_grid_and_pack_without_a_second_rounding(
    case: Callable[..., Any], before: tuple[str, ...], group: int, bits: int, dtype: torch.dtype
) -> None:
    start = case(rows=12, columns=300, dtype=dtype)
    for name in before:
        start = start.apply(name)
    layer = start.apply("gptq", bits=bits, group=group).layer
    weight_OI, mask_OI, grid = layer.weight_OI, layer.mask_OI, layer.grid
    assert (grid.bits, grid.group) == (bits, group)
    assert grid.scale_OG.dtype == torch.bfloat16
    assert grid.scale_OG.shape == (12, 3 if group else 1)
    assert grid.codes(weight_OI).abs().max() <= limit(bits)
    assert len(grid.codes(weight_OI).unique()) > limit(bits)
    assert torch.equal(grid.round(weight_OI), weight_OI)
    assert (weight_OI[~mask_OI] == 0).all()
    if before:
        assert torch.equal(mask_OI, start.layer.mask_OI)
    packed = pack(weight_OI, mask_OI, grid=grid)
    assert packed.bits == (8 if bits == 8 else 4)
    assert torch.equal(unpack(packed, dtype).view(torch.uint8), weight_OI.view(torch.uint8))


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("group", [0, 128])
def test_with_uncorrelated_inputs_it_rounds_to_the_nearest(case: Callable[..., Any], group: int, bits: int) -> None:
    start = case(columns=200).apply("magnitude")
    start = replace(
        start, layer=replace(start.layer, stats=Stats(64, {"norm": torch.ones(200), "gram": torch.eye(200)}))
    )
    found = start.apply("gptq", bits=bits, group=group).layer
    nearest = rounded(start, bits, group).layer
    assert torch.equal(found.grid.scale_OG, nearest.grid.scale_OG)
    assert torch.equal(found.weight_OI, nearest.weight_OI)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_it_is_the_plain_sweep_with_rounding(case: Callable[..., Any], pattern: str) -> None:
    """Column by column with an explicit inverse of each trailing submatrix, in float64, on a grid known before. In the
    middle between two values of the grid either is right; the columns after it follow from the one that was taken."""
    start = case(rows=6, pattern=pattern).apply("wanda")
    found = start.apply("gptq", bits=4, group=0).layer
    hessian_II, mask_OI = hessian_of(start), start.layer.mask_OI
    scale_O = fit(start.layer.dense_OI * mask_OI, 4, 0).scale_OG[:, 0].double()
    w_OI = start.layer.dense_OI.double().clone()
    for j in range(w_OI.shape[1]):
        inverse_JJ = hessian_II[j:, j:].inverse()
        q_O = found.weight_OI[:, j].double()
        inside_O = w_OI[:, j].clamp(-7 * scale_O, 7 * scale_O) * mask_OI[:, j]
        assert ((q_O - inside_O).abs() <= scale_O / 2 * mask_OI[:, j] + 1e-5).all()
        torch.testing.assert_close(q_O, (q_O / scale_O).round() * scale_O)
        error_O = (w_OI[:, j] - q_O) / inverse_JJ[0, 0]
        w_OI[:, j:] -= error_O[:, None] * inverse_JJ[0]


def test_a_group_gets_its_scales_when_the_sweep_reaches_it(case: Callable[..., Any]) -> None:
    start = case(columns=256).apply("wanda")
    found = start.apply("gptq", bits=3).layer
    at_once = fit(start.layer.weight_OI, 3, 128)
    assert torch.equal(found.grid.scale_OG[:, 0], at_once.scale_OG[:, 0])
    assert not torch.equal(found.grid.scale_OG[:, 1], at_once.scale_OG[:, 1])


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_it_loses_less_than_rounding_after_pruning(case: Callable[..., Any], pattern: str, bits: int) -> None:
    start = case(rows=48, columns=256, tokens=1000, pattern=pattern)
    sparsegpt, updated = start.apply("sparsegpt"), start.apply("wanda").apply("update")
    assert loss(sparsegpt.apply("gptq", bits=bits)) < loss(rounded(sparsegpt, bits, 128))
    assert loss(start.apply("gptq", bits=bits)) < loss(rounded(sparsegpt, bits, 128))
    assert loss(updated.apply("gptq", bits=bits)) < loss(rounded(updated, bits, 128))
    assert loss(start.apply("wanda").apply("gptq", bits=bits)) < loss(rounded(start.apply("wanda"), bits, 128))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_with_8_bits_it_prunes_as_sparsegpt_does(case: Callable[..., Any], pattern: str) -> None:
    start = case(rows=32, columns=64, pattern=pattern)
    found, plain = start.apply("gptq", bits=8).layer, start.apply("sparsegpt").layer
    assert (found.mask_OI == plain.mask_OI).float().mean() > 0.97
    assert loss(start.apply("gptq", bits=8)) < 1.05 * loss(start.apply("sparsegpt"))


def test_a_step_that_changes_the_weights_takes_the_grid_away(case: Callable[..., Any]) -> None:
    quantized = case(columns=64).apply("gptq")
    assert quantized.layer.grid is not None
    assert quantized.apply("update").layer.grid is None


def test_options_that_no_packed_file_could_hold_are_refused(case: Callable[..., Any]) -> None:
    for options, message in (({"bits": 5}, "gptq.bits=5: "), ({"group": 100}, "gptq.group=100: .*multiple of 128")):
        with pytest.raises(InputError, match=message):
            make("gptq", options)
    with pytest.raises(InputError, match=r"step 'gptq' .* groups of 128 inputs under pattern 2:3: set gptq.group=0"):
        case(columns=300, pattern="2:3").apply("gptq")
    assert case(columns=300, pattern="2:3").apply("gptq", group=0).layer.grid is not None


# ---------------------------------------------------------------------------------------------------------
# Whole models


def dense(path: Path, architecture: str = "llama") -> str:
    wide = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 48, "n_embd": 192}
    known = {**tiny._COMMON, **tiny.ARCHITECTURES[architecture]}
    sizes = {key: value for key, value in wide.items() if key in known}
    tiny.build(architecture, dtype=torch.bfloat16, **sizes).save_pretrained(path)
    return str(path)


RECIPE: dict[str, Any] = {"steps": [{"gptq": {"bits": 4}}], "evaluate": {"source": None}}


def tensors(directory: Path) -> dict[str, Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


def same(one: Path, other: Path) -> bool:
    a, b = tensors(one), tensors(other)
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_quantized_model_packs_on_its_grid_and_comes_back_byte_for_byte(
    architecture: str, ids: Tensor, tmp_path: Path
) -> None:
    out, packed, plain = tmp_path / "out", tmp_path / "packed", tmp_path / "plain"
    report = prunella.prune(dense(tmp_path / "dense", architecture), RECIPE, output=out, calibration=ids)
    assert {layer.bits for layer in report.layers} == {4}
    assert read_grids(out).keys() == {layer.name for layer in report.layers}
    result = pack_model(str(out), packed)
    assert result.packed < 0.3 * result.dense
    config = packed_config(packed)
    assert config is not None
    assert {about["bits"] for about in config["modules"].values()} == {4}
    unpack_model(str(packed), plain)
    assert same(out, plain)
    logits = [AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (out, packed)]
    torch.testing.assert_close(*logits, rtol=0.05, atol=0.05)
    again = tmp_path / "again"
    pack_model(str(plain), again)
    assert same(packed, again)


def test_layers_may_have_grids_of_their_own(ids: Tensor, tmp_path: Path) -> None:
    out, packed = tmp_path / "out", tmp_path / "packed"

    @prunella.register("mixed", needs={"gram"})
    def mixed(layer: prunella.Layer) -> prunella.Layer:
        """Some at 8 bits, some at 3, some not at all."""
        if "k_proj" in layer.name:
            return make("sparsegpt").apply(prunella.Block(0, "one", (layer,))).layers[0]
        options = {"bits": 8, "group": 0} if "down" in layer.name else {"bits": 3}
        return make("gptq", options).apply(prunella.Block(0, "one", (layer,))).layers[0]

    try:
        prunella.prune(dense(tmp_path / "dense"), {**RECIPE, "steps": ["mixed"]}, output=out, calibration=ids)
    finally:
        del prunella.registry.steps["mixed"]
    pack_model(str(out), packed)
    unpack_model(str(packed), tmp_path / "plain")
    assert same(out, tmp_path / "plain")
    stored = tensors(packed)
    values = {part: stored[f"model.layers.0.{part}.weight_values"].dtype for part in ("mlp.down_proj", "mlp.up_proj")}
    assert values == {"mlp.down_proj": torch.int8, "mlp.up_proj": torch.uint8}
    assert stored["model.layers.0.self_attn.k_proj.weight_values"].dtype == torch.bfloat16
    network = AutoModelForCausalLM.from_pretrained(packed)
    torch.testing.assert_close(
        network(ids).logits, AutoModelForCausalLM.from_pretrained(out)(ids).logits, rtol=0.05, atol=0.05
    )


def test_a_run_that_resumes_ends_with_the_same_grids(
    ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, whole, out = dense(tmp_path / "dense"), tmp_path / "whole", tmp_path / "out"
    prunella.prune(source, RECIPE, output=whole, calibration=ids)
    write, written = Output.write, []

    def killed(self: Output, result: Any) -> None:
        if written:
            raise KeyboardInterrupt
        write(self, result)
        written.append(result)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            prunella.prune(source, RECIPE, output=out, calibration=ids)
    prunella.prune(source, RECIPE, output=out, calibration=ids, resume=True)
    assert (out / GRIDS).read_bytes() == (whole / GRIDS).read_bytes()
    assert same(out, whole)
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_model_that_left_its_grid_or_whose_grids_are_damaged_is_not_packed_on_it(ids: Tensor, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prunella.prune(dense(tmp_path / "dense"), RECIPE, output=out, calibration=ids)
    (path,) = out.glob("*.safetensors")
    weights = load_file(path)
    weights["model.layers.1.mlp.up_proj.weight"] *= 1.01
    from safetensors.torch import save_file

    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"'model.layers.1.mlp.up_proj' does not lie on the grid"):
        pack_model(str(out), tmp_path / "packed")
    pack_model(str(out), tmp_path / "eight", bits=8)
    (out / GRIDS).write_bytes(b"trash")
    with pytest.raises(ModelError, match=r"prunella.grids' is damaged"):
        pack_model(str(out), tmp_path / "packed")


def test_rounding_a_rounded_weight_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bits in (8, 4, 3):
            scale_OG = torch.rand(64, 2, generator=generator).mul(0.1).bfloat16()
            grid = Grid(bits, 128, scale_OG)
            once_OI = grid.round(torch.randn(64, 256, generator=generator).to(dtype))
            assert torch.equal(grid.round(once_OI).view(torch.uint8), once_OI.view(torch.uint8))
