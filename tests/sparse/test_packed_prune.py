"""Pruning straight into the packed format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import prunella
from prunella import InputError, Recipe, load_model, perplexity, wrap_model
from prunella.packing import pack_model, unpack_model
from prunella.save import Output
from prunella.sparse.linear import SparseLinear
from prunella.tensors import GRIDS, INDEX, MASKS

SHORT: dict[str, Any] = {"calibration": {"samples": 4, "length": 32}, "evaluate": {"windows": 1}}


def recipe_of(**changes: Any) -> dict[str, Any]:
    return {"steps": ["sparsegpt"], "format": "packed", **SHORT, **changes}


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir()) if p.suffix in (".safetensors", ".masks")}


@pytest.mark.parametrize(
    "changes", [{}, {"skip": ["k_proj"]}, {"dtype": "bfloat16"}, {"sparsity": {"*": 0.5, "o_proj": 0.01}}]
)
def test_it_is_the_same_as_packing_afterwards(llama: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    prunella.prune(llama, recipe_of(**changes, format="dense"), output=tmp_path / "dense")
    pack_model(str(tmp_path / "dense"), tmp_path / "two")
    report = prunella.prune(llama, recipe_of(**changes), output=tmp_path / "one")
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two")]
    assert configs[0] == configs[1]
    plain = prunella.Report.read(tmp_path / "dense")
    assert report.pruned["perplexity"] == plain.pruned["perplexity"]
    assert report.pruned["bytes"] < 0.9 * plain.pruned["bytes"]
    assert (tmp_path / "one" / MASKS).is_file() == ("sparsity" in changes)  # of the layers that stayed dense


def test_a_mixture_goes_out_packed(tmp_path: Path) -> None:
    tiny.build("qwen3_moe", moe_intermediate_size=96).save_pretrained(tmp_path / "source")
    ids = tiny.token_windows()
    prunella.prune(tmp_path / "source", recipe_of(format="dense"), output=tmp_path / "dense", calibration=ids)
    pack_model(str(tmp_path / "dense"), tmp_path / "two")
    prunella.prune(tmp_path / "source", recipe_of(), output=tmp_path / "one", calibration=ids)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def picture_and_text(kind: str, width: int = 16) -> Any:
    """A tiny vision-language model: one whose files have other names than its modules, and one whose text stands alone
    where a causal language model is asked for."""
    text = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 64,
    }
    see = {"hidden_size": width, "intermediate_size": 2 * width}
    if kind == "gemma3":
        layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
        see |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
        more = {"image_token_index": 300, "boi_token_index": 301, "eoi_token_index": 302, "mm_tokens_per_image": 4}
    else:
        linear = {"num_value_heads": 4, "num_key_heads": 2, "key_head_dim": 16, "value_head_dim": 16}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 96}
        layers = {f"linear_{key}": value for key, value in linear.items()} | experts
        layers |= {"layer_types": ["linear_attention", "full_attention"], "moe_intermediate_size": 96}
        see |= {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "num_position_embeddings": 16}
        more = {f"{key}_token_id": 300 + n for n, key in enumerate(("image", "video", "vision_start", "vision_end"))}
    config = AutoConfig.for_model(kind, text_config=text | layers, vision_config=see, **more)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config)


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5_moe"])
def test_of_a_vision_language_model_the_text_is_packed_and_the_rest_stays(kind: str, tmp_path: Path) -> None:
    source, ids = tmp_path / "source", tiny.token_windows()
    picture_and_text(kind).to(torch.bfloat16).save_pretrained(source)
    dense, one, two = tmp_path / "dense", tmp_path / "one", tmp_path / "two"
    prunella.prune(source, recipe_of(format="dense", steps=["wanda"]), output=dense, calibration=ids)
    prunella.prune(source, recipe_of(steps=["wanda"], round_head=True), output=one, calibration=ids)
    pack_model(str(dense), two)
    before, after = (load_file(path / "model.safetensors") for path in (source, dense))
    seen = {k: t for path in one.glob("*.safetensors") for k, t in load_file(path).items() if "vis" in k}
    assert seen
    assert all(torch.equal(before[k], after[k]) and torch.equal(before[k], t) for k, t in seen.items())
    unpack_model(str(two), tmp_path / "again")
    again = {k: t for path in (tmp_path / "again").glob("*.safetensors") for k, t in load_file(path).items()}
    assert again.keys() == after.keys()
    assert all(torch.equal(again[k], t) for k, t in after.items())
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        expected = auto.from_pretrained(dense)(input_ids=ids).logits.float()
        for path, error in ((one, 0.05), (two, 0.01)):
            network, info = auto.from_pretrained(path, output_loading_info=True)
            assert not info["missing_keys"]
            assert sum(isinstance(module, SparseLinear) for module in network.modules()) >= 13
            assert (network(input_ids=ids).logits.float() - expected).norm() < error * expected.norm()
    exact = perplexity(load_model(str(dense)), ids).perplexity
    assert perplexity(load_model(str(two), packed=True), ids).perplexity == pytest.approx(exact, rel=0.01)
    network.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert (saved(input_ids=ids).logits.float() - expected).norm() < 0.01 * expected.norm()


def test_a_vision_tower_with_more_weights_than_the_text_is_not_taken_for_it() -> None:
    network = picture_and_text("gemma3", width=256)
    text, tower = network.model.language_model, network.model.vision_tower
    assert sum(p.numel() for p in tower.parameters()) > 2 * sum(p.numel() for p in text.parameters())
    assert wrap_model(network).blocks == [f"model.language_model.layers.{index}" for index in range(2)]


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_source_in_other_shards_with_a_scalar_goes_out_packed(tmp_path: Path, dtype: str) -> None:
    source = tmp_path / "source"
    tiny.build().save_pretrained(source, max_shard_size="20KB")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["vision.scale"] = "extra.safetensors"
    (source / INDEX).write_text(json.dumps(index))
    save_file({"vision.scale": torch.tensor(2.5)}, source / "extra.safetensors", {"format": "pt"})
    for format_ in ("dense", "packed"):
        recipe = recipe_of(format=format_, dtype=dtype)
        prunella.prune(source, recipe, output=tmp_path / format_, calibration=tiny.token_windows())
    pack_model(str(tmp_path / "dense"), tmp_path / "two")
    assert files_of(tmp_path / "packed") == files_of(tmp_path / "two")
    AutoModelForCausalLM.from_pretrained(tmp_path / "packed")


def test_the_report_has_the_sizes_of_the_files(tmp_path: Path) -> None:
    network = tiny.build("llama", tie_word_embeddings=True, dtype=torch.bfloat16)
    network.save_pretrained(tmp_path / "source")
    for format_ in ("dense", "packed"):
        out = tmp_path / format_
        report = prunella.prune(
            tmp_path / "source", recipe_of(format=format_), output=out, calibration=tiny.token_windows()
        )
        header = 4096  # bytes of a file that are not weights, at most
        for told, directory in ((report.dense, tmp_path / "source"), (report.pruned, out)):
            sizes = [path.stat().st_size for path in directory.glob("*.safetensors")]
            assert 0 <= sum(sizes) - told["bytes"] < header * len(sizes)
        assert report.model["parameters"] == sum(p.numel() for p in network.parameters())


def test_a_model_in_memory_goes_out_packed(tmp_path: Path) -> None:
    for architecture in ("llama", "gpt2", "mixtral"):
        network = tiny.build(architecture, tie_word_embeddings=True)
        out, ids = tmp_path / architecture, tiny.token_windows()
        prunella.prune(network, {"steps": ["wanda"], "format": "packed"}, output=out, calibration=ids)
        again = AutoModelForCausalLM.from_pretrained(out)
        assert any(isinstance(module, SparseLinear) for module in again.modules())
        with torch.no_grad():
            torch.testing.assert_close(again(ids).logits, network(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_with_bits_later_layers_see_the_rounded_ones(llama: Path, tmp_path: Path, bits: int) -> None:
    report = prunella.prune(llama, recipe_of(bits=bits), output=tmp_path / "out")
    unpack_model(str(tmp_path / "out"), tmp_path / "plain")
    opened = load_model(str(tmp_path / "plain"))
    windows = torch.tensor(report.pruned["nll"]).shape[0]
    assert windows == 1
    pack_model(str(tmp_path / "plain"), tmp_path / "again")  # on the grids that came with it
    before, after = (
        {k: v for p in sorted((tmp_path / d).glob("*.safetensors")) for k, v in load_file(p).items()}
        for d in ("out", "again")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    down = packed.model.layers[1].mlp.down_proj
    assert down.weight_values.dtype == (torch.int8 if bits == 8 else torch.uint8)
    ids = tiny.token_windows()
    assert perplexity(opened, ids).perplexity == pytest.approx(
        perplexity(prunella.wrap_model(packed), ids).perplexity, rel=1e-3
    )


class Killed(BaseException):
    """Stands for the end of the process: nobody catches it."""


@pytest.mark.parametrize(
    ("place", "method", "call"),
    [(Output, "_log", 2), (Output, "write", 2), (Output, "finish", 0), (Path, "replace", 3)],
)
@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 4, "order": "block"},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"dtype": "bfloat16", "sparsity": {"*": 0.5, "o_proj": 0.01}}, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_bytes(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    method: str,
    call: int,
    changes: dict[str, Any],
) -> None:
    whole = prunella.prune(llama, recipe_of(**changes), output=tmp_path / "whole")
    original, count = getattr(place, method), 0

    def dying(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count > call:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(place, method, dying)
        with pytest.raises(Killed):
            prunella.prune(llama, recipe_of(**changes), output=tmp_path / "out")
    report = prunella.prune(llama, recipe_of(**changes), output=tmp_path / "out", resume=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert report.pruned == whole.pruned
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def test_experts_that_see_too_few_tokens_are_rounded_too(tmp_path: Path) -> None:
    tiny.build("mixtral").save_pretrained(tmp_path / "source")
    for name, changes in (("round", {"bits": 8}), ("gptq", {"steps": [{"gptq": {"bits": 8}}]})):
        recipe = recipe_of(**changes, calibration={"min_tokens": 80})  # the average of an expert
        report = prunella.prune(tmp_path / "source", recipe, output=tmp_path / name, calibration=tiny.token_windows())
        assert 0 < sum("magnitude" in note for note in report.notes()) < 16
        network = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert all(m.weight_values.dtype == torch.int8 for m in network.modules() if isinstance(m, SparseLinear))
        assert not (tmp_path / name / GRIDS).exists()


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(InputError, match="add format: packed"):
        Recipe.of({"bits": 8})
    with pytest.raises(InputError, match="group 100 is no multiple of 128"):
        Recipe.of({"format": "packed", "bits": 8, "group": 100})
    with pytest.raises(InputError, match="bits"):
        Recipe.of({"format": "packed", "bits": 5})


def test_the_command_line_prints_both_sizes(run: Callable[..., Any], llama: Path, tmp_path: Path) -> None:
    short = ("--samples", "2", "--length", "32", "--windows", "1", "--step", "wanda")
    done = run("prune", llama, "-o", tmp_path / "out", "--format", "packed", "--bits", "4", "--group", "0", *short)
    assert done.code == 0, done.err
    assert "size of the weights" in done.out
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["bits"], settings["group"]) == (4, 0)
    told = prunella.Report.read(tmp_path / "out")
    assert told.dense["bytes"] > told.pruned["bytes"] > 0
    assert "where Prunella is installed" in (tmp_path / "out" / "README.md").read_text()
    assert run("eval", tmp_path / "out", "--length", "32", "--windows", "1").code == 0
