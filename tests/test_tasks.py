"""What networks are for: the registry, the recipe's `task`, and text, the first of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification

import prunella
from prunella import InputError, Model, ModelError, Recipe, Task, load_model, register_task, wrap_model
from prunella.calibrate import windows
from prunella.recipe import override
from prunella.samples import Samples
from prunella.tasks import make_task, tasks
from prunella.tasks.text import Text

SHORT = {"calibration": {"samples": 4, "length": 32}, "evaluate": {"windows": 1}, "steps": ["wanda"]}


def test_a_task_is_made_by_its_name_and_its_options_are_checked() -> None:
    task = make_task("text", {"length": "64", "bos": False})
    assert isinstance(task, Text)
    assert (task.name, task.length, task.bos) == ("text", 64, False)
    with pytest.raises(InputError, match=r"unknown option of task text 'lenght'\. Did you mean 'length'"):
        make_task("text", {"lenght": 3})
    with pytest.raises(InputError, match=r"^text\.length=many: Input should be a valid integer"):
        make_task("text", {"length": "many"})
    with pytest.raises(InputError, match=r"unknown task 'test'\. Did you mean 'text'"):
        make_task("test")


def test_only_a_class_derived_from_task_is_one() -> None:
    with pytest.raises(TypeError, match="'mine' is no class derived from Task"):
        register_task("mine")(object)  # type: ignore[type-var]


@pytest.mark.parametrize("missing", ["samples", "losses"])
def test_a_task_that_does_not_say_all_it_has_to_is_named(missing: str) -> None:
    said = {name: lambda self: None for name in ("samples", "losses") if name != missing}
    register_task("mine")(type("Mine", (Task,), {**said, "__module__": "elsewhere"}))
    with pytest.raises(prunella.PrunellaError, match=rf"^task 'mine': TypeError: .*{missing}.*defect is in the task"):
        make_task("mine")


# ---------------------------------------------------------------------------------------------------------
# In a recipe


def test_a_recipe_says_what_the_network_is_for_and_else_the_model_does() -> None:
    assert Recipe().plain()["task"] == {"auto": {}}
    text = Recipe.of({"task": "text"})
    assert text.plain()["task"] == {"text": {}}
    assert text.calibration.source == text.evaluate.source == "pydoc"
    for value in ({"text": {}}, {"text": None}):
        assert Recipe.of({"task": value}) == text
    assert Recipe().resolved("nobody/knows-it") == text
    assert Recipe.of({"evaluate": {"source": None}}).resolved("smollm2-135m").evaluate.source is None
    with pytest.raises(InputError, match="does not say what the network is for"):
        Recipe().make_task()
    with pytest.raises(InputError, match=r"task: \['text'\] should be one name"):
        Recipe.of({"task": ["text"]})
    with pytest.raises(InputError, match="unknown task 'txt'"):
        Recipe.of({"task": "txt"})
    with pytest.raises(InputError, match="unknown option of task text 'width'"):
        Recipe.of({"task": {"text": {"width": 3}}})


def test_the_length_and_the_bos_of_text_stand_where_they_always_stood() -> None:
    recipe = Recipe.of({"task": {"text": {"length": 64, "bos": False}}, "evaluate": {"length": 32}})
    assert recipe == Recipe.of(
        {"task": "text", "bos": False, "calibration": {"length": 64}, "evaluate": {"length": 32}}
    )
    assert Recipe.of(recipe.plain()) == recipe
    changed = Recipe.of(override(recipe.plain(), ["text.length=16", "text.bos=true"]))
    assert (changed.bos, changed.calibration.length, changed.evaluate.length) == (True, 64, 32)
    task = recipe.make_task(recipe.evaluate.length)
    assert isinstance(task, Text)
    assert (task.length, task.bos) == (32, False)


def test_settings_reach_the_task() -> None:
    plain = override({}, ["task=text", "text.length=48"])
    assert Recipe.of(plain).calibration.length == Recipe.of(plain).evaluate.length == 48
    with pytest.raises(InputError, match="unknown option of task text 'widht'"):
        override({}, ["text.widht=1"])


# ---------------------------------------------------------------------------------------------------------
# Text


def test_the_samples_of_text_are_its_windows(llama: Path) -> None:
    model = load_model(str(llama))
    samples = Text(length=32).samples(model, "pydoc", 3)
    assert [list(group) for group in samples.groups] == [["input_ids"]]
    assert torch.equal(samples.groups[0]["input_ids"], windows(model, "pydoc", 3, 32))
    rest = Text(length=32).samples(model, "pydoc", 2, used=33)  # which reach into the second window
    assert torch.equal(rest.groups[0]["input_ids"], windows(model, "pydoc", 2, 32, skip=2))
    assert Text().samples(model, "pydoc", 1).groups[0]["input_ids"].shape == (1, 128)  # all of its context
    assert Text().size(samples) == 96
    assert Text().about(samples) == {"length": 32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_text_is_that_of_each_next_token(dtype: torch.dtype, ids: Tensor) -> None:
    network = tiny.build(dtype=dtype)
    task, batch = Text(), {"input_ids": ids}
    with torch.no_grad():
        outputs = task.run(network, batch)
        expected = [
            functional.cross_entropy(outputs.logits[n, :-1].float(), ids[n, 1:]).item() for n in range(len(ids))
        ]
        assert task.losses(outputs, batch).tolist() == expected
        assert tuple(expected) == prunella.perplexity(wrap_model(network), ids).nll or dtype == torch.bfloat16
        few = task.run(network, batch, logits_to_keep=torch.tensor([3]))
        assert few.logits.shape[1] == 1


def test_two_models_that_say_the_same_do_not_diverge(ids: Tensor) -> None:
    one, other = tiny.build(), tiny.build("llama", initializer_range=0.3)
    task, batch = Text(), {"input_ids": ids}
    ours, theirs = (task.run(network.requires_grad_(), batch) for network in (one, other))
    assert task.divergence(ours, ours, batch).item() == pytest.approx(0, abs=1e-6)
    far = task.divergence(ours, theirs, batch)
    p, q = (out.logits[:, :-1].flatten(0, 1).log_softmax(1) for out in (theirs, ours))
    assert far.item() == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-5)
    far.backward()  # type: ignore[no-untyped-call]
    assert one.lm_head.weight.grad.abs().sum() > 0


def test_samples_are_taken_in_place_of_the_recipes(ids: Tensor) -> None:
    found = []
    for calibration in (ids, Samples.of(ids), Samples.of({"input_ids": ids})):
        network = tiny.build()
        report = prunella.prune(network, {"steps": ["wanda"]}, calibration=calibration)
        found.append(network.state_dict())
        assert report.recipe["calibration"] == {"source": "pydoc", "samples": 5, "length": 32, "min_tokens": 32}
    assert all(torch.equal(tensor, other[name]) for other in found[1:] for name, tensor in found[0].items())
    with pytest.raises(InputError, match="samples of text are token ids, `input_ids`; these are pixel_values"):
        prunella.prune(tiny.build(), {"steps": ["wanda"]}, calibration=Samples.of({"pixel_values": ids}))


def test_the_digest_of_windows_is_what_reports_have_always_said(llama: Path, ids: Tensor) -> None:
    import hashlib

    long = hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()
    assert Samples.of(ids).digest == long[:16]
    assert Samples.of({"x": ids}).digest != long[:16]
    assert Samples.of({"x": ids.bool(), "y": ids.bfloat16()}).digest  # of any dtype


# ---------------------------------------------------------------------------------------------------------
# Other tasks


def test_an_encoder_is_pruned_on_samples_of_several_lengths_and_saved_as_transformers_does(tmp_path: Path) -> None:
    @register_task("ends")
    class Ends(Task):
        """Do texts begin and end with tokens of one kind?"""

        def samples(
            self, model: Model, source: str, count: int, *, used: int = 0, seed: int = 0, test: bool = False
        ) -> Samples:
            random = torch.Generator().manual_seed(seed)
            groups = [torch.randint(50, (used + count, length), generator=random)[used:] for length in (7, 12)]
            return Samples.of([{"input_ids": ids, "labels": (ids[:, 0] + ids[:, -1]) % 2} for ids in groups])

        def example(self, network: nn.Module) -> dict[str, Tensor]:
            return {"input_ids": torch.arange(6)[None]}

        def run(self, network: nn.Module, batch: Any, **options: Any) -> Any:
            return network(batch["input_ids"], **options)

        def losses(self, outputs: Any, batch: Any) -> Tensor:
            return functional.cross_entropy(outputs.logits, batch["labels"], reduction="none")

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32}
    config = BertConfig(num_hidden_layers=3, num_attention_heads=2, **sizes)
    network = BertForSequenceClassification(config)
    report = prunella.prune(network, {"task": "ends", "steps": ["sparsegpt"]}, output=tmp_path / "out")
    assert len(report.pruned["losses"]) == 16
    assert report.recipe["calibration"]["samples"] == 64
    saved = BertForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in network.state_dict().items())
    for name, mask_OI in prunella.read_masks(tmp_path / "out").items():
        assert ((saved[f"{name}.weight"] == 0) == ~mask_OI).all()
    assert report.sparsity == 0.5
    with pytest.raises(InputError, match="several shapes"):
        prunella.prune(network, {"task": "ends", "steps": ["wanda"], "order": "layer"})


# ---------------------------------------------------------------------------------------------------------
# On the command line


def test_a_task_is_named_on_the_command_line(llama: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    words = ("--samples", 4, "--length", 32, "--evaluate", "none", "--step", "magnitude")
    done = run("prune", llama, "-o", tmp_path / "out", "--task", "text", *words)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out" / "prunella.json").read_text())["recipe"]["task"] == {"text": {}}
    done = run("prune", llama, "-o", tmp_path / "other", "--task", "txt", *words)
    assert done.code == 2
    assert "unknown task 'txt'. Did you mean 'text'?" in done.err


def test_methods_lists_tasks(run: Callable[..., Any]) -> None:
    rows = [row for row in json.loads(run("methods", "--json").out) if row["kind"] == "task"]
    assert [row["name"] for row in rows] == sorted(tasks)
    assert next(row for row in rows if row["name"] == "text") == {
        "kind": "task",
        "name": "text",
        "summary": "Causal language models, on windows of text.",
        "options": {"length": None, "bos": True},
    }


def test_what_only_takes_text_says_so_of_another_task(llama: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    directory = tmp_path / "toy"
    directory.mkdir()
    (directory / "prunella.json").write_text(json.dumps({"recipe": {"task": {"toy.py:toy": {}}}}))
    with pytest.raises(ModelError, match=r"is of task 'toy\.py:toy': this takes causal language models only, yet"):
        load_model(str(directory))
    done = run("eval", directory)
    assert done.code == 2
    assert done.err == "prunella: error: task file 'toy.py' does not exist.\n"
    for command in ("heal", "sweep"):
        task = {"task": f"{Path(__file__).parent / 'extensions' / 'toy_task.py'}:toy"}
        (tmp_path / "r.yaml").write_text(json.dumps(task))
        done = run(command, llama, "-o", tmp_path / "out", "--recipe", tmp_path / "r.yaml")
        assert done.code == 2
        (line,) = done.err.splitlines()
        assert "holds no toy" in line  # the task opens what it knows
    with pytest.raises(InputError, match="there are no batches that the network is called with"):
        prunella.prune(nn.Linear(3, 3))
