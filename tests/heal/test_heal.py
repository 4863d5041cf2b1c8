"""Healing from directory to directory."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from healing import settings, zeros_of
from processes import together
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import prunella
from prunella import InputError, ModelError, NumericalError, Report
from prunella.evaluate.measure import digest
from prunella.heal import line, retraining
from prunella.heal import rounds as in_rounds
from prunella.heal.report import calibrated
from prunella.samples import Samples
from prunella.tasks import text
from prunella.tensors import MASKS
from prunella.train import checkpoints, retrain
from prunella.train.schedule import make_schedule
from prunella.workshop import Workshop


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


NEXT_TOKEN_LOSS = text.next_token_loss


def climb(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """After so many backward passes training goes uphill, so that it only makes worse what is held out."""
    calls = 0

    def loss(logits: Tensor, *args: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += logits.requires_grad
        return NEXT_TOKEN_LOSS(logits, *args, **options) * (-1 if logits.requires_grad and calls > after else 1)

    monkeypatch.setattr(text, "next_token_loss", loss)


def weights(directory: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


def test_it_is_better_and_exactly_as_sparse(pruned: Path, tmp_path: Path) -> None:
    recipe = settings(train=["all"], rate=3e-3, tokens=4096) | {"evaluate": {"windows": 4}}
    seen: list[tuple[int, int]] = []
    report = prunella.heal(
        pruned, recipe, output=tmp_path / "out", watch=lambda step, steps, loss: seen.append((step, steps))
    )
    before, after = report.healing["before"]["perplexity"], report.healing["after"]["perplexity"]
    assert after < 0.95 * before
    kept, zeros = zeros_of(pruned), zeros_of(tmp_path / "out")
    assert all(torch.equal(zeros[name], kept[name]) for name in kept)
    assert (tmp_path / "out" / MASKS).read_bytes() == (pruned / MASKS).read_bytes()
    assert seen == [(step, 32) for step in range(1, 33)]
    assert report == Report.read(tmp_path / "out")
    assert report.layers == Report.read(pruned).layers
    assert report.healing["trained"] == 1
    assert report.healing["tokens"] == 4096
    assert len(report.healing["losses"]) == report.healing["steps"] == 32
    assert "retrained" in (tmp_path / "out" / "README.md").read_text()
    assert not any(path.name.startswith("out.") for path in tmp_path.iterdir())
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_the_pruning_measured_is_not_measured_again(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    module = sys.modules["prunella.evaluate.measure"]
    real = module.measure
    monkeypatch.setattr(module, "measure", lambda *arguments: measured.append(0) or real(*arguments))
    recipe = settings(train=["norms"], tokens=256)
    both = {"evaluate": {"windows": 3}, "calibration": recipe["calibration"]}
    source = tmp_path / "pruned"
    said = prunella.prune(str(dense), {**both, "sparsity": 0.5, "steps": ["magnitude"]}, output=source)

    def times(name: str, evaluate: dict[str, Any]) -> int:
        measured.clear()
        report = prunella.heal(source, {**recipe, "evaluate": evaluate}, output=tmp_path / name)
        assert report.healing["before"]["perplexity"] == pytest.approx(said.pruned["perplexity"], rel=0.2)
        assert len(report.healing["before"]["nll"]) == evaluate["windows"]
        return len(measured)

    assert times("same", {"windows": 3}) == 1
    assert times("other", {"windows": 2}) == 2
    weight = next(source.glob("*.safetensors"))
    os.utime(weight, (time.time() + 5, time.time() + 5))
    assert times("touched", {"windows": 3}) == 2


def test_what_does_not_train_is_byte_for_byte_the_same(pruned: Path, tmp_path: Path) -> None:
    prunella.heal(pruned, settings(train=["norms"]), output=tmp_path / "out")
    before, after = weights(pruned), weights(tmp_path / "out")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "norm" in name}


def test_a_model_pruned_elsewhere_is_healed_by_its_zeros(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "in")
    for name in (MASKS, "prunella.json"):
        (tmp_path / "in" / name).unlink()
    report = prunella.heal(tmp_path / "in", settings(train=["all"]), output=tmp_path / "out")
    kept, zeros = zeros_of(pruned), zeros_of(tmp_path / "out")
    assert all(torch.equal(zeros[name], kept[name]) for name in kept)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert prunella.read_masks(tmp_path / "out").keys() == kept.keys()


def test_the_mask_counts_and_not_the_zeros(pruned: Path, tmp_path: Path) -> None:
    """A kept weight that happens to be zero may train."""
    shutil.copytree(pruned, tmp_path / "in")
    model = prunella.load_model(str(tmp_path / "in"))
    mask = prunella.read_masks(tmp_path / "in")["model.layers.0.mlp.up_proj"]
    row, column = (int(n) for n in mask.nonzero()[0])
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight[row, column] = 0
    network.save_pretrained(tmp_path / "in")
    prunella.heal(tmp_path / "in", settings(train=["all"]), output=tmp_path / "out")
    healed = weights(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]
    assert healed[row, column] != 0
    assert not healed[~mask].any()
    assert model.dtype == torch.float32


@pytest.mark.parametrize("train", [["all"], ["mask-lora", "norms"]], ids="+".join)
def test_a_run_that_was_killed_and_resumed_ends_like_one_that_was_not(
    train: list[str], pruned: Path, tmp_path: Path
) -> None:
    recipe = settings(train=train, evaluations=4)

    def stop(step: int, steps: int, loss: float | None) -> None:
        if step == 5:
            raise KeyboardInterrupt

    whole = prunella.heal(pruned, recipe, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prunella.heal(pruned, recipe, output=tmp_path / "cut", watch=stop)
    assert (tmp_path / "cut.partial" / "training" / "checkpoint-4").is_dir()
    steps: list[int] = []
    cut = prunella.heal(pruned, recipe, output=tmp_path / "cut", resume=True, watch=lambda k, *_: steps.append(k))
    assert steps == [5, 6, 7, 8]
    assert cut.healing["losses"] == whole.healing["losses"]
    assert cut.healing["held_out"] == whole.healing["held_out"]
    before, after = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("train", "options", "sharded"),
    [
        (["mask-lora", "norms"], {"rate": 1e-2, "micro": 1}, False),
        (["all"], {"rate": 3e-3, "distill": 0.5, "micro": 1}, True),
    ],
    ids=["data-parallel", "sharded"],
)
def test_two_processes_have_the_loss_curve_of_one(
    train: list[str],
    options: dict[str, Any],
    sharded: bool,
    pruned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = settings(train=train, **options)
    one = prunella.heal(pruned, recipe, output=tmp_path / "one")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", str(sharded).lower())
    log = tmp_path / "log"
    assert together(log, "heal", pruned, recipe, output=tmp_path / "two") == 0, log.read_text()
    two = Report.read(tmp_path / "two")
    assert two.healing["losses"] == pytest.approx(one.healing["losses"], rel=1e-4)
    for step, loss in one.healing["held_out"].items():
        assert two.healing["held_out"][step] == pytest.approx(loss, rel=1e-4)
    how = "2, sharded" if sharded else "2, each with the whole model"
    assert ("processes", "", how) in two.healing_rows()
    for key in ("trained_parameters", "parameters", "best_step", "tokens"):
        assert two.healing[key] == one.healing[key]
    before, after = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in before:  # but for single weights without a slope: Adam follows the sign of its rounding errors
        near = torch.isclose(after[name], before[name], rtol=1e-3, atol=2e-4)
        assert (~near).sum() <= 0.001 * near.numel() + 1, name
    zeros, kept = zeros_of(tmp_path / "two"), zeros_of(pruned)
    assert all(torch.equal(zeros[name], kept[name]) for name in kept)


def test_a_sharded_run_goes_on_where_it_was_killed(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds shares of the weights and of the moments; its checkpoints hold whole ones."""
    recipe = settings(train=["mask-lora", "norms", "head"], rate=3e-3, evaluations=4)
    one = prunella.heal(pruned, recipe, output=tmp_path / "one")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    log = tmp_path / "log"
    assert together(log, "heal", pruned, recipe, output=tmp_path / "two", dies=5) != 0
    assert (tmp_path / "two.partial" / "training" / "checkpoint-4").is_dir()
    shutil.copytree(tmp_path / "two.partial", tmp_path / "three.partial")
    assert together(log, "heal", pruned, recipe, output=tmp_path / "two", resume=True) == 0, log.read_text()
    three = prunella.heal(pruned, recipe, output=tmp_path / "three", resume=True)  # and in one process
    for other in (Report.read(tmp_path / "two"), three):
        assert other.healing["losses"] == pytest.approx(one.healing["losses"], rel=1e-4)
        assert other.healing["best_step"] == one.healing["best_step"]


@pytest.mark.parametrize("by", ["fork", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_the_first_of_two_processes_prunes_and_both_heal(
    by: str, dense: Path, tmp_path: Path, python: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = settings(train=["mask-lora"], tokens=512, distill=0.5, adapt=256, rounds=2) | {"steps": ["magnitude"]}
    one = prunella.prune(str(dense), recipe, output=tmp_path / "one")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    log, script = tmp_path / "log", tmp_path / "two.py"
    if by == "fork":
        assert together(log, "prune", str(dense), recipe, output=tmp_path / "two") == 0, log.read_text()
    else:
        script.write_text(
            f"import prunella\nprunella.prune({str(dense)!r}, {recipe}, output={str(tmp_path / 'two')!r})\n"
        )
        start = "from torch.distributed.run import main; main(['--standalone', '--nproc-per-node=2', sys.argv[1]])"
        done = python(f"import sys; {start}", script)
        assert done.returncode == 0, done.stderr
    two = Report.read(tmp_path / "two")
    assert two.healing["losses"] == pytest.approx(one.healing["losses"], rel=1e-4)
    assert two.layers == one.layers
    assert two.model == one.model
    assert not any(path.name.startswith("two.") for path in tmp_path.iterdir() if path.is_dir())


def test_offloading_what_is_sharded_is_refused(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(InputError, match="fsdp_offload_params to false"):
        prunella.heal(pruned, settings(train=["norms"]), output=tmp_path / "out")
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"


def test_a_loss_that_is_not_finite_ends_it_and_the_best_checkpoint_stays(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = text.next_token_loss

    def diverge(logits: Tensor, *args: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += logits.requires_grad
        return real(logits, *args, **options) * (math.nan if calls > 12 else 1)

    monkeypatch.setattr(text, "next_token_loss", diverge)
    with pytest.raises(NumericalError, match="healing diverged") as error:
        prunella.heal(pruned, settings(train=["norms"]), output=tmp_path / "out")
    best = tmp_path / "out.partial" / "training" / "checkpoint-4"
    assert str(best) in str(error.value)
    assert (best / checkpoints.WEIGHTS).is_file()
    assert not (tmp_path / "out").exists()


def test_the_best_checkpoint_is_the_result(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes uphill after the eighth of 32 steps: one of the first checkpoints wins, and patience ends the run."""
    climb(monkeypatch, after=16)
    recipe = settings(train=["all"], rate=3e-3, tokens=4096, evaluations=8, patience=2)
    did = prunella.heal(pruned, recipe, output=tmp_path / "out").healing
    best = int(min(did["held_out"], key=lambda step: did["held_out"][step]))
    assert did["best_step"] == best
    assert 0 < best < 24
    assert did["steps"] == best + 2 * 4


def test_what_training_only_makes_worse_stays_as_it_was(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    climb(monkeypatch)
    report = prunella.heal(pruned, settings(train=["all"], rate=0.03), output=tmp_path / "out")
    held = report.healing["held_out"]
    assert report.healing["best_step"] == 0
    assert held["0"] < min(loss for step, loss in held.items() if step != "0")
    assert "no step made it better" in str(report.healing_rows())
    before, after = weights(pruned), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_healed_perplexity_is_that_of_the_files(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though float32 trains under autocast, where bfloat16 pays."""
    monkeypatch.setattr(retrain, "_fast_bfloat16", lambda device: True)
    recipe = settings(train=["norms"], tokens=256) | {"evaluate": {"windows": 2, "length": 32}}
    report = prunella.heal(pruned, recipe, output=tmp_path / "out")
    model = prunella.load_model(str(tmp_path / "out"))
    test = prunella.calibrate.windows(model, "pydoc", 2, 32, skip=4, split="test")  # type: ignore[attr-defined]
    assert report.healing["after"]["nll"] == list(prunella.perplexity(model, test).nll)


@pytest.mark.parametrize("teacher", ["memory", "stream"])
def test_a_model_agrees_with_itself_as_its_teacher(teacher: str, pruned: Path, tmp_path: Path) -> None:
    recipe = settings(train=["all"], distill=1.0, teacher=teacher, dense=str(pruned))
    did = prunella.heal(pruned, recipe, output=tmp_path / "out").healing
    assert did["losses"][0] == pytest.approx(0, abs=1e-6)  # Adam makes steps of the rounding errors that follow


def test_a_streamed_teacher_teaches_what_one_in_memory_does(pruned: Path, tmp_path: Path) -> None:
    losses = {
        teacher: prunella.heal(
            pruned, settings(train=["norms"], distill=0.5, teacher=teacher), output=tmp_path / teacher
        ).healing["losses"]
        for teacher in ("memory", "stream")
    }
    assert losses["stream"] == pytest.approx(losses["memory"], rel=1e-5)


def test_checkpointing_changes_memory_and_nothing_else(pruned: Path, tmp_path: Path) -> None:
    for name, checkpointing in (("plain", False), ("recomputed", True)):
        prunella.heal(pruned, settings(train=["mask-lora"], checkpointing=checkpointing), output=tmp_path / name)
    before, after = weights(tmp_path / "plain"), weights(tmp_path / "recomputed")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_new_biases_start_from_the_mean_output_error(dense: Path, pruned: Path, tmp_path: Path) -> None:
    """One step of almost no rate, so that the start is what is saved."""
    recipe = settings(train=["new-biases"], rate=1e-30, tokens=128, held_out=0)
    prunella.heal(pruned, recipe, output=tmp_path / "out")
    biased = weights(tmp_path / "out")
    names = [name for name in biased if name.endswith(".bias")]
    assert len(names) == 14
    before, after = weights(dense), weights(pruned)
    network = AutoModelForCausalLM.from_pretrained(pruned)
    model = prunella.load_model(str(pruned))
    ids = prunella.calibrate.windows(model, "pydoc", 4, 32)  # type: ignore[attr-defined]
    seen: dict[str, Tensor] = {}
    for name in ("q_proj", "k_proj", "v_proj"):
        module = network.model.layers[0].self_attn.get_submodule(name)
        module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: x[0].flatten(0, 1)}))
    with torch.no_grad():
        network(ids)
    for name, x_TI in seen.items():
        key = f"model.layers.0.self_attn.{name}"
        error_TO = x_TI @ (before[f"{key}.weight"] - after[f"{key}.weight"]).T
        torch.testing.assert_close(biased[f"{key}.bias"], error_TO.mean(0), rtol=1e-4, atol=1e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is True
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].mlp.up_proj.bias is not None


def test_lora_is_kept_apart_as_peft_reads_it(pruned: Path, tmp_path: Path) -> None:
    recipe = settings(train=[{"lora": {"rank": 4, "alpha": 12}}], rate=1e-2) | {
        "evaluate": {"windows": 2, "length": 128}
    }
    report = prunella.heal(pruned, recipe, output=tmp_path / "out")
    before, after = weights(pruned), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 12)
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 14
    network = AutoModelForCausalLM.from_pretrained(pruned)
    with torch.no_grad():
        for name in config["target_modules"]:
            a_RI, b_OR = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
            network.get_submodule(name).weight += 3 * b_OR @ a_RI
    model = prunella.load_model(str(pruned))
    test = prunella.calibrate.windows(model, "pydoc", 2, 128, skip=1)  # type: ignore[attr-defined]
    by_hand = prunella.perplexity(prunella.wrap_model(network), test).perplexity
    assert by_hand == pytest.approx(report.healing["after"]["perplexity"], rel=1e-3)
    assert report.healing["weights"] == report.healing["before"]


def test_the_table_says_what_is_in_the_adapter_and_what_in_the_weights(
    pruned: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    done = run(
        *("heal", pruned, "-o", out, "--train", "lora", "--train", "norms", "--tokens", 1024, "--length", 32),
        *("--windows", 2, "--set", "heal.held_out=0", "--set", "evaluate.length=32"),
    )
    assert done.code == 0, done.err
    report = Report.read(out)
    did, rows = report.healing, {what: (before, after) for what, before, after in report.healing_rows()}
    assert rows["trained, in the adapter"] == ("", "lora")
    assert rows["trained, in the weights"] == ("", "norms")
    label = next(iter(rows))
    assert rows[label] == (f"{did['before']['perplexity']:.2f}", f"{did['after']['perplexity']:.2f} with the adapter")
    model = prunella.load_model(str(out))
    test = prunella.calibrate.windows(model, "pydoc", 2, 32, skip=4, split="test")  # type: ignore[attr-defined]
    assert did["weights"]["nll"] == list(prunella.perplexity(model, test).nll)
    assert len({side["perplexity"] for side in (did["before"], did["after"], did["weights"])}) == 3
    assert rows[f"{label}, the weights alone"][1] == f"{did['weights']['perplexity']:.2f}"
    assert "prunella pack" not in done.out  # the adapter does not fit on packed weights
    assert "PeftModel.from_pretrained" in done.out
    assert "`adapter`" in (out / "README.md").read_text()


def test_an_adapter_that_made_it_worse_changes_nothing(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    climb(monkeypatch)
    recipe = settings(train=["lora", "norms"], rate=0.03) | {"evaluate": {"windows": 2, "length": 32}}
    did = prunella.heal(pruned, recipe, output=tmp_path / "out").healing
    assert did["best_step"] == 0
    assert did["after"]["perplexity"] == did["weights"]["perplexity"] == did["before"]["perplexity"]
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert not any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)


def test_prune_heals_what_it_pruned(dense: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    done = run(
        *("prune", dense, "-o", tmp_path / "out", "--step", "magnitude", "--heal", "norms", "--evaluate", "none"),
        *("--samples", 4, "--length", 32, "--set", "heal.tokens=512", "--set", "heal.length=32"),
        *("--set", "heal.held_out=2", "--set", "norms.rate=0.01"),
    )
    assert done.code == 0, done.err
    assert "parameters that trained" in done.out
    report = Report.read(tmp_path / "out")
    assert report.healing["recipe"]["train"] == [{"norms": {"rate": 0.01}}]
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_half_precision_is_refused_before_anything_is_pruned(dense: Path, tmp_path: Path) -> None:
    recipe = settings(train=["norms"]) | {"steps": ["magnitude"], "sparsity": 0.5, "dtype": "float16"}
    with pytest.raises(prunella.InputError, match="bfloat16"):
        prunella.prune(str(dense), recipe, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())
    recipe = {"steps": ["magnitude"], "dtype": "float16", "evaluate": {"source": None}}
    prunella.prune(str(dense), recipe, output=tmp_path / "half")
    with pytest.raises(prunella.InputError, match="bfloat16"):
        prunella.heal(tmp_path / "half", settings(train=["new-biases"]), output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]  # no biases were computed


def test_magnitude_pruning_in_rounds_ends_at_its_target(dense: Path, tmp_path: Path) -> None:
    recipe = settings(train=["all"], rounds=3, tokens=768, held_out=2) | {"steps": ["magnitude"], "sparsity": 0.6}
    report = prunella.prune(str(dense), recipe, output=tmp_path / "out")
    assert report.sparsity == pytest.approx(0.6, abs=0.01)
    zeros = zeros_of(tmp_path / "out")
    assert all(share.float().mean().item() == pytest.approx(0.6, abs=0.01) for share in zeros.values())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_report_of_rounds_is_that_of_the_model_one_began_with(dense: Path, tmp_path: Path) -> None:
    recipe = settings(train=["all"], rounds=2, tokens=512, held_out=2) | {"steps": ["magnitude"]}
    recipe |= {"evaluate": {"windows": 2, "length": 32}}
    report = prunella.prune(str(dense), recipe, output=tmp_path / "out")
    once = prunella.prune(str(dense), recipe | {"heal": {}}, output=tmp_path / "once")
    assert report.model == once.model
    assert report.recipe["model"] == str(dense)
    assert report.dense == once.dense
    assert report.fingerprint == once.fingerprint
    assert "1-healed" not in (tmp_path / "out" / "README.md").read_text()
    prunella.heal(tmp_path / "out", settings(train=["norms"], distill=0.5), output=tmp_path / "again")


def test_each_round_trains_on_text_of_its_own(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[tuple[int, ...]]] = []
    real = retrain.retrain

    def spy(model: Any, chosen: Any, samples: Samples, held: Samples, *rest: Any, **options: Any) -> Any:
        seen.append({tuple(ids.tolist()) for ids in samples.groups[0]["input_ids"]})
        seen.append({tuple(ids.tolist()) for ids in held.groups[0]["input_ids"]})
        return real(model, chosen, samples, held, *rest, **options)

    monkeypatch.setattr(retraining, "retrain", spy)
    for k in range(2):
        prunella.heal(pruned, settings(train=["norms"], tokens=256), output=tmp_path / str(k), portion=(k, 2))
    first, held, second, again = seen
    assert held == again
    assert not first & second
    assert not (first | second) & held


def test_layers_that_stay_dense_stay_so_when_it_is_healed(dense: Path, tmp_path: Path) -> None:
    recipe = settings(train=["norms"], tokens=256) | {"steps": ["magnitude"], "pattern": "2:4"}
    report = prunella.prune(str(dense), recipe | {"sparsity": {"down_proj": 0}}, output=tmp_path / "out")
    assert {layer.sparsity for layer in report.layers if "down_proj" in layer.name} == {0}
    assert {layer.sparsity for layer in report.layers if "down_proj" not in layer.name} == {0.5}


def test_its_own_text_is_written_by_the_dense_model(
    dense: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authors: list[str] = []

    def write(model: Any, count: int, length: int, seed: int, **options: Any) -> Tensor:
        authors.append(model.name)
        return torch.randint(3, 50, (count, length), generator=torch.Generator().manual_seed(seed))

    monkeypatch.setattr("prunella.calibrate.sample_self", write)
    prunella.heal(pruned, settings(train=["norms"], text="self", tokens=256), output=tmp_path / "one")
    recipe = settings(train=["norms"], way="reconstruct")
    recipe["calibration"] = {"source": "self", "samples": 2, "length": 16}
    prunella.heal(pruned, recipe, output=tmp_path / "two")
    assert set(authors) == {str(dense)}


def test_without_another_word_the_text_is_that_of_the_pruning(dense: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("".join(f"The garden number {n} is as green as number {n * n}.\n" for n in range(400)))
    recipe = settings() | {"heal": {}, "steps": ["magnitude"]}
    recipe["calibration"] = {"source": str(text), "samples": 4, "length": 32}
    prunella.prune(str(dense), recipe, output=tmp_path / "pruned")
    heal = {key: value for key, value in settings(train=["norms"], tokens=256).items() if key != "calibration"}
    prunella.heal(tmp_path / "pruned", heal, output=tmp_path / "one")
    text.unlink()
    with pytest.raises(InputError, match=r"own\.txt"):
        prunella.heal(tmp_path / "pruned", heal, output=tmp_path / "two")


def test_a_run_that_had_stopped_early_does_not_train_on(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = settings(train=["all"], rate=3e-3, tokens=4096, evaluations=16, patience=2)
    climb(monkeypatch, after=16)
    whole = prunella.heal(pruned, recipe, output=tmp_path / "whole")
    assert whole.healing["steps"] < 32
    climb(monkeypatch, after=16)
    with monkeypatch.context() as patch:
        patch.setattr(retraining, "write", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prunella.heal(pruned, recipe, output=tmp_path / "out")
    again = prunella.heal(pruned, recipe, output=tmp_path / "out", resume=True)
    assert again.healing["steps"] == whole.healing["steps"]
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "whole").keys()
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(weights(tmp_path / "out")[name], tensor)


def test_an_interrupted_run_with_new_biases_can_still_be_resumed(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = settings(train=["new-biases"], tokens=256)
    with monkeypatch.context() as patch:
        patch.setattr(retraining, "write", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prunella.heal(pruned, recipe, output=tmp_path / "out")
    with pytest.raises(InputError, match="--resume"):
        prunella.heal(pruned, recipe, output=tmp_path / "out")
    prunella.heal(pruned, recipe, output=tmp_path / "out", resume=True)


@pytest.mark.parametrize("train", [["norms"], ["new-biases"], ["lora"]], ids=lambda train: train[0])
def test_killed_just_before_the_model_has_its_name_it_does_not_train_again(
    train: list[str], pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = settings(train=train, tokens=512) | {"evaluate": {"windows": 2, "length": 32}}
    whole = prunella.heal(pruned, recipe, output=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prunella.heal(pruned, recipe, output=tmp_path / "out")
    steps: list[int] = []
    monkeypatch.setattr(line, "add_biases", None)
    again = prunella.heal(
        pruned, recipe, output=tmp_path / "out", resume=True, watch=lambda step, *_: steps.append(step)
    )
    assert not steps
    assert again.healing["losses"] == whole.healing["losses"]
    assert again.healing["after"] == whole.healing["after"]
    assert all(
        torch.equal(weights(tmp_path / "out")[key], tensor) for key, tensor in weights(tmp_path / "whole").items()
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    files = [{p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*")} for name in ("whole", "out")]
    assert files[0] == files[1]


def test_healing_goes_on_by_other_names_of_its_models_and_texts_and_with_another_evaluation(
    dense: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("".join(f"Line {n} of {name}, with words in it.\n" for n in range(400)))
    for name, target in (("d", dense), ("p", pruned), ("t.txt", tmp_path / "a.txt")):
        (tmp_path / name).symlink_to(target)
    recipe = settings(train=["norms"], tokens=256, distill=0.5, dense=str(dense), text=str(tmp_path / "a.txt"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prunella.heal(pruned, recipe, output=tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    recipe = settings(train=["norms"], tokens=256, distill=0.5, dense="d", text="t.txt")
    recipe |= {"evaluate": {"source": "b.txt", "windows": 2, "length": 32}}
    steps: list[int] = []
    report = prunella.heal("p", recipe, output="out", resume=True, watch=lambda step, *_: steps.append(step))
    assert not steps
    assert report.healing["after"]["source"] == "b.txt"
    with pytest.raises(InputError, match="exists and is not empty"):
        prunella.heal("p", recipe, output="out", resume=True)


def test_what_was_finished_but_for_its_rounds_is_not_begun_again(dense: Path, tmp_path: Path) -> None:
    recipe = settings(train=["norms"], tokens=256) | {"steps": ["magnitude"]}
    whole = prunella.prune(str(dense), recipe, output=tmp_path / "out")
    aside = in_rounds.aside_of(tmp_path / "out")
    shop = Workshop(aside, resume=True)
    (aside / "run.json").write_text("{}")
    (aside / "1-pruned").mkdir()
    shop.close()
    assert prunella.prune(str(dense), recipe, output=tmp_path / "out", resume=True) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_is_in_the_way_of_the_healing_is_said_before_the_pruning(
    dense: Path, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = settings(train=["norms"], tokens=256) | {"steps": ["magnitude"]}
    with monkeypatch.context() as patch:
        patch.setattr(retraining, "write", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prunella.heal(pruned, recipe, output=tmp_path / "out")
    for resume in (False, True):
        with pytest.raises(InputError, match=r"out\.partial' holds an unfinished run"):
            prunella.prune(str(dense), recipe, output=tmp_path / "out", resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_the_dense_model_is_found_from_another_directory_or_asked_for(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(dense, tmp_path / "here" / "m")
    monkeypatch.chdir(tmp_path / "here")
    prunella.prune("m", {**settings(), "heal": {}, "steps": ["magnitude"]}, output="pruned")
    assert Report.read("pruned").model["name"] == "m"
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    recipe = settings(train=["norms"], tokens=128, distill=0.5)
    assert prunella.heal("../here/pruned", recipe, output="healed").healing["losses"]
    (tmp_path / "here" / "m").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"was pruned from '.*here/m', which is not there any more.*--dense MODEL"):
        prunella.heal("../here/pruned", recipe, output="again")


def test_pickles_are_pruned_and_healed_if_they_are_trusted(dense: Path, tmp_path: Path) -> None:
    source = shutil.copytree(dense, tmp_path / "source")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    recipe = settings(train=["norms"], tokens=256) | {"steps": ["magnitude"]}
    prunella.prune(str(source), recipe, output=tmp_path / "out", pickles=True)


def test_weights_that_are_tied_and_stored_twice_stay_tied(dense: Path, tmp_path: Path) -> None:
    source = shutil.copytree(dense, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    prunella.prune(str(source), settings() | {"heal": {}, "steps": ["magnitude"]}, output=tmp_path / "pruned")
    prunella.heal(tmp_path / "pruned", settings(train=["all"], tokens=256), output=tmp_path / "out")
    healed = weights(tmp_path / "out")
    assert torch.equal(healed["lm_head.weight"], healed["model.embed_tokens.weight"])
    assert not torch.equal(healed["lm_head.weight"], tensors["lm_head.weight"])


def test_the_schedule_of_rounds_sums_to_its_target() -> None:
    for target in (0.5, 0.9):
        for rounds in (1, 2, 5, 20):
            schedule = make_schedule("imp", rounds, {"rounds": rounds})
            shares = [target * (schedule.sparsity(k) or 0.0) for k in range(rounds)]
            steps = [b - a for a, b in itertools.pairwise([0.0, *shares])]
            assert len(shares) == rounds
            assert shares[-1] == target
            assert sum(steps) == pytest.approx(target)
            assert all(a > b > 0 for a, b in itertools.pairwise(steps))


def test_what_cannot_be_healed_is_said(dense: Path, pruned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="is dense"):
        prunella.heal(dense, settings(train=["norms"]), output=out)
    with pytest.raises(ModelError, match="is not a directory"):
        prunella.heal(tmp_path / "nothing", output=out)
    with pytest.raises(InputError, match="Did you mean 'norms'"):
        prunella.heal(pruned, settings(train=["norm"]), output=out)
    with pytest.raises(InputError, match="does not exist"):
        prunella.heal(pruned, settings(train=["norms"], text="missing.txt"), output=out)
    with pytest.raises(InputError, match=r"heal.rate"):
        prunella.heal(pruned, settings(train=["norms"], rate=3), output=out)
    with pytest.raises(InputError, match=r"heal\.text is of way: retrain.*calibration windows"):
        prunella.heal(pruned, settings(train=["norms"], way="reconstruct", text="x.txt"), output=out)
    with pytest.raises(InputError, match=r"heal\.epochs is of way: reconstruct"):
        prunella.heal(pruned, settings(train=["norms"], epochs=2), output=out)
    tiny.build("llama", intermediate_size=80).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"is not the dense model of.*another shape"):
        prunella.heal(pruned, settings(train=["norms"], distill=0.5, dense=str(tmp_path / "other")), output=out)
    shutil.rmtree(tmp_path / "other")
    short = tmp_path / "short.txt"
    short.write_text("a few words, and a few more of them. " * 9)
    with pytest.raises(InputError, match="too few to hold"):
        prunella.heal(pruned, settings(train=["norms"], text=str(short), held_out=50), output=out)
    shutil.copytree(pruned, tmp_path / "in")
    (tmp_path / "in" / "prunella.json").unlink()
    with pytest.raises(InputError, match="--dense MODEL"):
        prunella.heal(tmp_path / "in", settings(train=["norms"], distill=0.5), output=out)
    assert not out.exists()


def test_a_packed_model_must_be_unpacked_first(pruned: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    assert run("pack", pruned, "-o", tmp_path / "packed").code == 0
    done = run("heal", tmp_path / "packed", "-o", tmp_path / "out", "--train", "norms")
    assert done.code == 2
    assert "prunella unpack" in done.err


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_nothing_is_dropped_while_it_trains(architecture: str, tmp_path: Path) -> None:
    network = tiny.build(architecture)
    assert "0.1" in str({key: value for key, value in network.config.to_dict().items() if "drop" in key})
    network.save_pretrained(tmp_path / "dense")
    tiny.write_tokenizer(tmp_path / "dense")
    # With a rate of nothing: else Adam would make steps of rounding errors.
    recipe = settings(train=["norms"], distill=1.0, rate=1e-30) | {"steps": ["magnitude"]}
    prunella.prune(str(tmp_path / "dense"), recipe | {"heal": {}}, output=tmp_path / "pruned")
    itself = recipe | {"heal": {**recipe["heal"], "dense": str(tmp_path / "pruned")}}
    report = prunella.heal(tmp_path / "pruned", itself, output=tmp_path / "out")
    assert max(map(abs, report.healing["losses"])) < 1e-5


def test_what_is_not_said_of_the_calibration_is_that_of_the_pruning(dense: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {n} of a text with words in it.\n" for n in range(400)))
    wanted = {"source": str(text), "samples": 4, "length": 32, "min_tokens": 32}
    recipe = settings() | {"steps": ["magnitude"], "heal": {}, "calibration": wanted}
    prunella.prune(str(dense), recipe, output=tmp_path / "pruned")
    assert calibrated(tmp_path / "pruned", {})["calibration"] == wanted
    fewer = calibrated(tmp_path / "pruned", {"calibration": {"samples": 2}})
    assert fewer["calibration"] == {**wanted, "samples": 2}
    other = calibrated(tmp_path / "pruned", {"calibration": {"source": "pydoc"}})
    assert other["calibration"] == {**wanted, "source": "pydoc"}


def test_an_unfinished_run_is_resumed_with_the_same_recipe_or_not_at_all(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = settings(train=["norms"]) | {"steps": ["magnitude"], "sparsity": 0.3}
    with monkeypatch.context() as patch:
        patch.setattr(in_rounds, "heal", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prunella.prune(str(dense), recipe, output=tmp_path / "out")
    with pytest.raises(InputError, match="was another one: sparsity differ"):
        prunella.prune(str(dense), recipe | {"sparsity": 0.7}, output=tmp_path / "out", resume=True)
    report = prunella.prune(str(dense), recipe, output=tmp_path / "out", resume=True)
    assert report.sparsity == pytest.approx(0.3, abs=0.01)


def test_a_model_with_new_biases_is_taught_by_the_dense_one_again(pruned: Path, tmp_path: Path) -> None:
    prunella.heal(pruned, settings(train=["new-biases"]), output=tmp_path / "biased")
    report = prunella.heal(tmp_path / "biased", settings(train=["biases"], distill=0.5), output=tmp_path / "again")
    assert report.healing["trained_parameters"] > 0
    with pytest.raises(InputError, match=r"has no tensor '.*bias'"):
        prunella.heal(tmp_path / "biased", settings(way="reconstruct"), output=tmp_path / "other")


def test_text_that_is_missing_is_said_before_biases_are_made(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        prunella.heal(pruned, settings(train=["new-biases"], text=["nowhere.txt"]), output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_dense_model_that_is_trained_first_teaches(
    pruned: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text is what follows that of the healing; what comes out is dense."""
    seen: list[set[tuple[int, ...]]] = []
    real = retrain.retrain

    def spy(model: Any, chosen: Any, samples: Samples, held: Samples, *rest: Any, **options: Any) -> Any:
        seen.append({tuple(ids.tolist()) for some in (samples, held) for ids in some.groups[0]["input_ids"]})
        return real(model, chosen, samples, held, *rest, **options)

    monkeypatch.setattr(retraining, "retrain", spy)
    kept: dict[str, Path] = {}
    teach = retraining.teacher_in_memory

    def look(model: Any, *more: Any) -> Any:
        kept["teacher"] = Path(shutil.copytree(model.checkpoint.directory, tmp_path / "teacher"))
        return teach(model, *more)

    monkeypatch.setattr(retraining, "teacher_in_memory", look)
    recipe = settings(train=["norms"], distill=0.5, adapt=512)
    prunella.heal(pruned, recipe, output=tmp_path / "out")
    first, then = seen
    assert len(first) == 16 + 4
    assert not first & then
    before, after = weights(dense), weights(kept["teacher"])
    assert {name for name in before if not torch.equal(before[name], after[name])} == {n for n in before if "proj" in n}
    assert not any((value == 0).float().mean() > 0.1 for name, value in after.items() if "proj" in name)
    assert not prunella.read_masks(kept["teacher"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "teacher"]
    with pytest.raises(InputError, match="nothing asks it"):
        prunella.heal(pruned, settings(train=["norms"], adapt=512), output=tmp_path / "other")


def test_what_was_trained_first_is_what_is_pruned_and_the_report_is_of_the_model_one_began_with(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = settings(train=["norms"], distill=0.5, adapt=512) | {"steps": ["magnitude"]}
    recipe |= {"evaluate": {"windows": 2, "length": 32}}
    once = prunella.prune(str(dense), recipe | {"heal": {}}, output=tmp_path / "once")
    with monkeypatch.context() as patch:
        patch.setattr(in_rounds, "heal", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            prunella.prune(str(dense), recipe, output=tmp_path / "out")
    report = prunella.prune(str(dense), recipe, output=tmp_path / "out", resume=True)
    prunella.prune(str(dense), recipe, output=tmp_path / "whole")
    assert report.model == once.model
    assert report.recipe["model"] == str(dense)
    assert report.dense["perplexity"] == once.dense["perplexity"]
    assert report.pruned["perplexity"] != once.pruned["perplexity"]
    assert report.healing["taught"]["tokens"] == 512
    assert any(
        what == "the dense model trained first" and "512 tokens" in said for what, _, said in report.healing_rows()
    )
    one, two = weights(tmp_path / "out"), weights(tmp_path / "whole")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once", "out", "whole"]


def test_every_window_to_train_on_begins_with_bos(
    pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(pruned, tmp_path / "in")
    tiny.write_tokenizer(source, bos=True)
    seen: list[Tensor] = []
    real = retrain.retrain

    def spy(model: Any, chosen: Any, samples: Samples, held: Samples, *rest: Any, **options: Any) -> Any:
        seen.extend(some.groups[0]["input_ids"] for some in (samples, held))
        return real(model, chosen, samples, held, *rest, **options)

    monkeypatch.setattr(retraining, "retrain", spy)
    recipe = settings(train=["norms"], tokens=128) | {"evaluate": {"windows": 2, "length": 48}}
    report = prunella.heal(source, recipe, output=tmp_path / "out")
    assert all((ids_NL[:, 0] == 1).all() for ids_NL in seen)
    assert report.healing["before"]["bos"]
    assert report.healing["after"]["bos"]
    tested = prunella.calibrate.windows(prunella.load_model(str(source)), "pydoc", 2, 48, skip=3)  # type: ignore[attr-defined]
    assert report.healing["before"]["text"] == digest(tested)
    text = torch.cat([ids_NL[:, 1:] for ids_NL in seen])
    tested_runs = tested[:, 1:].flatten().unfold(0, 31, 1)
    assert not any((tested_runs == row).all(1).any() for row in text)  # whole windows of it, wherever they lie
    prunella.heal(source, recipe | {"bos": False}, output=tmp_path / "plain")
    assert not (seen[-2][:, 0] == 1).any()


def test_bos_is_as_in_the_pruning_if_nothing_else_is_said(dense: Path, tmp_path: Path) -> None:
    recipe = settings() | {"steps": ["magnitude"], "heal": {}, "bos": False}
    prunella.prune(str(dense), recipe, output=tmp_path / "pruned")
    assert calibrated(tmp_path / "pruned", {})["bos"] is False
    assert calibrated(tmp_path / "pruned", {"bos": True})["bos"] is True


@pytest.mark.parametrize(
    ("heal", "message"),
    [
        (
            {"tokens": 10},
            r"10 tokens to train on are less than a single step takes, 4 windows of 32: give at least 128",
        ),
        ({"tokens": 300, "rounds": 3}, r"100 tokens to train on in each of 3 rounds .* give at least 384"),
        ({"adapt": 10, "distill": 0.5}, r"10 tokens to train on .*heal\.adapt=128"),
        ({"text": ["nowhere.txt"]}, "text file 'nowhere.txt' does not exist"),
    ],
)
def test_what_cannot_be_healed_on_is_refused_before_anything_is_pruned(
    heal: dict[str, Any], message: str, dense: Path, tmp_path: Path
) -> None:
    recipe = settings(train=["norms"], **heal) | {"steps": ["magnitude"]}
    with pytest.raises(InputError, match=message):
        prunella.prune(str(dense), recipe, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_no_more_tokens_are_trained_on_than_asked_for(pruned: Path, tmp_path: Path) -> None:
    report = prunella.heal(pruned, settings(train=["norms"], tokens=250), output=tmp_path / "out")
    assert (report.healing["steps"], report.healing["tokens"]) == (1, 128)
