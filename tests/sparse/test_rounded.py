"""Embeddings and output heads in 8 bits: products, whole models, damaged files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_kernels import TOLERANCE, instructions  # noqa: F401  (a fixture)
from test_model import logits, make, tensors
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

import prunella
from prunella import load_model, perplexity
from prunella.errors import InputError, ModelError, NumericalError
from prunella.packing import pack_model, unpack_model
from prunella.sparse import kernels
from prunella.sparse.bench import bench
from prunella.sparse.format import round_weight
from prunella.sparse.linear import TrainingError
from prunella.sparse.rounded import RoundedEmbedding, RoundedLinear, TiedHead, heads

VALUES = "model.embed_tokens.weight_values"
SHAPES = [(1, 1), (7, 63), (16, 64), (33, 130), (9, 300), (70, 576), (5, 2113)]


def product(x: Tensor, weight_OI: Tensor, group: int = 128) -> tuple[Tensor, Tensor]:
    """By the operator, and in float64."""
    rounded = round_weight(weight_OI, group)
    found = kernels.rounded_linear(x, rounded.values, rounded.scales, rounded.group)
    return found, x.double() @ rounded.dense(torch.float64).T


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_agree_with_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(shape, generator=generator)
    for group in (128, 256, 0):
        for tokens in (1, 2, 5, kernels.FEW, kernels.FEW + 1):
            x = torch.randn(tokens, shape[1], generator=generator).to(dtype)
            found, wanted = product(x, weight_OI, group)
            # activations are rounded to 16 bits; more tokens are multiplied with the weight in their own dtype
            tolerance = max(TOLERANCE[dtype], 2e-4) * (1 if tokens <= kernels.FEW else 2)
            assert (found - wanted).norm() <= tolerance * wanted.norm(), (group, tokens)


def test_torch_gives_the_same_where_there_are_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr(kernels, "TILE", 4 * 200 * 3)  # three rows at a time
    found, wanted = product(torch.randn(2, 3, 200), torch.randn(10, 200))
    assert found.shape == (2, 3, 10)
    assert torch.allclose(found.double(), wanted, atol=1e-5)


def test_rounding_is_within_half_a_step_and_refuses_what_is_not_finite() -> None:
    weight_OI = torch.randn(300, 200)
    rounded = round_weight(weight_OI)
    steps_OI = rounded.scales.float().repeat_interleave(128, 1)[:, :200]
    assert ((rounded.dense(torch.float32) - weight_OI).abs() <= 0.5001 * steps_OI).all()
    assert rounded.nbytes == 300 * 200 + 2 * 300 * 2
    weight_OI[3, 3] = torch.nan
    with pytest.raises(NumericalError):
        round_weight(weight_OI)


def test_parts_that_do_not_fit_are_refused() -> None:
    rounded = round_weight(torch.randn(6, 300))
    for x, values, scales, group in (
        (torch.randn(1, 299), rounded.values, rounded.scales, 128),
        (torch.randn(1, 300), rounded.values, rounded.scales[:, :2].contiguous(), 128),
        (torch.randn(1, 300), rounded.values, rounded.scales, 100),
        (torch.randn(1, 300), rounded.values.T.contiguous().T, rounded.scales, 128),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            kernels.rounded_linear(x, values, scales, group)


@pytest.mark.parametrize(
    "architecture",
    tiny.at_length(
        ["llama", "gemma3_text", "gpt2", "opt", "phi3", "cohere2", "qwen3_moe"], ["llama", "gpt2", "qwen3_moe"]
    ),
)
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_a_rounded_head_says_nearly_the_same(architecture: str, tied: bool, tmp_path: Path) -> None:
    pruned = make(tmp_path, architecture, tie_word_embeddings=tied)
    result = pack_model(str(pruned), tmp_path / "packed", 8, head=True)
    pack_model(str(pruned), tmp_path / "without", 8)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert isinstance(network.get_input_embeddings(), RoundedEmbedding)
    assert isinstance(network.get_output_embeddings(), TiedHead if tied else RoundedLinear)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "without"))
    found = logits(network)
    assert 0 < (found - expected).norm() < 0.03 * expected.norm()
    size = [sum(path.stat().st_size for path in (tmp_path / n).glob("*.safetensors")) for n in ("packed", "without")]
    assert size[0] < size[1]

    network.tie_weights()  # as some programs do
    twin = copy.deepcopy(network)
    assert torch.equal(logits(twin), found)
    if tied:
        assert twin.get_output_embeddings()._embedding[0] is twin.get_input_embeddings()
    network.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), found)

    assert unpack_model(str(tmp_path / "packed"), tmp_path / "plain") == result.layers
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied
    network.dequantize()
    assert type(network.get_input_embeddings()) is type(plain.get_input_embeddings())
    assert (network.get_output_embeddings().weight is network.get_input_embeddings().weight) == tied
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, network.get_parameter(name)), name
    assert torch.equal(logits(network), logits(plain))
    # what has been rounded once is packed to the same integers again
    pack_model(str(tmp_path / "plain"), tmp_path / "twice", head=True)
    before, after = tensors(tmp_path / "packed"), tensors(tmp_path / "twice")
    for key in before:
        if key.endswith("weight_values") and "layers" not in key and ".h." not in key:
            assert (before[key].int() - after[key].int()).abs().max() <= 1, key


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_head_that_is_not_the_embedding_survives_whatever_the_config_says(tmp_path: Path, in_memory: bool) -> None:
    ids = tiny.token_windows()
    network = tiny.build(tie_word_embeddings=True)
    network.lm_head.weight = torch.nn.Parameter(torch.randn(network.lm_head.weight.shape))
    network.save_pretrained(tmp_path / "source")
    assert load_file(tmp_path / "source" / "model.safetensors").keys() >= {"lm_head.weight"}
    source = network if in_memory else tmp_path / "source"
    recipe = {"steps": ["magnitude"], "format": "packed", "round_head": True}
    prunella.prune(tmp_path / "source", {"steps": ["magnitude"]}, output=tmp_path / "dense", calibration=ids)
    prunella.prune(source, recipe, output=tmp_path / "packed", calibration=ids)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert isinstance(found.get_output_embeddings(), RoundedLinear)
    assert (logits(found) - expected).norm() < 0.03 * expected.norm()
    assert perplexity(load_model(str(tmp_path / "packed"), packed=True), ids).perplexity == pytest.approx(
        perplexity(load_model(str(tmp_path / "dense")), ids).perplexity, rel=0.03
    )


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rounded")
    pack_model(str(make(path, tie_word_embeddings=True)), path / "packed", head=True)
    return path / "packed"


def test_it_casts_streams_and_cannot_be_trained(packed: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(packed)
    expected = logits(network)
    found = logits(network.to(torch.float32))
    assert network.get_input_embeddings()(torch.tensor([[1, 2]])).dtype == torch.float32
    assert network.get_input_embeddings().weight_scales.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.02 * expected.norm()
    with pytest.raises(TrainingError):
        network.train()
    hidden = torch.randn(1, 1, 192, requires_grad=True)
    with pytest.raises(TrainingError):
        network.get_output_embeddings()(hidden).sum().backward()
    ids = tiny.token_windows(2, 16)
    loaded = prunella.load_model(str(packed), packed=True)
    pruned = prunella.load_model(str(packed.parent / "pruned"))
    found, expected = (prunella.perplexity(model, ids).perplexity for model in (loaded, pruned))
    assert found == pytest.approx(expected, rel=0.02)
    base = AutoModel.from_pretrained(packed)
    assert isinstance(base.get_input_embeddings(), RoundedEmbedding)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda t: t.pop("model.embed_tokens.weight_scales"), "weight_scales' is missing"),
        (
            lambda t: t.update({"model.embed_tokens.weight_values": torch.zeros(5, 5, dtype=torch.int8)}),
            "weight_values",
        ),
        (lambda t: t["model.embed_tokens.weight_scales"].fill_(torch.inf), "NaN or infinite"),
        (lambda t: t.update({VALUES: torch.zeros(320, 192, dtype=torch.uint8)}), "weight_values"),
    ],
)
def test_damaged_files_are_refused_by_name(packed: Path, tmp_path: Path, damage: Any, word: str) -> None:
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = max(tmp_path.glob("*.safetensors"))
    content = load_file(file)
    damage(content)
    save_file(content, file, {"format": "pt"})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"] = {k: f for k, f in index["weight_map"].items() if f != file.name or k in content}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (
        lambda: AutoModelForCausalLM.from_pretrained(tmp_path),
        lambda: unpack_model(str(tmp_path), tmp_path / "plain"),
    ):
        with pytest.raises(ModelError, match=r"model\.embed_tokens") as error:
            read()
        assert word in str(error.value)


@pytest.mark.parametrize("change", [{"bits": 4}, {"bits": None}, {"experts": 2}])
def test_configs_that_say_what_cannot_be_are_refused(packed: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules"]["model.embed_tokens"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"model\.embed_tokens"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_pruning_straight_into_it_is_the_same_as_packing_afterwards(llama: Path, tmp_path: Path) -> None:
    recipe = {"steps": ["wanda"], "calibration": {"samples": 4, "length": 32}, "evaluate": {"source": None}}
    prunella.prune(llama, recipe, output=tmp_path / "dense")
    pack_model(str(tmp_path / "dense"), tmp_path / "two", head=True)
    prunella.prune(llama, {**recipe, "format": "packed", "round_head": True}, output=tmp_path / "one")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(InputError, match="format: packed"):
        prunella.prune(llama, {**recipe, "round_head": True}, output=tmp_path / "three")


def test_strange_embeddings_and_heads_are_refused() -> None:
    network = tiny.build()
    network.set_input_embeddings(type("Normed", (nn.Embedding,), {})(tiny.VOCABULARY, 32))
    with pytest.raises(InputError, match="Normed"):
        heads(network)
    network = tiny.build()
    network.set_output_embeddings(nn.Sequential(nn.Linear(32, tiny.VOCABULARY)))
    with pytest.raises(InputError, match="Sequential"):
        heads(network)


def test_the_commands_know_it(run: Any, packed: Path, tmp_path: Path) -> None:
    pruned = packed.parent / "pruned"
    done = run("pack", pruned, "-o", tmp_path / "packed", "--bits", "8", "--round-head")
    assert done.code == 0, done.err
    assert run("inspect", tmp_path / "packed").code == 0
    done = run("eval", tmp_path / "packed", "--length", "32", "--windows", "1", "--json")
    assert done.code == 0 or "tokenizer" in done.err
    sides = [
        bench(random="tiny", bits=8, head=head, prompt=8, tokens=2, rounds=1)["packed"]["bytes"]
        for head in (True, False)
    ]
    assert sides[0] < sides[1]
