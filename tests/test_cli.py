from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunella
from prunella import cli, read_masks
from prunella.allocate import allocations
from prunella.registry import steps
from prunella.save import Output

Run = Callable[..., Any]
SHORT = ("--calibration", "pydoc", "--samples", 4, "--length", 32, "--windows", 1)


# ---------------------------------------------------------------------------------------------------------
# Each command


def test_prune_prints_dense_beside_pruned_and_saves(run: Run, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("prune", llama, "-o", out, "--step", "wanda", "--step", "sparsegpt", "--sparsity", 0.25, *SHORT)
    assert (result.code, result.err) == (0, "")
    assert "llama: wanda + sparsegpt" in result.out
    assert "25.0%" in result.out
    assert f"saved to {out}" in result.out
    report = prunella.Report.read(out)
    assert report.sparsity == 0.25
    assert [name for step in report.recipe["steps"] for name in step] == ["wanda", "sparsegpt"]
    assert f"{report.pruned['perplexity']:.2f}" in result.out
    assert AutoModelForCausalLM.from_pretrained(out)


def test_prune_as_json_prints_the_report_and_nothing_else(run: Run, llama: Path, tmp_path: Path) -> None:
    result = run("prune", llama, "-o", tmp_path / "out", "--json", *SHORT)
    assert result.code == 0
    assert json.loads(result.out) == json.loads((tmp_path / "out" / "prunella.json").read_text())


def test_prune_does_what_the_python_function_does(run: Run, llama: Path, tmp_path: Path) -> None:
    run("prune", llama, "-o", tmp_path / "one", "--step", "wanda", "--pattern", "2:4", "--order", "block", *SHORT)
    recipe = {
        "steps": ["wanda"],
        "pattern": "2:4",
        "order": "block",
        "calibration": {"samples": 4, "length": 32},
        "evaluate": {"windows": 1},
    }
    prunella.prune(llama, recipe, output=tmp_path / "two")
    for path in (tmp_path / "two").glob("*.safetensors"):
        assert (tmp_path / "one" / path.name).read_bytes() == path.read_bytes()


def shares_of(directory: Path) -> dict[str, float]:
    return {layer.name: layer.sparsity for layer in prunella.Report.read(directory).layers}


@pytest.mark.parametrize(
    "flags",
    [
        ("--sparsity", "0.5", "--sparsity", "down_proj=0.25", "--skip", "q_proj"),
        ("--set", "sparsity.*=0.5", "--set", "sparsity.down_proj=0.25", "--set", "skip=[q_proj]"),
        ("--set", "sparsity.*down_proj=0.25", "--sparsity", "*q_proj=0"),
    ],
)
def test_sparsity_by_name_can_be_said_in_several_ways(
    run: Run, llama: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    result = run("prune", llama, "-o", tmp_path / "out", "--step", "magnitude", "--evaluate", "none", *flags, *SHORT)
    assert result.code == 0, result.err
    for name, share in shares_of(tmp_path / "out").items():
        assert share == (0.25 if name.endswith("down_proj") else 0 if name.endswith("q_proj") else 0.5), name
    assert not any(name.endswith("q_proj") for name in read_masks(tmp_path / "out"))


def test_flags_go_before_the_recipe_and_settings_before_flags(run: Run, llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "model": "another",
                "steps": ["magnitude"],
                "sparsity": 0.3,
                "seed": 1,
                "calibration": {"samples": 9, "length": 16},
                "evaluate": {"source": None},
            }
        )
    )
    flags = ("--recipe", recipe, "--step", "wanda", "--seed", 2, "--samples", 3, "--set", "seed=3")
    assert run("prune", llama, "-o", tmp_path / "out", *flags).code == 0
    found = prunella.Report.read(tmp_path / "out").recipe
    assert found["model"] == str(llama)
    assert found["steps"] == [{"wanda": {}}]
    assert found["sparsity"] == {"*": 0.3}
    assert found["seed"] == 3
    assert (found["calibration"]["samples"], found["calibration"]["length"]) == (3, 16)


def test_a_fixed_pattern_on_the_command_line_goes_before_the_recipes_sparsity(
    run: Run, llama: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("sparsity: 0.7\nsteps: [magnitude]\n")
    assert run("prune", llama, "-o", tmp_path / "out", "--recipe", recipe, "--pattern", "1:4", *SHORT).code == 0
    assert set(shares_of(tmp_path / "out").values()) == {0.75}


def test_evaluate_none_measures_nothing(run: Run, llama: Path, tmp_path: Path) -> None:
    result = run("prune", llama, "-o", tmp_path / "out", "--evaluate", "none", "--step", "magnitude", *SHORT)
    assert result.code == 0
    assert "not measured" in result.out
    assert prunella.Report.read(tmp_path / "out").dense["perplexity"] is None


def test_notes_are_printed_and_long_lists_cut(run: Run, llama: Path, tmp_path: Path) -> None:
    flags = ("--step", "wanda", "--set", "calibration.min_tokens=100000")
    result = run("prune", llama, "-o", tmp_path / "out", *flags, *SHORT)
    assert result.out.count("pruned by magnitude") == 10
    assert "and 11 more notes" in result.out


def test_a_rank_deficient_hessian_is_reported_and_no_error(run: Run, llama: Path, tmp_path: Path) -> None:
    flags = ("--set", "sparsegpt.damping=0", "--set", "calibration.min_tokens=1", "--samples", 1, "--length", 8)
    result = run("prune", llama, "-o", tmp_path / "out", *flags)
    assert result.code == 0, result.err
    assert "Hessian damped to" in result.out


def test_eval_measures_what_the_python_function_does(run: Run, llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("Prune in late winter, before the buds swell. " * 60)
    result = run("eval", llama, "--text", text, "--length", 32, "--windows", 3, "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    model = prunella.load_model(str(llama))
    ids = AutoTokenizer.from_pretrained(llama)(text.read_text())["input_ids"]
    expected = prunella.perplexity(model, torch.tensor(ids[:96]).view(3, 32))
    assert found["perplexity"] == expected.perplexity
    assert (found["windows"], found["length"], found["dtype"]) == (3, 32, "float32")
    everything = json.loads(run("eval", llama, "--text", text, "--length", 32, "--json").out)
    assert everything["windows"] == len(ids) // 32
    shown = run("eval", llama, "--text", text, "--length", 32, "--windows", 3).out
    assert f"perplexity {expected.perplexity:.3f}" in shown
    assert "3 windows of 32 tokens without BOS, float32" in shown


def test_generate_continues_the_prompt_as_transformers_does(run: Run, llama: Path) -> None:
    result = run("generate", llama, "Trees grow", "--tokens", 8)
    assert result.code == 0, result.err
    network, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    ids = network.generate(**tokenizer("Trees grow", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert result.out.strip() == tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_generate_samples_by_seed(run: Run, llama: Path) -> None:
    flags = ("generate", llama, "Trees grow", "--tokens", 12, "--temperature", 1.0)
    first, again, other = (run(*flags, "--seed", seed).out for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_generate_wraps_a_chat_and_shows_the_answer_alone(run: Run, llama: Path) -> None:
    result = run("generate", llama, "Trees grow", "--tokens", 8, "--chat")
    assert result.code == 0, result.err
    assert "user:" not in result.out
    assert "Trees grow" not in result.out
    assert result.out.strip()


def test_inspect_shows_every_layer_and_the_sum(run: Run, llama: Path, tmp_path: Path) -> None:
    run("prune", llama, "-o", tmp_path / "out", "--step", "wanda", "--pattern", "2:4", "--skip", "q_proj", *SHORT)
    rows = json.loads(run("inspect", tmp_path / "out", "--json").out)
    assert len(rows) == 21
    for row in rows:
        dense = row["name"].endswith("q_proj")
        assert (row["pattern"], row["sparsity"]) == (("dense", 0) if dense else ("2:4", 0.5))
    zeros, weights = (
        sum(row[key] if key == "zeros" else row["shape"][0] * row["shape"][1] for row in rows)
        for key in ("zeros", "shape")
    )
    shown = run("inspect", tmp_path / "out").out
    assert f"21 layers, {weights / 1e6:,.1f} M weights, {zeros / weights:.2%} zeros" in shown
    assert run("inspect", llama).code == 0


def test_methods_lists_every_step_and_allocation_with_its_options(run: Run) -> None:
    rows = json.loads(run("methods", "--json").out)
    assert {row["name"] for row in rows if row["kind"] == "step"} == set(steps)
    assert {row["name"] for row in rows if row["kind"] == "allocation"} == set(allocations)
    assert all(row["summary"] for row in rows)
    (sparsegpt,) = [row for row in rows if row["name"] == "sparsegpt"]
    assert sparsegpt["options"] == {"damping": 0.01, "tile": 128, "order": "natural"}
    shown = run("methods").out
    assert all(name in shown for name in (*steps, *allocations))


@pytest.fixture
def positioned(tmp_path: Path) -> Path:
    """A tiny GPT-2, which has learned 16 positions and 64 tokens of the 320 that its tokenizer knows."""
    tiny.build("gpt2", n_positions=16, max_position_embeddings=16, vocab_size=64).save_pretrained(tmp_path / "gpt2")
    tiny.write_tokenizer(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_generate_ends_where_the_learned_positions_do(run: Run, positioned: Path) -> None:
    done = run("generate", positioned, "!!!!")  # 100 tokens, if there were room
    assert done.code == 0, done.err


def test_generate_refuses_a_prompt_that_the_model_has_no_positions_or_tokens_for(
    refused: Run, positioned: Path
) -> None:
    said = refused("generate", positioned, "!" * 17)
    assert "prompts of 17 tokens are longer than the 16 positions that the model has learned" in said
    assert "lies outside the model's vocabulary of 64" in refused("generate", positioned, "Trees grow")


def test_a_sample_of_text_is_left_out_where_the_model_cannot_read_its_prompt(run: Run, positioned: Path) -> None:
    (positioned.parent / "a.txt").write_text("!" * 4000)
    text = ("--calibration", positioned.parent / "a.txt", "--evaluate", positioned.parent / "a.txt")
    done = run("prune", positioned, "-o", positioned.parent / "out", *text, "--samples", 2, "--windows", 1, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["pruned"]["sample"] is None


@pytest.mark.parametrize("command", ["prune", "eval", "generate", "inspect", "methods"])
def test_every_command_explains_itself(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert result.code == 0
    assert "Usage: prunella" in result.out
    assert command in run("--help").out


# ---------------------------------------------------------------------------------------------------------
# Bad input: one line that names the thing, exit code 2, nothing left behind but finished blocks, which are named


@pytest.fixture
def refused(run: Run, tmp_path: Path) -> Run:
    """Run a command that must be refused; the line it says."""

    def refused(*arguments: object) -> str:
        def there() -> list[Path]:
            return sorted(path for path in tmp_path.rglob("*") if kept not in (path, *path.parents))

        kept = tmp_path / "out.partial"
        before = there()
        result = run(*arguments)
        assert result.code == 2, result
        assert result.out == ""
        assert re.fullmatch(r"prunella: error: [^\n]+\n", result.err), result.err
        assert there() == before
        if kept.exists():
            assert f"What is done is kept in '{kept}'" in result.err
            shutil.rmtree(kept)
        found: str = result.err
        return found

    return refused


@pytest.fixture
def prune(refused: Run, llama: Path, tmp_path: Path) -> Run:
    """`prunella prune` of the tiny LLaMA into a new directory, which must be refused."""

    def prune(*arguments: object, model: object = llama) -> str:
        found: str = refused("prune", model, "-o", tmp_path / "out", *SHORT, *arguments)
        return found

    return prune


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--step", "wandda"), "unknown step 'wandda'. Did you mean 'wanda'?"),
        (("--allocate", "uniforms"), "unknown allocation 'uniforms'. Did you mean 'uniform'?"),
        (("--set", "sampels=3"), "unknown recipe key 'sampels'"),
        (("--set", "calibration.sample=3"), "Did you mean 'calibration.samples'"),
        (("--set", "sparsegpt.dampng=3"), "Did you mean 'damping'"),
        (("--sparsity", "1"), "sparsity 1 for layers '*' is out of range: 0 (dense) up to, not including, 1"),
        (("--sparsity=-0.1",), "sparsity -0.1 for layers '*' is out of range"),
        (("--sparsity", "down_proj=2"), "sparsity 2 for layers 'down_proj' is out of range"),
        (("--sparsity", "50"), "sparsity 50 for layers '*' is out of range"),
        (("--sparsity", "50"), "did you mean 0.5?"),
        (("--sparsity", "50%"), "sparsity 50% for layers '*' is written as a share: did you mean 0.5?"),
        (("--sparsity", "down_proj=62.5 %"), "did you mean 0.625?"),
        (("--set", "sparsity=50%"), "did you mean 0.5?"),
        (("--sparsity", "much"), "recipe key 'sparsity.*'"),
        (("--sparsity", "nothing_like_it=0.5"), "'nothing_like_it' matches no layer"),
        (("--sparsity", "0"), "nothing is left to prune"),
        (("--skip", "nothing_like_it"), "'nothing_like_it' matches no layer"),
        (("--pattern", "4:2"), "pattern '4:2' is none of"),
        (("--pattern", "2:5"), "pattern 2:5 does not divide layer 'model.layers.0.self_attn.q_proj'"),
        (("--pattern", "7x1"), "pattern 7x1 does not divide layer 'model.layers.0.self_attn.q_proj'"),
        (("--pattern", "2:4", "--sparsity", "0.6"), "pattern 2:4 prunes 0.5 of every layer"),
        (("--calibration", "nowhere.txt"), "text file 'nowhere.txt' does not exist"),
        (("--calibration", "wikitext3"), "Did you mean 'wikitext2'"),
        (("--evaluate", "nowhere.jsonl"), "text file 'nowhere.jsonl' does not exist"),
        (("--samples", "1000000"), "1000000 windows of 32 take 32,000,000"),
        (("--samples", "0"), "calibration.samples"),
        (("--length", "1"), "calibration.length"),
        (("--length", "4096"), "longer than the model's context of 128"),
        (("--order", "sideways"), "recipe key 'order'"),
        (("--dtype", "int4"), "recipe key 'dtype'"),
        (("--device", "cuda:99"), "device 'cuda:99' cannot be used"),
        (("--recipe", "nowhere.yaml"), "recipe 'nowhere.yaml' cannot be read"),
        (("--samples", "many"), "--samples"),
        (("--no-such-flag",), "--no-such-flag"),
    ],
)
def test_a_flag_that_cannot_be_is_refused(prune: Run, arguments: tuple[str, ...], message: str) -> None:
    assert message in prune(*arguments)


def test_an_unknown_model_is_refused(prune: Run, run: Run, tmp_path: Path) -> None:
    result = run("prune", "smollm2-135", "-o", tmp_path / "out")
    assert result.code == 2
    asked, said = result.err.splitlines()  # the hub is asked, and that is said, before the name is given up
    assert asked == "prunella: downloading smollm2-135 from the hub"
    assert "Did you mean 'smollm2-135m'?" in said
    assert "does not exist" in prune(model="no model!")
    assert "GGUF file 'x.gguf' does not exist" in prune(model="x.gguf")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.txt", b"", "is empty"),
        ("e.jsonl", b"", "is empty"),
        ("short.txt", b"Too short.", "tokens, but 4 windows of 32 take 128"),
        ("bad.txt", b"\xff\xff", "is not UTF-8 text"),
        ("bad.jsonl", b'{"text": "a"}\nnonsense\n', "line 2: not a JSON object"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(
    prune: Run, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in prune("--calibration", tmp_path / name)
    assert message.replace("4 windows", "5 windows").replace("128", "160") in prune(
        "--calibration", tmp_path / name, "--samples", 5
    )


def test_a_recipe_file_that_cannot_be_used_is_refused(prune: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("sparsty: 0.5\n")
    assert "unknown recipe key 'sparsty'. Did you mean 'sparsity'?" in prune("--recipe", recipe)
    recipe.write_text("steps: [wanda\n")
    assert f"recipe '{recipe}' is not YAML" in prune("--recipe", recipe)


@pytest.fixture
def damaged(tmp_path: Path) -> Callable[[Callable[[Path], object]], Path]:
    """A tiny model in one file with something done to it."""

    def damaged(change: Callable[[Path], object]) -> Path:
        path = tmp_path / "damaged"
        tiny.build().save_pretrained(path)
        tiny.write_tokenizer(path)
        change(path)
        return path

    return damaged


def truncate(path: Path) -> None:
    file = path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def corrupt(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(b"\x00" * 50 + file.read_bytes()[50:])


def without(name: str) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        del tensors[name]
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    return change


def with_value(name: str, value: float) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        tensors[name].view(-1)[7] = value
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    return change


def pickled(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def with_code(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "mine.py").write_text("raise SystemExit('it ran')\n")


def without_blocks(path: Path) -> None:
    shutil.rmtree(path)
    tiny.build(num_hidden_layers=0).save_pretrained(path)


@pytest.mark.parametrize("evaluate", ["pydoc", "none"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, "model.safetensors' is truncated or damaged"),
        (corrupt, "model.safetensors' is truncated or damaged"),
        (without("model.layers.1.mlp.up_proj.weight"), "'model.layers.1.mlp.up_proj.weight' is missing"),
        (with_value("model.layers.1.mlp.up_proj.weight", float("nan")), "'model.layers.1.mlp.up_proj"),
        (with_value("model.layers.1.mlp.up_proj.weight", float("inf")), "'model.layers.1.mlp.up_proj"),
        (with_value("model.layers.1.input_layernorm.weight", float("nan")), "'model.layers.1."),
        (pickled, "--allow-pickle"),
        (with_code, "--trust-remote-code"),
        (without_blocks, "no blocks were found in LlamaForCausalLM"),
        (lambda path: (path / "config.json").unlink(), "config.json is missing"),
        (lambda path: (path / "tokenizer.json").write_text("{"), "the tokenizer of"),
    ],
)
def test_a_damaged_model_is_refused(
    prune: Run, damaged: Any, change: Callable[[Path], object], message: str, evaluate: str
) -> None:
    assert message in prune("--evaluate", evaluate, model=damaged(change))


def test_activations_that_overflow_name_the_place(prune: Run, damaged: Any) -> None:
    def blow_up(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        tensors["model.layers.1.input_layernorm.weight"][:] = 3e38
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    model = damaged(blow_up)
    assert "model.layers.1" in prune(model=model)
    assert "inputs of layer 'model.layers.1.self_attn." in prune("--evaluate", "none", model=model)


def test_a_damaged_gguf_file_is_refused(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + b"\x07" * 64)
    result = run("prune", path, "-o", tmp_path / "out", *SHORT)
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith(f"prunella: error: '{path}' cannot be read: ")
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_the_directory_that_one_is_in_is_no_output(
    refused: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "'.' cannot be the output" in refused("prune", llama, "-o", ".", *SHORT)
    assert "'.' cannot be the output" in refused("pack", llama, "-o", ".")
    prunella.prune(llama, {"calibration": {"samples": 2, "length": 16}, "evaluate": {"source": None}}, output="out")
    assert "'.' is a directory" in refused("report", "out", "-o", ".")


def test_an_output_that_is_in_use_is_refused(refused: Run, llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    assert "exists and is not empty: choose another -o" in refused("prune", llama, "-o", out, *SHORT)
    assert "exists and is not a directory" in refused("prune", llama, "-o", out / "precious", *SHORT)
    assert "is not a directory" in refused("prune", llama, "-o", out / "precious" / "below", *SHORT)
    assert (out / "precious").read_text() == "x"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
def test_a_full_disk_is_said_and_leaves_nothing(
    prune: Run, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, full)
    assert "no space left on the disk of" in prune("--evaluate", "none")


def test_a_disk_that_fills_up_later_keeps_the_finished_blocks(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "out", Output.write

    def fill_up(self: Output, result: Any) -> None:
        if result.index == 1:
            assert self.blocks == 1  # the one before is on disk
            patch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        write(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", fill_up)
        result = run("prune", llama, "-o", out, *SHORT)
    assert result.code == 2
    assert "no space left" in result.err
    assert not out.exists()
    again = run("prune", llama, "-o", out, "--resume", "--json", *SHORT)
    assert again.code == 0, again.err
    assert json.loads(again.out)["run"]["resumed_after_blocks"] == 1


def test_ctrl_c_leaves_a_run_that_resume_finishes(
    run: Run, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "out", Output.write

    def interrupted(self: Output, result: Any) -> None:
        if result.index == 2:
            raise KeyboardInterrupt
        write(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", interrupted)
        result = run("prune", llama, "-o", out, *SHORT)
    assert result.code == 130
    assert result.err.count("\n") == 1
    assert "--resume" in result.err
    assert not out.exists()
    refused = run("prune", llama, "-o", out, *SHORT)
    assert refused.code == 2
    assert "holds an unfinished run: repeat its command with --resume" in refused.err
    again = run("prune", llama, "-o", out, "--resume", *SHORT)
    assert again.code == 0, again.err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "LLAMA", "--text", "nowhere.txt"), "text file 'nowhere.txt' does not exist"),
        (("eval", "LLAMA", "--length", 4096), "longer than the model's context of 128"),
        (("eval", "LLAMA", "--windows", 10**7, "--length", 32), "10000000 windows of 32"),
        (("eval", "LLAMA", "--windows", 0), "--windows"),
        (("eval", "LLAMA", "--text", "self", "--length", 32), "say how many windows (--windows)"),
        (("eval", "LLAMA", "--length", 0), "--length"),
        (("eval", "LLAMA", "--dtype", "int4"), "unknown dtype 'int4'"),
        (("eval", "nothing.gguf"), "GGUF file 'nothing.gguf' does not exist"),
        (("generate", "LLAMA", ""), "the prompt is empty"),
        (("generate", "LLAMA", "x", "--tokens", 0), "--tokens"),
        (("generate", "LLAMA", "x", "--tokens", -3), "--tokens"),
        (("generate", "LLAMA", "x", "--temperature", -1), "--temperature"),
        (("inspect", "nothing"), "'nothing' is not a directory"),
        (("inspects", "nothing"), "inspects"),
        (("sweep", "LLAMA", "-o", "out", "--sparsity", "50"), "did you mean 0.5?"),
        (("sweep", "LLAMA", "-o", "out", "--sparsity", "50%"), "did you mean 0.5?"),
        (("bench", "--random", "tiny", "--sparsity", "50%"), "did you mean 0.5?"),
        (("prune", "LLAMA"), "-o"),
        (("prune",), "MODEL"),
    ],
)
def test_other_commands_refuse_in_one_line_too(
    refused: Run, llama: Path, arguments: tuple[Any, ...], message: str
) -> None:
    assert message in refused(*[llama if argument == "LLAMA" else argument for argument in arguments])


def test_a_model_without_tokenizer_or_chat_template_says_so(refused: Run, damaged: Any) -> None:
    def untemplated(path: Path) -> None:
        (path / "chat_template.jinja").unlink()

    assert "has no chat template: leave --chat out" in refused("generate", damaged(untemplated), "x", "--chat")

    def unread(path: Path) -> None:
        for file in path.glob("token*"):
            file.unlink()

    model = damaged(unread)
    assert "has no tokenizer" in refused("generate", model, "x")
    assert "has no tokenizer" in refused("eval", model, "--length", 32)


# ---------------------------------------------------------------------------------------------------------
# What is not the user's fault


def raising(error: BaseException) -> Callable[[], Any]:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ZeroDivisionError("by\nzero"), 1, "internal error, please report it: ZeroDivisionError: by"),
        (MemoryError(), 2, "out of memory: use fewer or shorter windows"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 2, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 0, None),
        (prunella.InputError("two\nlines"), 2, "two lines"),
    ],
)
def test_every_end_has_its_code_and_one_line(
    error: BaseException, code: int, message: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._guard(raising(error)) == code
    said = capsys.readouterr().err
    if message is None:
        assert said == ""
    else:
        assert said.startswith(f"prunella: error: {message}")
        assert said.count("\n") == 1


def test_debug_shows_where(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNELLA_DEBUG", "")
    result = run("--debug", "inspect", "nothing")
    assert result.code == 2
    assert "Traceback" in result.err
    monkeypatch.setenv("PRUNELLA_DEBUG", "")
    assert "Traceback" not in run("inspect", "nothing").err
