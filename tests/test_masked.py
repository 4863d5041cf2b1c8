"""Encoders without a task of their own: masked words, and embeddings that keep their cosine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import encoders
import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

import prunella
from prunella import InputError, ModelError
from prunella.model.built_in import BUILT_IN
from prunella.samples import TARGET, Samples
from prunella.tasks import make_task, open_model, task_of
from prunella.tasks.masked import IGNORED
from prunella.unlabelled import targeted

SHORT = {"calibration": {"samples": 4, "length": 24}, "evaluate": {"windows": 6, "length": 24}}


def pooling(**modes: bool) -> dict[str, str]:
    """The files of a sentence transformer."""
    return {
        **encoders.SENTENCES,
        "1_Pooling/config.json": json.dumps({f"pooling_mode_{key}": on for key, on in modes.items()}),
    }


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder with a head for words. Read only."""
    return encoders.write(tmp_path_factory.mktemp("masked") / "words", encoders.build("bert", "MaskedLM"))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence transformer that looks at the first token. Read only."""
    files = pooling(cls_token=True, mean_tokens=False)
    return encoders.write(tmp_path_factory.mktemp("masked") / "sentences", encoders.build("bert", ""), files)


# ---------------------------------------------------------------------------------------------------------
# Words


def test_a_share_of_each_text_is_masked_and_nothing_else_is_asked_for(words: Path) -> None:
    model = open_model(str(words))
    task = make_task("masked", {"share": 0.3})
    samples = task.samples(model, "pydoc", 40, seed=3)
    kept, hidden, asked = 0, 0, 0
    for group in samples.groups:
        ids, labels = group["input_ids"], group["labels"]
        there = labels != IGNORED
        assert torch.equal(ids[~there], ids.where(~there, labels)[~there])
        assert not torch.isin(labels[there], torch.tensor(model.tokenizer.all_special_ids)).any()
        assert (there.sum(1) == max(1, round(0.3 * (ids.shape[1] - 2)))).all()
        asked += int(there.sum())
        hidden += int((ids[there] == model.tokenizer.mask_token_id).sum())
        kept += int((ids[there] == labels[there]).sum())
    assert hidden / asked == pytest.approx(0.8, abs=0.1)
    assert 0.03 < kept / asked < 0.2
    whole = Samples(
        tuple({"input_ids": g["input_ids"].where(g["labels"] == IGNORED, g["labels"])} for g in samples.groups)
    )
    plain = {tuple(ids) for group in whole.groups for ids in group["input_ids"].tolist()}
    texts = make_task("masked").rows(model, "pydoc", 40, 0, False)  # type: ignore[attr-defined]
    assert plain == {tuple(one["input_ids"]) for one in task.encode(model, texts)}  # type: ignore[attr-defined]


def test_what_is_masked_is_drawn_by_the_seed_and_stays_where_it_is_measured(words: Path) -> None:
    model = open_model(str(words))
    task = make_task("masked")
    one, same, other = (task.samples(model, "pydoc", 8, seed=seed).digest for seed in (0, 0, 1))
    assert one == same != other
    assert task.samples(model, "pydoc", 8, seed=5, test=True).digest == one


def test_masked_words_are_measured_as_transformers_measures_them(words: Path, tmp_path: Path) -> None:
    report = prunella.prune(str(words), {**SHORT, "steps": ["sparsegpt"]}, output=tmp_path / "out")
    assert list(report.recipe["task"]) == ["masked"]
    samples = make_task("masked", {"length": 24}).samples(open_model(str(words)), "pydoc", 6, used=4, test=True)
    for folder, side in ((words, report.dense), (tmp_path / "out", report.pruned)):
        network = AutoModelForMaskedLM.from_pretrained(folder)
        losses, right, asked = [], 0, 0
        for one in samples:
            with torch.no_grad():
                logits = network(input_ids=one["input_ids"]).logits[0]
            there = one["labels"][0] != IGNORED
            losses.append(cross_entropy(logits[there], one["labels"][0][there]).item())
            right += int((logits[there].argmax(1) == one["labels"][0][there]).sum())
            asked += int(there.sum())
        assert side["each"] == pytest.approx(losses, rel=1e-4)
        assert (side["words"], side["accuracy"]) == (asked, right / asked)


def test_token_ids_alone_are_compared_with_the_dense_networks_words() -> None:
    model = make_task("masked").wrap(encoders.build("roberta", "MaskedLM"))
    samples = Samples.of(torch.randint(5, 100, (4, 9)))
    (group,) = targeted(model, samples).groups
    assert group[TARGET].shape == (4, 9)
    recipe = {"task": "masked", "steps": ["wanda"], "allocate": "owl"}
    assert prunella.prune(model, recipe, calibration=samples).layers


# ---------------------------------------------------------------------------------------------------------
# Embeddings


def test_a_text_is_pooled_as_the_directory_says(sentences: Path, tmp_path: Path) -> None:
    states = torch.randn(2, 5, 8)
    weights = torch.arange(1.0, 6)
    for modes, expected in [
        ({"cls_token": True}, states[:, 0]),
        ({"mean_tokens": True}, states.mean(1)),
        ({"max_tokens": True}, states.amax(1)),
        ({"lasttoken": True}, states[:, -1]),
        ({"mean_sqrt_len_tokens": True}, states.sum(1) / 5**0.5),
        ({"weightedmean_tokens": True}, (states * weights[:, None]).sum(1) / 15),
        ({"mean_tokens": True, "cls_token": True}, torch.cat([states.mean(1), states[:, 0]], 1)),
        ({"mean_tokens": False}, None),
        ({"wild_tokens": True}, None),
    ]:
        folder = tmp_path / "-".join(modes)
        encoders.write(folder, encoders.build("bert", ""), pooling(**modes))
        task: Any = make_task("masked")
        if expected is None:
            with pytest.raises(ModelError, match=r"pools in a way that is not known .*masked\.pooling=mean"):
                task.open(str(folder))
        else:
            task.open(str(folder))
            assert torch.allclose(task.embeddings((states,)), expected), modes
    assert torch.equal(make_task("masked", {"pooling": "max"}).embeddings((states,)), states.amax(1))  # type: ignore[attr-defined]


def test_embeddings_are_measured_by_their_cosine_to_the_dense_ones(
    sentences: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    texts = [f"{word} statement is true of the value of {n} names" for n in range(6) for word in ("the", "a longer")]
    data = tmp_path / "x.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    options = ("--calibration", data, "--samples", 4, "--evaluate", data, "--windows", 8, "--step", "wanda")
    done = run("prune", sentences, "-o", tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert "cosine (x.jsonl, 8 samples" in done.out
    report = prunella.Report.read(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(sentences)
    found = []
    for folder in (sentences, tmp_path / "out"):
        network = AutoModel.from_pretrained(folder)
        with torch.no_grad():
            found.append(torch.cat([network(**tokenizer(t, return_tensors="pt"))[0][:, 0] for t in texts[4:]]))
    cosine = cosine_similarity(*found)
    assert report.pruned["cosine"] == pytest.approx(cosine.mean().item(), abs=1e-5)
    assert report.dense["cosine"] == pytest.approx(1)
    near = [torch.nn.functional.normalize(one, dim=1) for one in found]
    near = [(one @ one.T).fill_diagonal_(-2).argmax(1) for one in near]
    assert report.pruned["same nearest"] == (near[0] == near[1]).double().mean().item()


def test_what_sentence_transformers_reads_comes_along(sentences: Path, tmp_path: Path) -> None:
    prunella.prune(str(sentences), {**SHORT, "steps": ["magnitude"]}, output=tmp_path / "out")
    for name in ("modules.json", "1_Pooling/config.json", "config_sentence_transformers.json"):
        assert (tmp_path / "out" / name).read_bytes() == (sentences / name).read_bytes()
    assert task_of(str(tmp_path / "out")) == {"masked": {}}


def test_a_module_behind_the_pooling_is_said_and_comes_along_with_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = pooling(mean_tokens=True)
    more = [*json.loads(files["modules.json"]), {"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    files |= {"modules.json": json.dumps(more), "2_Dense/model.safetensors": "weights", "2_Dense/config.json": "{}"}
    source = encoders.write(tmp_path / "dense", encoders.build("bert", ""), files)
    prunella.prune(str(source), {**SHORT, "steps": ["magnitude"]}, output=tmp_path / "out")
    assert "has a Dense behind its pooling: embeddings are compared before it" in capsys.readouterr().err
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").read_text() == "weights"


def test_embeddings_that_are_compared_with_themselves_have_no_gradient(sentences: Path) -> None:
    model = open_model(str(sentences))
    with pytest.raises(InputError, match=r"the loss of task 'masked' on these samples has no gradient"):
        list(prunella.gradients(model, make_task("masked").samples(model, "pydoc", 2)))


# ---------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("kind", ["bert", "electra", "distilbert", "modernbert"])
def test_an_encoder_is_opened_with_its_head_for_words_or_without(kind: str, tmp_path: Path) -> None:
    source = encoders.write(tmp_path / kind, encoders.build(kind, "MaskedLM"))
    assert task_of(str(source)) == task_of(encoders.build(kind, "")) == {"masked": {}}
    for loss, ending in (("auto", "ForMaskedLM"), ("words", "ForMaskedLM"), ("cosine", "Model")):
        model = make_task("masked", {"loss": loss}).open(str(source))  # the pooler, which has no weights, is left out
        assert type(model.network).__name__.endswith(ending)
    recipe = {**SHORT, "task": {"masked": {"loss": "cosine"}}, "steps": ["wanda"]}
    report = prunella.prune(str(source), recipe, output=tmp_path / "out")
    assert report.dense["figure"] == "cosine"
    network = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")  # the head is there still
    zeros = sum(int((p == 0).sum()) for p in network.parameters() if p.ndim > 1)
    assert zeros >= sum(round(layer.sparsity * layer.size) for layer in report.layers)


def test_what_is_no_encoder_is_refused_with_what_it_is(words: Path, tmp_path: Path) -> None:
    import transformers as t

    config = t.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    t.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match=r"is an encoder and a decoder \(t5\): use --task seq2seq"):
        open_model(str(tmp_path / "t5"), "masked")
    with pytest.raises(InputError, match=r"masked\.share=2: a share of the tokens lies between 0 and 1"):
        make_task("masked", {"share": 2.0})
    model = open_model(str(words))
    ids = torch.randint(5, 100, (2, 6))
    task = make_task("masked")
    with pytest.raises(InputError, match=r"labels \(2,\) are of masked words, one for each token"):
        task.check(model, Samples.of({"input_ids": ids, "labels": torch.zeros(2, dtype=torch.long)}))
    with pytest.raises(InputError, match="a text has no word that is asked for"):
        task.check(model, Samples.of({"input_ids": ids, "labels": torch.full((2, 6), IGNORED)}))


def test_the_built_in_encoder_is_for_this_task() -> None:
    assert task_of("minilm-l6") == {"masked": {}}
    assert BUILT_IN["minilm-l6"].version == "0.1.0"
