"""Classifiers of texts: what is read, how labels are matched, what is said of the result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import encoders
import pytest
import torch
from torch.nn.functional import cross_entropy

import prunella
from prunella import InputError, Model, ModelError
from prunella.evaluate.task import judge
from prunella.samples import TARGET, Samples
from prunella.tasks import make_task, open_model, task_of
from prunella.tasks.classify import matched
from prunella.tasks.heads import label_names, with_head
from prunella.texts import ClassName
from prunella.unlabelled import targeted

NAMES = {0: "NEGATIVE", 1: "POSITIVE"}
TEXTS = [f"{word} statement is true of the value of {n} names" for n in range(8) for word in ("the", "a longer")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of two classes with names of their own. Read only."""
    network = encoders.build("bert", id2label=NAMES, label2id={name: n for n, name in NAMES.items()})
    return encoders.write(tmp_path_factory.mktemp("classify") / "dense", network)


@pytest.fixture(scope="module")
def model(source: Path) -> Model:
    return open_model(str(source))


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return lines(tmp_path / "data.jsonl", [{"text": text, "label": n % 2} for n, text in enumerate(TEXTS)])


def read(model: Model, path: Path, count: int, **options: Any) -> Samples:
    return make_task("classify", options).samples(model, str(path), count, test=True)


def refused(model: Model, path: Path, count: int, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        read(model, path, count, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# Samples


def test_texts_go_as_long_as_they_are_and_those_of_a_length_together(model: Model, data: Path) -> None:
    samples = read(model, data, 12)
    assert len(samples) == 12
    seen = {tuple(row["input_ids"][0].tolist()): int(row["labels"]) for row in samples}
    for n, text in enumerate(TEXTS[:12]):
        assert seen[tuple(model.tokenizer(text)["input_ids"])] == n % 2
    assert len({group["input_ids"].shape[1] for group in samples.groups}) == len(samples.groups) > 1
    assert not any((group["input_ids"] == model.tokenizer.pad_token_id).any() for group in samples.groups)
    assert all((group["token_type_ids"] == 0).all() for group in samples.groups)


def test_pairs_have_segments_where_the_network_takes_them(model: Model, tmp_path: Path) -> None:
    path = lines(tmp_path / "x.jsonl", [{"text": "a value", "text_pair": "an other name", "label": 1}])
    (group,) = read(model, path, 1).groups
    expected = model.tokenizer("a value", "an other name")
    assert group["input_ids"][0].tolist() == expected["input_ids"]
    assert group["token_type_ids"][0].tolist() == expected["token_type_ids"]
    assert 1 in expected["token_type_ids"]
    other = make_task("classify").wrap(encoders.build("distilbert"), model.tokenizer)
    (group,) = make_task("classify").samples(other, str(path), 1).groups
    assert set(group) == {"input_ids", "labels"}


def test_long_texts_are_cut_and_counted(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = lines(tmp_path / "x.jsonl", ["", {"text": "value " * 100, "label": 0}, {"text": "a value", "label": 1}])
    samples = read(model, path, 2)
    assert max(group["input_ids"].shape[1] for group in samples.groups) == 64  # positions
    assert "1 of 2 texts are longer than 64 tokens, and cut there" in capsys.readouterr().err
    assert max(group["input_ids"].shape[1] for group in read(model, path, 2, length=16).groups) == 16
    assert "texts of 65 tokens are longer than the model's 64 positions" in refused(model, path, 2, length=65)
    assert "have no room for text: the tokenizer adds 2 of its own" in refused(model, path, 2, length=2)


def test_positions_of_roberta_begin_behind_the_padding() -> None:
    network = encoders.build("roberta", pad_token_id=1)
    most = make_task("classify").wrap(network)
    from prunella.calibrate import positions

    assert positions(most) == 62
    with torch.no_grad():
        network(torch.full((1, 62), 5))
        with pytest.raises((IndexError, RuntimeError)):
            network(torch.full((1, 63), 5))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 0}, '{"text": "b", "la'], r"line 2: no JSON object \(is the line cut off\?\)"),
        ([{"sentence": "a", "label": 0}], r"line 1: no 'text'; it has: sentence, label.*--set classify\.text=NAME"),
        ([{"text": 3, "label": 0}], r"line 1: 'text' is not a string"),
        ([{"text": "a", "text_pair": 3, "label": 0}], r"'text_pair' is not a string"),
        ([{"text": "a", "label": 2}], r"line 1: label '2' is none of the model's 2 classes \(0 NEGATIVE, 1 POSITIVE\)"),
        ([{"text": "a", "label": "neutral"}], r"label 'neutral' is none of the model's 2 classes"),
        ([{"text": "a", "label": [0]}], r"line 1: the label \[0\] is neither a name nor a number"),
        ([{"text": "a", "label": True}], r"label 'True' is none of"),
        ([{"text": "a", "label": 0}, {"text": "b"}], r"line 2: no 'label', which other rows have"),
        ([{"text": "a", "label": 0}, {"text": "b", "label": -1}], r"line 2: no 'label', which other rows have"),
        ([{"text": " ", "label": 0}], r"holds 0 texts, but 1 are asked for"),
    ],
)
def test_what_cannot_be_read_is_named(model: Model, tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(model, lines(tmp_path / "x.jsonl", rows), len(rows))


def test_empty_texts_are_left_out_and_counted(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"text": "", "label": 0},
        {"text": "a value", "label": 0},
        {"text": None, "label": 1},
        {"text": "b", "label": 1},
    ]
    assert len(read(model, lines(tmp_path / "x.jsonl", rows), 2)) == 2
    assert "2 rows of" in capsys.readouterr().err


def test_other_columns_can_be_named(model: Model, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("premise,hypothesis,gold\na value,a name,positive\na name,a value,negative\n")
    samples = read(model, tmp_path / "x.csv", 2, text="premise", pair="hypothesis", label="gold")
    assert sorted(label for group in samples.groups for label in group["labels"].tolist()) == [0, 1]


def test_prose_is_cut_into_passages_that_have_no_label(model: Model) -> None:
    samples = make_task("classify").samples(model, "pydoc", 5)
    assert len(samples) == 5
    assert all("labels" not in group for group in samples.groups)
    after = make_task("classify").samples(model, "pydoc", 3, used=2)
    ids = [sorted(map(tuple, (i for g in one.groups for i in g["input_ids"].tolist()))) for one in (samples, after)]
    assert set(ids[1]) < set(ids[0])


# ---------------------------------------------------------------------------------------------------------
# Labels


def match(*labels: Any, names: dict[int, str] = NAMES) -> list[int]:
    return matched(labels, names, [f"row {n}" for n in range(len(labels))])


def hub(name: str, number: int) -> ClassName:
    return ClassName.of([*["negative", "positive", "odd"][:number], name], number)


def test_labels_are_matched_by_name_or_number() -> None:
    assert match("positive", " Negative") == [1, 0]
    assert match(1, 0, 1) == match("1", "0", "1") == match(1.0, 0.0, 1.0) == [1, 0, 1]
    assert match(hub("positive", 1), hub("negative", 0)) == [1, 0]
    assert match(hub("positive", 0), names={0: "LABEL_0", 1: "LABEL_1"}) == [0]


def test_the_order_of_labels_is_never_guessed() -> None:
    """A data set's own numbers are not the model's: entailment is 0 here and 2 there."""
    names = {0: "contradiction", 1: "neutral", 2: "entailment"}
    assert match(ClassName.of(["entailment", "neutral"], 0), names=names) == [2]
    with pytest.raises(InputError, match=r"label 'yes' is none of the model's 3 classes \(0 contradiction, 1 neutral"):
        match(ClassName.of(["yes", "no"], 0), names=names)
    stars = {n: str(n + 1) for n in range(5)}
    assert match("5", 5, names=stars) == [4, 4]
    assert match(0, 0, names=stars) == [0, 0]
    with pytest.raises(InputError, match=r"label '1' is a name of the model's classes .* and a number of another one"):
        match(1, 2, names=stars)


def test_labels_that_are_handed_over_are_looked_at(source: Path, model: Model) -> None:
    ids = torch.randint(5, 100, (2, 6))
    task = make_task("classify")
    for labels, message in [
        (torch.tensor([0, 2]), "label 2 is out of range: the model has 2 classes, 0 to 1"),
        (torch.tensor([0, -1]), "label -1 is out of range"),
        (torch.tensor([0.0, 1.0]), "labels are integers of shape"),
        (torch.tensor([[0], [1]]), "labels are integers of shape"),
    ]:
        with pytest.raises(InputError, match=message):
            task.check(model, Samples.of({"input_ids": ids, "labels": labels}))
    with pytest.raises(InputError, match="BertForSequenceClassification takes no 'segments': leave it out"):
        task.check(model, Samples.of({"input_ids": ids, "segments": ids}))
    with pytest.raises(InputError, match=r"segment id 2 \(token_type_ids\) is none of the 2"):
        task.check(model, Samples.of({"input_ids": ids, "token_type_ids": torch.full((2, 6), 2)}))
    with pytest.raises(InputError, match="hides tokens"):
        task.check(model, Samples.of({"input_ids": ids, "attention_mask": torch.tensor([[1] * 5 + [0]] * 2)}))
    with pytest.raises(InputError, match=r"token 999 lies outside"):
        task.check(model, Samples.of({"input_ids": torch.full((1, 4), 999)}))


# ---------------------------------------------------------------------------------------------------------
# Runs


def test_a_classifier_is_pruned_and_its_report_counts_right_answers(
    source: Path, data: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    options = ("--calibration", data, "--samples", 4, "--evaluate", data, "--windows", 12, "--step", "wanda")
    done = run("prune", source, "-o", tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert "labels of" in done.err
    assert "0 is 0 (NEGATIVE)" in done.err
    report = prunella.Report.read(tmp_path / "out")
    assert list(report.recipe["task"]) == ["classify"]
    for folder, side in ((source, report.dense), (tmp_path / "out", report.pruned)):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        network = AutoModelForSequenceClassification.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            logits = torch.cat([network(**tokenizer(text, return_tensors="pt")).logits for text in TEXTS[4:]])
        right = torch.arange(12) % 2
        assert side["accuracy"] == pytest.approx((logits.argmax(1) == right).double().mean().item())
        assert side["loss"] == pytest.approx(cross_entropy(logits, right).item(), rel=1e-4)
        assert side["classes"] == {"NEGATIVE": 6, "POSITIVE": 6}
    assert report.pruned["changed"] == report.pruned["lost"] + report.pruned["gained"]


def test_texts_without_labels_are_compared_with_the_dense_network(source: Path, tmp_path: Path) -> None:
    recipe = {"steps": ["magnitude"], "sparsity": 0.9, "calibration": {"samples": 4}, "evaluate": {"windows": 12}}
    report = prunella.prune(str(source), recipe, output=tmp_path / "out")
    assert report.dense["figure"] == "agreement"
    assert report.dense["agreement"] == 1
    assert report.dense["loss"] > 0
    assert len(report.pruned["each"]) == 12


def test_targets_are_the_dense_networks_answers_in_the_order_of_the_samples(model: Model) -> None:
    samples = make_task("classify").samples(model, "pydoc", 9)
    found = targeted(model, samples)
    assert found.digest == samples.digest
    with model.whole() as network, torch.no_grad():
        for group in found.groups:
            logits = network(group["input_ids"], token_type_ids=group["token_type_ids"]).logits
            assert torch.equal(group[TARGET], logits.argmax(1))
    assert targeted(model, found) is found


def test_gradients_reach_a_network_that_learns_from_its_own_answers(source: Path) -> None:
    """Its answers as labels have gradients; where it is compared with its own numbers, they would all be zero."""
    model = open_model(str(source))
    found = list(prunella.gradients(model, make_task("classify").samples(model, "pydoc", 2)))
    assert any(gradient.abs().max() > 0 for _, _, layers in found for gradient in layers.values())
    one = make_task("classify").wrap(encoders.build("bert", num_labels=1))
    ids = torch.randint(5, 100, (3, 6))
    with pytest.raises(InputError, match="has no gradient, since they are compared with what the dense network itself"):
        list(prunella.gradients(one, Samples.of({"input_ids": ids})))
    labelled = Samples.of({"input_ids": ids, "labels": torch.tensor([1.0, 2.0, 3.0])})
    assert len(list(prunella.gradients(one, labelled))) == 3 * len(one.blocks)


def test_a_network_that_predicts_a_number_is_measured_by_its_squared_error(tmp_path: Path) -> None:
    source = encoders.write(tmp_path / "dense", encoders.build("bert", num_labels=1))
    rows = [{"text": text, "label": n / 4} for n, text in enumerate(TEXTS)]
    data = lines(tmp_path / "x.jsonl", rows)
    part = {"source": str(data)}
    recipe = {"steps": ["wanda"], "calibration": {**part, "samples": 6}, "evaluate": {**part, "windows": 10}}
    report = prunella.prune(str(source), recipe, output=tmp_path / "out")
    assert report.dense["figure"] == "loss"
    assert report.pruned["moved"] > 0
    with pytest.raises(InputError, match="the label 'good' is no number, which this model predicts"):
        read(open_model(str(source)), lines(data, [{"text": "a", "label": "good"}]), 1)


def test_a_dense_network_far_below_chance_is_warned_of(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    task = make_task("classify")
    samples = Samples.of({"input_ids": torch.full((50, 4), 9), "labels": torch.zeros(50, dtype=torch.long)})
    wrong = {"class": torch.ones(50, dtype=torch.long), "right": torch.zeros(50, dtype=torch.bool)}
    task.scores(model, samples, [1.0] * 50, wrong)
    assert "right on 0.0% of the samples, far below chance (50.0%)" in capsys.readouterr().err
    task.scores(model, samples, [1.0] * 50, wrong, wrong)  # a pruned one may be as bad as it is
    assert not capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# Models


def test_a_config_says_what_its_model_is_for(source: Path, tmp_path: Path) -> None:
    assert task_of(str(source)) == task_of(encoders.build("bert")) == {"classify": {}}
    headless = encoders.write(tmp_path / "mlm", encoders.build("bert", "MaskedLM"))
    with pytest.raises(ModelError, match=r"no classifier of texts: its config\.json names BertForMaskedLM"):
        open_model(str(headless), "classify")


@pytest.mark.parametrize(
    ("labels", "problem", "message"),
    [
        (3, "multi_label_classification", "several labels"),
        (1, "single_label_classification", "one class .* nothing can be learned"),
    ],
)
def test_problems_that_are_no_classification_are_refused_by_name(labels: int, problem: str, message: str) -> None:
    config = SimpleNamespace(architectures=None, num_labels=labels, problem_type=problem)
    task: Any = make_task("classify")
    with pytest.raises(ModelError, match=message):
        task.admit("some/model", config)


def test_a_new_head_has_the_classes_of_the_data(tmp_path: Path, data: Path) -> None:
    task: Any = make_task("classify")
    assert label_names(task, [str(data)]) == ["LABEL_0", "LABEL_1"]
    named = lines(tmp_path / "named.jsonl", [{"text": "a", "label": name} for name in ("good", "bad", "good")])
    assert label_names(task, [str(named)]) == ["bad", "good"]
    for rows, message in [
        ([{"text": "a", "label": 0}, {"text": "a", "label": 2}], "without a gap; these are 0, 2"),
        ([{"text": "a", "label": 0}, {"text": "a", "label": "x"}], "are names, or the numbers"),
        ([{"text": "a", "label": 0}], "there is only 0"),
        ([{"text": "a"}], "there is none"),
        ([{"text": "a", "label": 0.5}], "neither a name nor a whole number"),
    ]:
        with pytest.raises(InputError, match=message):
            label_names(task, [str(lines(tmp_path / "bad.jsonl", rows))])
    bare = encoders.write(tmp_path / "bare", encoders.build("bert", ""))
    one, other = (with_head(str(bare), tmp_path / str(n), ["bad", "good"]) for n in range(2))
    model = open_model(str(one))
    assert model.network.config.id2label == {0: "bad", 1: "good"}
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    with pytest.raises(ModelError, match="has a head for classes already"):
        with_head(str(one), tmp_path / "again", ["bad", "good"])


def test_the_usual_numbers_of_samples_are_taken_as_far_as_they_are_there(
    source: Path, data: Path, tmp_path: Path
) -> None:
    """Nobody asked for 128 and 512 of them; a number that somebody asks for has to be there."""
    part = {"source": str(data)}
    assert prunella.Recipe.of({"task": "classify"}).plain()["evaluate"]["windows"] == 512
    assert "windows" not in prunella.Recipe().plain()["evaluate"]
    assert prunella.Recipe().resolved("smollm2-135m").plain()["evaluate"]["windows"] == 8
    report = prunella.prune(str(source), {"steps": ["magnitude"], "evaluate": part}, output=tmp_path / "out")
    assert report.recipe["calibration"]["samples"] == 128
    assert report.pruned["samples"] == len(TEXTS)
    recipe = {"steps": ["magnitude"], "evaluate": {**part, "windows": 17}}
    with pytest.raises(InputError, match="holds 16 texts, but 17 are asked for"):
        prunella.prune(str(source), recipe, output=tmp_path / "other")


def test_a_wrong_label_far_down_a_file_is_refused_and_not_left_out(model: Model, tmp_path: Path) -> None:
    rows = [
        *({"text": f"good {n}", "label": "positive"} for n in range(300)),
        {"text": "bad", "label": "no such class"},
    ]
    with pytest.raises(InputError, match="line 301: label 'no such class'"):
        judge(model, [str(lines(tmp_path / "late.jsonl", rows))])
