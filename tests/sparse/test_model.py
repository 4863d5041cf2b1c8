"""Whole models: packed, loaded by transformers, saved, unpacked, damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import prunella
from prunella.errors import InputError, ModelError
from prunella.packing import pack_model, packed_config, unpack_model
from prunella.sparse.bench import bench
from prunella.sparse.linear import DenseLinear, SparseExpert, SparseLinear, TrainingError

WIDE = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 48, "n_embd": 192, "word_embed_proj_dim": 192}
WIDE |= {"moe_intermediate_size": 96}
SIMPLE = ("llama", "qwen2", "gemma3_text", "gpt2", "opt", "bloom", "phi3", "mamba", *tiny.MIXTURES)


def make(
    path: Path,
    architecture: str = "llama",
    pattern: str = "unstructured",
    skip: Sequence[str] = (),
    **overrides: Any,
) -> Path:
    """A pruned tiny model in bfloat16."""
    known = {**tiny._COMMON, **tiny.ARCHITECTURES[architecture]}
    wide = {key: value for key, value in WIDE.items() if key in known}
    if architecture == "deepseek_v3":  # its heads have widths of their own
        del wide["head_dim"]
    network = tiny.build(architecture, dtype=torch.bfloat16, **{**wide, **overrides})
    network.save_pretrained(path / "dense")
    recipe = {"steps": ["magnitude"], "pattern": pattern, "skip": skip, "evaluate": {"source": None}}
    prunella.prune(str(path / "dense"), recipe, output=path / "pruned", calibration=tiny.token_windows())
    return path / "pruned"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def packed(pruned: Path) -> Path:
    pack_model(str(pruned), pruned.parent / "packed")
    return pruned.parent / "packed"


def logits(network: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = network(tiny.token_windows(2, 9), use_cache=False).logits.float()
    return out


def tensors(directory: Path) -> dict[str, Tensor]:
    return {k: v for path in directory.glob("*.safetensors") for k, v in load_file(path).items()}


@pytest.mark.parametrize("architecture", tiny.at_length(SIMPLE))
def test_a_packed_model_says_what_the_pruned_one_says_and_unpacks_to_its_bytes(
    architecture: str, tmp_path: Path
) -> None:
    pruned = make(tmp_path, architecture)
    result = pack_model(str(pruned), tmp_path / "packed")
    assert result.layers > 0
    assert result.packed < 0.7 * result.dense
    short = ("dt_proj", "q_b_proj", "kv_b_proj")  # rows too short to gain anything
    assert all(name.endswith(short) for name in result.kept)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert sum(isinstance(module, SparseLinear) for module in network.modules()) == result.layers
    plain = AutoModelForCausalLM.from_pretrained(pruned)
    if architecture in tiny.MIXTURES:
        plain.set_experts_implementation("eager")  # grouped products round differently, and so choose other experts
    expected = logits(plain)
    assert (logits(network) - expected).norm() < 0.02 * expected.norm()
    assert unpack_model(str(tmp_path / "packed"), tmp_path / "plain") == result.layers
    before, after = tensors(pruned), tensors(tmp_path / "plain")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in before)
    masks, again = prunella.read_masks(pruned), prunella.read_masks(tmp_path / "plain")
    assert all(torch.equal(masks[name], again[name]) for name in again)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


@pytest.mark.parametrize("bits", [8, 4])
def test_with_bits_it_says_what_its_unpacked_self_says(pruned: Path, tmp_path: Path, bits: int) -> None:
    pack_model(str(pruned), tmp_path / "packed", bits)
    unpack_model(str(tmp_path / "packed"), tmp_path / "plain")
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed"))
    plain = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))
    dense = logits(AutoModelForCausalLM.from_pretrained(pruned))
    assert (got - plain).norm() < 0.03 * plain.norm()
    assert (got - dense).norm() < (0.05 if bits == 8 else 0.4) * dense.norm()


def test_without_masks_the_zeros_say_what_is_pruned(pruned: Path, tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(pruned)
    network.save_pretrained(tmp_path / "plain")
    pack_model(str(tmp_path / "plain"), tmp_path / "packed")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), logits(network))


def test_nm_patterns_pack_as_well(tmp_path: Path) -> None:
    pruned = make(tmp_path, pattern="2:4")
    result = pack_model(str(pruned), tmp_path / "packed")
    assert result.packed < 0.6 * result.dense
    expected = logits(AutoModelForCausalLM.from_pretrained(pruned))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")), expected)


def test_it_generates_moves_casts_and_saves_again(packed: Path, tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(packed)
    ids = tiny.token_windows(1, 5)
    out = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert out.shape[1] > 5
    network.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(network))
    assert packed_config(tmp_path / "again") == packed_config(packed)
    assert all(t.is_meta for t in network.to("meta").state_dict().values())
    wider = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    assert next(m for m in wider.modules() if isinstance(m, SparseLinear)).weight_values.dtype == torch.float32
    assert (logits(wider) - logits(again)).norm() < 0.05 * logits(again).norm()


def test_a_mixture_generates_as_before_and_saves_again_with_a_dense_block(tmp_path: Path) -> None:
    """Packed and plain experts side by side: conversions that put the plain ones together leave the packed alone."""
    for architecture in ("mixtral", "qwen3_moe"):
        here = tmp_path / architecture
        pruned = make(here, architecture, skip=["layers.0"])
        result = pack_model(str(pruned), here / "packed")
        assert result.layers == 4 + 2 * 4
        network = AutoModelForCausalLM.from_pretrained(here / "packed")
        assert type(network.model.layers[1].mlp.experts.down_proj[3]) is SparseExpert
        assert network.model.layers[0].mlp.experts.down_proj.ndim == 3
        plain = AutoModelForCausalLM.from_pretrained(pruned)
        ids = tiny.token_windows(2, 5)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
        assert torch.equal(network.generate(ids, **options), plain.generate(ids, **options))
        network.save_pretrained(here / "again")
        again = AutoModelForCausalLM.from_pretrained(here / "again")
        assert torch.equal(logits(again), logits(network))
        assert unpack_model(str(here / "again"), here / "plain") == result.layers
        before, after = tensors(pruned), tensors(here / "plain")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        network.dequantize()
        network.set_experts_implementation("eager")
        assert (logits(network) - logits(again)).norm() < 0.01 * logits(again).norm()


def test_experts_that_are_used_in_another_way_say_so(tmp_path: Path) -> None:
    pack_model(str(make(tmp_path, "mixtral")), tmp_path / "packed")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    expert = network.model.layers[0].mlp.experts.down_proj[0]
    with pytest.raises(ModelError, match="unpack the model first"):
        torch.nn.functional.linear(torch.ones(1, 320), expert, torch.ones(192))


def test_scales_keep_their_dtype_whatever_is_asked_for(pruned: Path, tmp_path: Path) -> None:
    pack_model(str(pruned), tmp_path / "packed", 8)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32).to(torch.float64)
    module = next(m for m in network.modules() if isinstance(m, SparseLinear))
    assert module.weight_scales is not None
    assert module.weight_scales.dtype == torch.bfloat16


def test_a_base_model_loads_from_the_file_of_a_model_with_a_head(packed: Path) -> None:
    network = AutoModel.from_pretrained(packed)
    assert any(isinstance(module, SparseLinear) for module in network.modules())


def test_dequantize_gives_plain_modules(packed: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(packed)
    expected = logits(network)
    network.dequantize()
    assert not any(isinstance(module, SparseLinear | DenseLinear) for module in network.modules())
    assert (logits(network) - expected).norm() < 0.01 * expected.norm()


def test_under_autocast_it_computes_as_it_is_packed(packed: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        network = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
        plain = logits(network)
        with torch.autocast("cpu", torch.bfloat16):
            assert (logits(network) - plain).norm() < 0.05 * plain.norm()


def test_training_says_to_unpack(packed: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(packed)
    with pytest.raises(TrainingError, match="prunella unpack"):
        network.train()
    ids = tiny.token_windows(1, 5)
    out = network(ids, labels=ids)  # looking is fine
    with pytest.raises(TrainingError, match="prunella unpack"):
        out.loss.backward()


@pytest.mark.parametrize("gradients", [pytest.param(False, marks=pytest.mark.slow), True])
def test_it_compiles_into_one_graph_that_says_the_same(packed: Path, gradients: bool) -> None:
    network = AutoModelForCausalLM.from_pretrained(packed)
    ids = tiny.token_windows(1, 5)
    with torch.set_grad_enabled(gradients):
        expected = network(ids, use_cache=False).logits
        got = torch.compile(network, backend="aot_eager", fullgraph=True)(ids, use_cache=False).logits
    torch._dynamo.reset()
    assert torch.equal(got, expected)
    if gradients:  # what nobody asked for was not refused while the graph was made, and is refused now
        with pytest.raises(TrainingError, match="prunella unpack"):
            got.sum().backward()


def test_the_head_stays_dense_and_tied(tmp_path: Path) -> None:
    pack_model(str(make(tmp_path, tie_word_embeddings=True)), tmp_path / "packed")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert isinstance(network.lm_head, DenseLinear)
    assert network.lm_head.weight is network.model.embed_tokens.weight


FIRST = """
import prunella
assert "transformers.quantizers.auto" not in sys.modules
from transformers import AutoModelForCausalLM
"""
LAST = """
from transformers import AutoModelForCausalLM
import prunella
"""


@pytest.mark.parametrize("imports", [FIRST, pytest.param(LAST, marks=pytest.mark.slow)], ids=["first", "last"])
def test_importing_prunella_does_without_the_entry_point_and_without_transformers(
    python: Callable[..., Any], packed: Path, imports: str
) -> None:
    script = f"""
import os, sys
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
{imports}
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.down_proj).__name__)
"""
    result = python(script, packed)
    assert result.stdout.strip() == "SparseLinear", result.stderr


# ---------------------------------------------------------------------------------------------------------
# Bad input


def test_what_cannot_be_packed_or_unpacked_says_why(pruned: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="packed already"):
        pack_model(str(packed), tmp_path / "out")
    with pytest.raises(ModelError, match="not a packed model"):
        unpack_model(str(pruned), tmp_path / "out")
    with pytest.raises(InputError, match="no layer is sparse enough"):
        pack_model(str(pruned.parent / "dense"), tmp_path / "out")
    with pytest.raises(InputError, match="not empty"):
        pack_model(str(pruned), packed)
    with pytest.raises(InputError, match="--bits 5"):
        pack_model(str(pruned), tmp_path / "out", 5)
    assert not list(tmp_path.iterdir())


def test_a_model_that_was_changed_after_pruning_is_refused(pruned: Path, tmp_path: Path) -> None:
    for path in pruned.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = load_file(tmp_path / "model.safetensors")
    content["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(content, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.up_proj.*are not zero"):
        pack_model(str(tmp_path), tmp_path / "out")


NAME = "model.layers.1.mlp.up_proj"
FILE = "model-00002-of-00003.safetensors"  # of block 1


def spoil(directory: Path, how: str) -> None:
    path = directory / FILE
    config = json.loads((directory / "config.json").read_text())
    settings = config["quantization_config"]
    content = load_file(path)
    match how:
        case "version":
            settings["format_version"] = 2
        case "bits":
            settings["bits"] = 8
        case "group":
            settings["group"] = -3
        case "modules":
            settings["modules"] = {NAME: "x"}
        case "unknown module":
            settings["modules"]["model.layers.7.mlp.up_proj"] = settings["modules"][NAME]
        case "shape":
            settings["modules"][NAME]["shape"] = [5, 5]
        case "experts":
            settings["modules"][NAME]["experts"] = 2
        case "missing":
            del content[f"{NAME}.weight_offsets"]
        case "mask":
            content[f"{NAME}.weight_mask"][3, 1] ^= 16
        case "offsets":
            content[f"{NAME}.weight_offsets"][4] += 1
        case "values cut":
            content[f"{NAME}.weight_values"] = content[f"{NAME}.weight_values"][:-7].clone()
        case "values longer":
            content[f"{NAME}.weight_values"] = torch.cat([content[f"{NAME}.weight_values"]] * 2)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(content, path, metadata={"format": "pt"})
    if how == "file cut":
        path.write_bytes(path.read_bytes()[:-100])
    if how == "file longer":
        path.write_bytes(path.read_bytes() + b"trash")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("version", "format version 2"),
        ("bits", "weight_values"),
        ("group", "group -3"),
        ("modules", "modules is damaged"),
        ("unknown module", r"layers\.7\.mlp\.up_proj"),
        ("shape", r"layers\.1\.mlp\.up_proj"),
        ("experts", r"layers\.1\.mlp\.up_proj"),
        ("missing", rf"{NAME}\.weight_offsets"),
        ("mask", rf"{NAME}\.weight_mask"),
        ("offsets", rf"{NAME}\.weight_(offsets|mask)"),
        ("values cut", rf"{NAME}\.weight_values"),
        ("values longer", rf"{NAME}\.weight_values"),
        ("file cut", "truncated or damaged"),
        ("file longer", "truncated or damaged"),
    ],
)
def test_damaged_files_are_refused_by_name(packed: Path, tmp_path: Path, how: str, message: str) -> None:
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil(tmp_path, how)
    with pytest.raises(ModelError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    if how not in ("unknown module",):
        with pytest.raises(ModelError):
            unpack_model(str(tmp_path), tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------
# Bench


def test_bench_measures_both_sides(pruned: Path, packed: Path) -> None:
    for arguments in ({"model": str(pruned)}, {"model": str(packed)}, {"random": "tiny", "bits": 8}):
        result = bench(**arguments, prompt=8, tokens=2, rounds=1)  # type: ignore[arg-type]
        assert result["packed"]["bytes"] < result["dense"]["bytes"]
        assert result["sparsity"] == pytest.approx(0.5, abs=0.01)
        assert all(result[side][key] > 0 for side in ("dense", "packed") for key in ("prefill", "decode", "bandwidth"))
        json.dumps(result)


def test_bench_refuses_what_it_cannot_measure(pruned: Path) -> None:
    with pytest.raises(InputError, match="one of the two"):
        bench()
    with pytest.raises(InputError, match=r"unknown shape 'tinny'\. Did you mean 'tiny'"):
        bench(random="tinny")
    with pytest.raises(InputError, match="nothing in"):
        bench(str(pruned.parent / "dense"), prompt=4, tokens=1, rounds=1)


def test_the_dense_layer_of_a_packed_model_is_a_linear_layer() -> None:
    layer = nn.Linear(70, 30, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(1, 70).bfloat16()
    expected = layer(x)
    layer.__class__ = DenseLinear
    assert (layer(x).float() - expected.float()).norm() < 0.01 * expected.float().norm()
