"""The commands that make and use packed models."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from prunella.packing import pack_model, unpack_model


@pytest.fixture(scope="module")
def pruned(llama, tmp_path_factory):
    import prunella

    path = tmp_path_factory.mktemp("packed") / "pruned"
    recipe = {"steps": ["wanda"], "calibration": {"samples": 4, "length": 64}, "evaluate": {"source": None}}
    prunella.prune(llama, recipe, output=path)
    return path


def test_a_packed_model_unpacks_to_the_same_bytes_and_is_scored_the_same(run, pruned, tmp_path):
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    assert run("pack", pruned, "-o", packed).code == 0
    assert run("unpack", packed, "-o", plain).code == 0
    scores = []
    for directory in (pruned, packed, plain):
        done = run("eval", directory, "--length", "64", "--windows", "2", "--json")
        assert done.code == 0, done.err
        scores.append(json.loads(done.out)["perplexity"])
    assert scores[0] == scores[2]
    assert scores[1] == pytest.approx(scores[0], rel=0.02)
    assert run("generate", packed, "A garden", "--tokens", "4").code == 0


def test_packing_says_that_an_adapter_stays_behind(run, pruned, tmp_path):
    healed = shutil.copytree(pruned, tmp_path / "healed")
    (healed / "adapter").mkdir()
    done = run("pack", healed, "-o", tmp_path / "packed")
    assert done.code == 0
    assert "adapter' stays behind" in done.err
    assert not (tmp_path / "packed" / "adapter").exists()


def test_a_packed_model_is_not_pruned_again(run, pruned, tmp_path):
    run("pack", pruned, "-o", tmp_path / "packed", "--bits", "8")
    again = run("prune", tmp_path / "packed", "-o", tmp_path / "again", "--evaluate", "none")
    assert again.code == 2
    assert "prunella unpack" in again.err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("bits", [None, 8])
def test_a_packed_model_is_a_transformers_model_like_any_other(pruned, tmp_path, bits):
    """Pipelines, greedy generation, moves and casts, saving: all as with the unpacked model."""
    pack_model(str(pruned), tmp_path / "packed", bits)
    unpack_model(str(tmp_path / "packed"), tmp_path / "plain")
    plain, packed = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("plain", "packed"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "packed")
    inputs = tokenizer(["The garden", "An expression such as"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = plain.generate(**inputs, **options)
    assert packed.generate(**inputs, **options).equal(expected)
    said = [pipeline("text-generation", model=m, tokenizer=tokenizer)("The garden", **options) for m in (plain, packed)]
    assert said[0] == said[1]
    from_files = pipeline("text-generation", model=str(tmp_path / "packed"))("The garden", **options)
    assert from_files == said[0]
    with torch.no_grad():
        logits = plain(**inputs).logits
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.03), (torch.float16, 0.01)):
            cast = packed.to(dtype)
            assert (cast(**inputs).logits.float() - logits).norm() < tolerance * logits.norm()
            assert cast.model.layers[0].mlp.up_proj.weight_mask.dtype == torch.uint8
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").to("cpu")
    again.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert again.generate(**inputs, **options).equal(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_packed_model_moves_to_a_gpu_and_back(pruned, tmp_path):
    pack_model(str(pruned), tmp_path / "packed")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = packed(ids).logits
        moved = packed.to("cuda")(ids.to("cuda")).logits
        assert (moved.cpu() - expected).norm() < 0.01 * expected.norm()
        assert (packed.to("cpu")(ids).logits - expected).norm() == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(("--bits", "3"), "bits"), (("--bits", "8", "--group", "100"), "group")],
)
def test_impossible_packings_are_refused(run, pruned, tmp_path, arguments, word):
    done = run("pack", pruned, "-o", tmp_path / "out", *arguments)
    assert done.code == 2
    assert word in done.err
    assert not (tmp_path / "out").exists()


def test_bench_prints_both_sides(run):
    done = run("bench", "--random", "tiny", "--prompt", "8", "--tokens", "2", "--rounds", "1", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result["packed"]["bytes"] < result["dense"]["bytes"]
    assert run("bench", "--random", "tiny", "--prompt", "8", "--tokens", "2", "--rounds", "1").code == 0
