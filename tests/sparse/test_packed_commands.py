"""The commands that make and use packed models."""

import json

import pytest


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


def test_a_packed_model_is_not_pruned_again(run, pruned, tmp_path):
    run("pack", pruned, "-o", tmp_path / "packed", "--bits", "8")
    again = run("prune", tmp_path / "packed", "-o", tmp_path / "again", "--evaluate", "none")
    assert again.code == 2
    assert "prunella unpack" in again.err
    assert not (tmp_path / "again").exists()


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
