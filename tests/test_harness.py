"""Zero-shot accuracy through lm-evaluation-harness, offline."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional

import prunella
from prunella import InputError
from prunella.evaluate.score import score
from prunella.packing import pack_model

ROOT = Path(__file__).parent.parent
ROWS: list[dict[str, Any]] = [
    {
        "query": f"Question: What do {n} gardeners need?\n" if n % 2 else f"The {n} gardeners went out and",
        "choices": ["a spade.", "a much longer answer than the others, with a spade in it.", "water."][: 2 + n % 2],
        "gold": n % 2,
    }
    for n in range(12)
]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "garden.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def pruned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness") / "pruned"
    recipe = {"steps": ["magnitude"], "sparsity": 0.7, "evaluate": {"source": None}}
    prunella.prune(llama, recipe | {"calibration": {"samples": 1, "length": 16}}, output=path)
    return path


@pytest.fixture(scope="module")
def packed(pruned: Path) -> Path:
    pack_model(str(pruned), pruned.parent / "packed")
    return pruned.parent / "packed"


def by_hand(model: Path) -> tuple[list[int], list[int]]:
    """For each question the likeliest choice, and the likeliest for each character."""
    opened = prunella.load_model(str(model), packed=True)
    plain, shared = [], []
    with opened.whole() as network, torch.no_grad():
        for row in ROWS:
            query = row["query"].rstrip() + ("\nAnswer:" if "Question:" in row["query"] else "")
            scores = []
            for choice in row["choices"]:
                start = len(opened.tokenizer(query)["input_ids"])
                ids = torch.tensor([opened.tokenizer(f"{query} {choice}")["input_ids"]])
                logits = functional.log_softmax(network(ids).logits[0, :-1].float(), -1)
                scores.append(logits.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
            plain.append(max(range(len(scores)), key=lambda i: scores[i]))
            shared.append(max(range(len(scores)), key=lambda i: scores[i] / len(row["choices"][i])))
    return plain, shared


@pytest.mark.usefixtures("lm_eval")
def test_accuracies_are_those_computed_by_hand(llama: Path, questions: Path) -> None:
    from prunella.evaluate.harness import accuracies

    (found,) = accuracies(str(llama), files=[questions])
    plain, shared = by_hand(llama)
    assert list(found.answers) == plain
    gold = [row["gold"] for row in ROWS]
    for metric, answers in (("acc", plain), ("acc_norm", shared)):
        value, error = found.metrics[metric]
        share = sum(a == g for a, g in zip(answers, gold, strict=True)) / 12
        assert value == pytest.approx(share)
        assert error == pytest.approx((share * (1 - share) / 11) ** 0.5)
    assert (found.task, found.questions) == ("garden", 12)


@pytest.mark.usefixtures("lm_eval")
def test_packed_beside_dense(run: Callable[..., Any], llama: Path, packed: Path, questions: Path) -> None:
    result = score(str(packed), files=[questions], beside=str(llama))
    (task,) = result["tasks"]
    ours, theirs = by_hand(packed)[0], by_hand(llama)[0]
    assert task["changed"] == sum(a != b for a, b in zip(ours, theirs, strict=True)) / 12
    assert set(task["metrics"]) == set(task["beside"]["metrics"]) == {"acc", "acc_norm"}
    assert not result["texts"]
    done = run("eval", packed, "--tasks-file", questions, "--beside", llama, "--limit", 6)
    assert done.code == 0, done.err
    assert "garden" in done.out
    assert "changed" in done.out
    assert "perplexity" not in done.out


@pytest.mark.slow
@pytest.mark.usefixtures("lm_eval")
def test_the_harness_knows_prunella_without_importing_it(packed: Path, questions: Path, tmp_path: Path) -> None:
    """As an installed Prunella does: torch calls the entry point, the harness finds the model type in its table."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["torch.backends"]
    assert points == {"prunella": "prunella_hook:register"}
    task = tmp_path / "garden.yaml"
    data = {"data_files": {"test": str(questions)}, "cache_dir": str(tmp_path / "cache")}
    config = {
        "task": "garden",
        "dataset_path": "json",
        "dataset_kwargs": data,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    task.write_text(json.dumps(config))
    script = "import prunella_hook; prunella_hook.register(); import sys; assert 'torch' not in sys.modules\n"
    script += "from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    arguments = ["--model", "prunella", "--model_args", f"pretrained={packed}", "--tasks", "garden"]
    done = subprocess.run(
        [sys.executable, "-c", script, "run", *arguments, "--include_path", str(tmp_path), "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "|garden|" in done.stdout.replace(" ", "")


@pytest.mark.usefixtures("lm_eval")
def test_a_packed_model_runs_in_the_harness_as_any_other(packed: Path, questions: Path) -> None:
    """`--model hf`, and generation."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from prunella.evaluate.harness import PrunellaLM

    prompts = ["A garden", "Question: What is a spade?"]
    request = [
        Instance("generate_until", {}, (prompt, {"max_gen_toks": 5, "until": ["\n\n"], "do_sample": False}), n)
        for n, prompt in enumerate(prompts)
    ]
    ours = PrunellaLM(str(packed)).generate_until(request)
    assert ours == HFLM(str(packed), device="cpu").generate_until(request)


@pytest.mark.usefixtures("lm_eval")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "line 1: not a JSON object"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 1"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "at least two"),
        ('{"query": "a", "choices": "yes", "gold": 0}', "line 1"),
        ('{"query": "a", "choices": {"b": 1, "c": 2}, "gold": 0}', "line 1"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "line 1"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 0}\n{"query": 1}', "line 2"),
    ],
)
def test_damaged_questions_say_where(llama: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(InputError, match=message):
        score(str(llama), files=[tmp_path / "q.jsonl"])


@pytest.mark.usefixtures("lm_eval")
def test_files_of_questions_have_names_of_their_own_and_any_characters(llama: Path, tmp_path: Path) -> None:
    files = [tmp_path / "a" / "q.jsonl", tmp_path / "b" / "q.jsonl"]
    for file in files:
        file.parent.mkdir()
        file.write_text('{"query": "a\u2028b", "choices": ["b", "c"], "gold": 0}\n', encoding="utf-8")
    assert score(str(llama), files=files[:1])["tasks"][0]["questions"] == 1
    with pytest.raises(InputError, match="two tasks are called 'q'"):
        score(str(llama), files=files)


@pytest.mark.usefixtures("lm_eval")
def test_a_file_of_questions_that_is_not_there_is_named(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        score(str(llama), files=[tmp_path / "nowhere.jsonl"])


@pytest.mark.slow
@pytest.mark.usefixtures("lm_eval")
def test_tasks_that_cannot_be_had_say_why(llama: Path) -> None:
    with pytest.raises(InputError, match=r"unknown task 'arc_eazy'\. Did you mean 'arc_easy'"):
        score(str(llama), tasks=["arc_eazy"])
    with pytest.raises(InputError, match=r"data of 'arc_easy' cannot be had.*--tasks-file"):
        score(str(llama), tasks=["arc_easy"])


def test_without_the_harness_it_says_what_to_install(
    run: Callable[..., Any], llama: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "prunella.evaluate.harness", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    done = run("eval", llama, "--tasks-file", questions)
    assert done.code == 2
    assert "pip install 'prunella[eval]'" in done.err


@pytest.fixture
def lm_eval() -> None:
    pytest.importorskip("lm_eval")


@pytest.mark.usefixtures("lm_eval")
def test_accuracies_say_whether_requests_begin_with_bos(
    run: Callable[..., Any], bos: Path, llama: Path, questions: Path
) -> None:
    from prunella.evaluate.harness import accuracies

    (found,), (plain,) = (accuracies(str(path), files=[questions], limit=4) for path in (bos, llama))
    (without,) = accuracies(str(bos), files=[questions], limit=4, bos=False)
    assert (found.bos, plain.bos, without.bos) == (True, False, False)
    assert without == plain
    done = run("eval", bos, "--tasks-file", questions, "--limit", 2)
    assert "requests each with BOS" in done.out


@pytest.mark.usefixtures("lm_eval")
def test_questions_with_tokens_that_the_model_lacks_are_refused(questions: Path, tmp_path: Path) -> None:
    tiny.build("llama", vocab_size=64, max_position_embeddings=128).save_pretrained(tmp_path)
    tiny.write_tokenizer(tmp_path)
    with pytest.raises(InputError, match="lies outside the model's vocabulary of 64"):
        score(str(tmp_path), files=[questions])
