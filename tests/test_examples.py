import runpy
import sys
from pathlib import Path

import encoders
import pictures
import pytest
import torch
from torch.nn.functional import normalize

import prunella
from prunella import registry
from prunella.model.timm_models import save_timm

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_pruning_and_generating_prints_a_table_and_text(llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prune_and_generate.py", str(llama), str(tmp_path / "out")])
    runpy.run_path(str(EXAMPLES / "prune_and_generate.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert "A garden is" in printed
    assert (tmp_path / "out" / "prunella.json").is_file()


def test_a_step_of_ones_own_prunes_a_model_in_memory(llama, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["own_step.py", str(llama)])
    monkeypatch.setattr(registry, "steps", dict(registry.steps))
    runpy.run_path(str(EXAMPLES / "own_step.py"), run_name="__main__")
    assert "50.0% of the block weights are zero" in capsys.readouterr().out


def test_a_detector_is_pruned_in_rounds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["detector.py", str(tmp_path / "out")])
    names = runpy.run_path(str(EXAMPLES / "detector.py"), run_name="__main__")
    assert "70.0% pruned" in capsys.readouterr().out
    levels = names["levels"]
    assert all(level.kept and level.score > level.scores[0] for level in levels)  # training helps at every level
    masks = prunella.read_masks(tmp_path / "out")
    assert sum(int((~mask).sum()) for mask in masks.values()) == levels[-1].zeros
    saved = prunella.load_state(names["Detector"](), tmp_path / "out")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), names["detector"].parameters(), strict=True))


def test_pictures_are_classified_dense_beside_packed(tmp_path, monkeypatch, capsys):
    (tmp_path / "dense").mkdir()
    save_timm(pictures.tiny_timm().eval(), tmp_path / "dense")
    folder = pictures.folder(tmp_path / "pictures", count=2)
    names = example("classify_pictures.py", monkeypatch, folder, tmp_path / "dense", tmp_path / "out")
    printed = capsys.readouterr().out
    assert all(f"{number}.png: " in printed for number in (0, 1))
    assert "6 pictures: " in printed
    assert names["answers"].shape == (6,)
    assert names["agree"] == float((names["answers"] == names["theirs"]).double().mean())
    assert (tmp_path / "out" / "packed" / "config.json").is_file()


@pytest.mark.parametrize("head", ["", "SequenceClassification"])
def test_sentences_are_scored_dense_beside_packed(head, tmp_path, monkeypatch, capsys):
    dense = encoders.write(tmp_path / "dense", encoders.build("bert", head, num_labels=3))
    sentences = ["a short one", "the next is longer than the first", "and a last one"]
    (tmp_path / "sentences.txt").write_text("\n".join(sentences))
    names = example("score_sentences.py", monkeypatch, tmp_path / "sentences.txt", dense, tmp_path / "out")
    assert names["answers"].shape == (3, 3)
    assert "3 sentences: " in capsys.readouterr().out
    # what fills up the shorter ones changes nothing, and each row is of its own sentence
    alone = names["model"].tokenizer(sentences[1], return_tensors="pt")
    with names["model"].whole() as network, torch.no_grad():
        found = network(**alone)
        row = (
            found.logits.softmax(1)
            if head
            else normalize(found.last_hidden_state.mean(1))
            @ normalize(
                torch.cat(
                    [
                        network(**names["model"].tokenizer(s, return_tensors="pt")).last_hidden_state.mean(1)
                        for s in sentences
                    ]
                )
            ).T
        )
    if not head:
        row[0, 1] = -1
    torch.testing.assert_close(names["theirs"][1], row[0], rtol=1e-4, atol=1e-5)


def example(name, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_every_example_is_run_here():
    named = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.name in named, f"{path.name} has no test"
