"""What the Python function does beside what its parts do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel

import prunella
from prunella import InputError, ModelError, NumericalError, Recipe, prune
from prunella.report.compare import Comparison
from prunella.report.page import command, sentence
from prunella.samples import Samples
from prunella.tasks.text import wrap_model

SHORT = {"calibration": {"samples": 4, "length": 32}, "evaluate": {"windows": 1}}


def zeros_of(network: Any) -> dict[str, float]:
    """The share of zeros in each linear layer (the embedding's row for padding is zero by itself)."""
    linear = {name: p for name, p in network.named_parameters() if p.ndim == 2 and "embed" not in name}
    return {name: (p == 0).float().mean().item() for name, p in linear.items()}


def test_a_model_in_memory_is_pruned_in_place_and_stays_usable(ids: Tensor) -> None:
    network = tiny.build()
    report = prune(network, {"steps": ["wanda"]}, calibration=ids)
    assert report.sparsity == 0.5
    assert report.dense["perplexity"] is None
    for name, share in zeros_of(network).items():
        assert share == (0.5 if "_proj" in name else 0.0), name
    with torch.no_grad():
        assert torch.isfinite(network(ids).logits).all()


def test_a_wrapped_model_a_recipe_object_and_a_path_are_taken_as_well(llama: Path, tmp_path: Path, ids: Tensor) -> None:
    recipe = Recipe.of({"steps": ["wanda"]})
    network = AutoModelForCausalLM.from_pretrained(llama)
    prune(wrap_model(network), recipe, calibration=ids)
    for number, name in enumerate((llama, str(llama))):
        prune(name, recipe, output=str(tmp_path / str(number)), calibration=ids)
        found = AutoModelForCausalLM.from_pretrained(tmp_path / str(number)).state_dict()
        assert all(torch.equal(found[key], tensor) for key, tensor in network.state_dict().items())


def test_a_tokenizer_lets_a_model_in_memory_be_calibrated_and_measured_on_text(llama: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(llama)
    report = prune(network, {"steps": ["wanda"], **SHORT}, tokenizer=AutoTokenizer.from_pretrained(llama))
    assert report.dense["perplexity"] > 1
    assert report.pruned["perplexity"] > 1
    assert report.dense["perplexity"] != report.pruned["perplexity"]


def test_the_perplexities_are_those_of_the_dense_and_of_the_pruned_model(llama: Path, tmp_path: Path) -> None:
    report = prune(llama, {"steps": ["sparsegpt"], **SHORT}, output=tmp_path / "out")
    for directory, said in ((llama, report.dense), (tmp_path / "out", report.pruned)):
        model = prunella.load_model(str(directory))
        windows = prunella.calibrate.windows(model, "pydoc", 1, 128, skip=1)  # all of its context
        assert prunella.perplexity(model, windows).perplexity == said["perplexity"]


def test_the_seed_and_nothing_around_it_decides(ids: Tensor) -> None:
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        network = tiny.build()
        prune(network, {"steps": ["sparsegpt"], "seed": 5}, calibration=ids)
        results.append(network.state_dict())
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())


# ---------------------------------------------------------------------------------------------------------
# Which layers


def test_sparsity_by_name_and_skipping_reach_exactly_the_layers_they_name(ids: Tensor) -> None:
    network = tiny.build()
    recipe = {
        "steps": ["wanda"],
        "sparsity": {"*": 0.5, "down_proj": 0.25, "layers.1.mlp": 0.75, "k_proj": 0},
        "skip": ["q_proj", "model.layers.0.self_attn.o_*"],
    }
    prune(network, recipe, calibration=ids)
    for name, share in zeros_of(network).items():
        if "_proj" not in name or any(part in name for part in ("q_proj", "k_proj", "layers.0.self_attn.o_proj")):
            expected = 0.0
        elif "layers.1.mlp" in name:
            expected = 0.75  # the last match wins
        elif "down_proj" in name:
            expected = 0.25
        else:
            expected = 0.5
        assert share == expected, name


@pytest.mark.parametrize("recipe", [{"skip": ["lm_heads"]}, {"sparsity": {"down_prog": 0.5}}])
def test_a_name_pattern_that_matches_nothing_is_refused_with_an_example(recipe: dict[str, Any], ids: Tensor) -> None:
    with pytest.raises(InputError, match=r"matches no layer; names look like 'model\.layers\.0\.self_attn\.q_proj'"):
        prune(tiny.build(), {"steps": ["wanda"], **recipe}, calibration=ids)


@pytest.mark.parametrize("recipe", [{"skip": ["*"]}, {"sparsity": 0}, {"sparsity": {"*": 0}}])
def test_nothing_left_to_prune_is_an_error(recipe: dict[str, Any], ids: Tensor) -> None:
    with pytest.raises(InputError, match="nothing is left to prune"):
        prune(tiny.build(), {"steps": ["wanda"], **recipe}, calibration=ids)


def test_a_pattern_that_does_not_divide_names_the_layer_unless_it_is_skipped(ids: Tensor) -> None:
    recipe: dict[str, Any] = {"steps": ["wanda"], "pattern": "2:4"}
    with pytest.raises(InputError, match=r"does not divide layer 'backbone\.layers\.0\.mixer\.dt_proj'"):
        prune(tiny.build("mamba"), recipe, calibration=ids)
    report = prune(tiny.build("mamba"), {**recipe, "skip": ["dt_proj"]}, calibration=ids)
    assert {la.sparsity for la in report.layers} == {0.0, 0.5}


@pytest.mark.parametrize("sparsity", [0.01, 0.33, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_sparsity_is_met_to_the_weight(architecture: str, sparsity: float, ids: Tensor) -> None:
    report = prune(tiny.build(architecture), {"steps": ["magnitude"], "sparsity": sparsity}, calibration=ids)
    for layer in report.layers:
        size = layer.shape[0] * layer.shape[1]
        assert layer.sparsity == pytest.approx(min(round(size * sparsity), size - 1) / size, abs=1e-12)


def test_steps_apply_one_after_the_other(ids: Tensor) -> None:
    """Wanda's mask under SparseGPT's update: the zeros of the first, the weights of the second."""
    networks = {}
    for steps in (["wanda"], ["wanda", "sparsegpt"]):
        networks[len(steps)] = tiny.build()
        prune(networks[len(steps)], {"steps": steps, "order": "block"}, calibration=ids)
    one, two = (networks[n].model.layers[0].mlp.up_proj.weight for n in (1, 2))
    assert torch.equal(one == 0, two == 0)
    assert not torch.equal(one, two)


# ---------------------------------------------------------------------------------------------------------
# Refusals


def test_what_cannot_be_is_refused(llama: Path, tmp_path: Path, ids: Tensor) -> None:
    with pytest.raises(InputError, match="needs an output directory"):
        prune(llama, calibration=ids)
    with pytest.raises(InputError, match="a model in memory cannot be resumed"):
        prune(tiny.build(), calibration=ids, output=tmp_path / "out", resume=True)
    with pytest.raises(InputError, match="has no tokenizer"):
        prune(tiny.build(), {"steps": ["wanda"]})
    assert not list(tmp_path.iterdir())


def test_where_no_step_reads_text_no_tokenizer_is_needed_and_the_report_says_so(tmp_path: Path, ids: Tensor) -> None:
    tiny.build().save_pretrained(tmp_path / "m")
    report = prune(tmp_path / "m", {"steps": ["magnitude"]}, output=tmp_path / "out")
    assert report.sparsity == 0.5
    assert {(layer.tokens, layer.error) for layer in report.layers} == {(0, None)}
    assert "which reads no text" in report.card()
    with_text = prune(tmp_path / "m", {"steps": ["magnitude"]}, output=tmp_path / "with-text", calibration=ids)
    assert "calibrated on 5 windows" in with_text.card()
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "with-text")]
    assert files[0] == files[1]
    for recipe in ({"steps": ["wanda"]}, {"steps": ["magnitude"], "allocate": "owl"}):
        with pytest.raises(InputError, match="has no tokenizer"):
            prune(tmp_path / "m", recipe, output=tmp_path / "more")


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.zeros(7, dtype=torch.int64), r"int64 of shape \(7,\), expected .* \(N, L\)"),
        (torch.zeros(2, 7), r"float32 of shape \(2, 7\), expected token ids as integers"),
        (torch.full((2, 7), tiny.VOCABULARY), "token 320 lies outside the model's vocabulary of 320"),
        (torch.full((2, 7), -1), "token -1 lies outside the model's vocabulary of 320"),
        (torch.zeros(0, 7, dtype=torch.int64), r"int64 of shape \(0, 7\)"),
    ],
)
def test_windows_that_are_no_token_ids_are_refused(calibration: Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(tiny.build(), {"steps": ["wanda"]}, calibration=calibration)


@pytest.mark.parametrize(("kind", "block"), [("nan", 0), ("missing", 0), ("shape", 0), ("nan", 2)])
def test_a_defect_of_the_model_leaves_nothing_behind_but_finished_blocks(
    llama: Path, tmp_path: Path, kind: str, block: int
) -> None:
    name = f"model.layers.{block}.mlp.up_proj.weight"
    source = tmp_path / "source"
    network = AutoModelForCausalLM.from_pretrained(llama)
    state = network.state_dict()
    if kind == "nan":
        state[name][3, 5] = float("nan")
    elif kind == "missing":
        del state[name]
    else:
        state[name] = torch.zeros(60, 32)
    network.save_pretrained(source, state_dict=state)
    expected = NumericalError if kind == "nan" else ModelError
    with pytest.raises(expected, match=rf"model\.layers\.{block}\.mlp\.up_proj"):
        prune(source, {"steps": ["wanda"]}, output=tmp_path / "out", calibration=tiny.token_windows())
    assert sorted(path.name for path in tmp_path.iterdir()) == [*(["out.partial"] if block else []), "source"]


def test_a_rank_deficient_hessian_is_reported(ids: Tensor) -> None:
    recipe = {"steps": [{"sparsegpt": {"damping": 0}}], "calibration": {"min_tokens": 1}}
    report = prune(tiny.build(), recipe, calibration=ids[:1, :8])
    assert any("Hessian damped to" in note for note in report.notes())
    assert report.sparsity == 0.5


def test_pruning_leaves_the_network_as_it_found_it_but_for_the_weights(ids: Tensor) -> None:
    network = tiny.build("mixtral")
    network.train()
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    grads = {name: p.requires_grad for name, p in network.named_parameters()}
    prune(network, {"steps": ["wanda"]}, calibration=ids)
    assert {name: p.requires_grad for name, p in network.named_parameters()} == grads
    assert all(torch.equal(buffers[name], buffer) for name, buffer in network.named_buffers())
    assert all("forward" not in vars(module) for module in network.modules())


def test_progress_is_told_for_every_block(llama: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int]] = []

    def track(items: Any, what: str, total: int) -> Any:
        told.append((what, total))
        return items

    prune(llama, {"steps": ["wanda"], **SHORT}, output=tmp_path / "out", track=track)
    assert told == [("perplexity", 3), ("pruning", 3), ("perplexity", 3)]


def test_a_model_in_memory_is_handed_back_as_it_was(ids: torch.Tensor) -> None:
    network = tiny.build("mixtral", head_dim=32).to(torch.bfloat16).train()
    before = (network.config._attn_implementation, network.config._experts_implementation)
    state = torch.random.get_rng_state()
    prunella.prune(network, {"steps": ["wanda"]}, calibration=ids)
    assert (network.config._attn_implementation, network.config._experts_implementation) == before
    assert network.training
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("order", ["layer", "block"])
def test_streamed_equals_in_memory_with_the_kernels_for_bfloat16(ids: torch.Tensor, tmp_path: Path, order: str) -> None:
    tiny.build("llama", head_dim=32).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    recipe = {"steps": ["sparsegpt"], "order": order, "evaluate": {"source": None}}
    prunella.prune(tmp_path / "dense", recipe, output=tmp_path / "out", calibration=ids)
    prunella.prune(network, recipe, calibration=ids)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, streamed[name]), name


# ---------------------------------------------------------------------------------------------------------
# A second pass


def pruned_once(sparsity: float = 0.7, pattern: str = "unstructured", step: str = "magnitude") -> Any:
    network = tiny.build()
    recipe: dict[str, Any] = {"steps": [step], "pattern": pattern}
    prune(network, recipe | ({} if ":" in pattern else {"sparsity": sparsity}), calibration=tiny.token_windows())
    return network


def layers_of(network: Any) -> dict[str, Tensor]:
    return {
        name.removesuffix(".weight"): p.detach().clone() for name, p in network.named_parameters() if "_proj" in name
    }


@pytest.mark.parametrize("order", ["layer", "block"])
def test_the_zeros_that_came_in_are_counted(order: str, ids: Tensor) -> None:
    network = pruned_once()
    report = prune(network, {"steps": ["wanda"], "sparsity": 0.5, "skip": ["q_proj"], "order": order}, calibration=ids)
    for layer in report.layers:
        weight = layers_of(network)[layer.name]
        assert layer.sparsity == int((weight == 0).sum()) / weight.numel()
        assert layer.before == pytest.approx(0.7, abs=1e-3)
        assert layer.target == (0.0 if "q_proj" in layer.name else 0.5)
    rows = {row[0]: row[1:] for row in report.rows()}
    assert rows["sparsity of all block weights"] == ("70.0%", "70.0%")


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x2"])
@pytest.mark.parametrize("steps", [["wanda"], ["sparsegpt"], ["ria", "update"], ["gptq"], ["reconstruct"], ["admm"]])
def test_a_second_pass_that_keeps_zeros_adds_to_them_and_prunes_as_many_as_it_is_asked(
    steps: list[str], pattern: str, ids: Tensor
) -> None:
    network = pruned_once(0.375, "3:4" if pattern == "2:4" else pattern)
    before = layers_of(network)
    share = 0.5 if pattern == "2:4" else 0.625
    recipe: dict[str, Any] = {"steps": steps, "pattern": pattern, "sparsity": share, "keep_zeros": True}
    report = prune(network, recipe, calibration=ids)
    after = layers_of(network)
    for layer in report.layers:
        weight = after[layer.name]
        assert not weight[before[layer.name] == 0].any(), layer.name
        assert layer.sparsity == share
        if pattern == "2:4":
            assert ((weight.unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all()


def test_single_zeros_in_a_block_that_is_kept_stay_zero(ids: Tensor) -> None:
    network = tiny.build()
    weight = network.model.layers[0].mlp.up_proj.weight.data
    weight[::4, ::2] = 0
    report = prune(network, {"steps": ["sparsegpt"], "pattern": "4x2", "keep_zeros": True}, calibration=ids)
    assert not weight[::4, ::2].any()
    found = next(la for la in report.layers if la.name.endswith("layers.0.mlp.up_proj"))
    assert found.sparsity == 0.5 + 0.5 / 8


def test_more_zeros_than_were_asked_for_all_stay_and_are_told(ids: Tensor) -> None:
    network = pruned_once()
    before = layers_of(network)
    report = prune(network, {"steps": ["sparsegpt"], "sparsity": 0.5, "keep_zeros": True}, calibration=ids)
    for name, weight in layers_of(network).items():
        assert torch.equal(weight == 0, before[name] == 0)
    assert report.notes()[0].endswith("came with 70.0% zeros, more than the 50.0% asked for: all stay")
    assert len(report.notes()) == len(report.layers)


def test_without_it_a_second_pass_chooses_anew(ids: Tensor) -> None:
    network = pruned_once(0.4)
    before = layers_of(network)
    prune(network, {"steps": ["wanda", "update"], "pattern": "2:4"}, calibration=ids)
    assert any(bool(weight[before[name] == 0].any()) for name, weight in layers_of(network).items())


def test_keeping_zeros_changes_nothing_for_a_dense_model(ids: Tensor) -> None:
    one, other = tiny.build(), tiny.build()
    for network, keep_zeros in ((one, False), (other, True)):
        prune(network, {"steps": ["sparsegpt"], "keep_zeros": keep_zeros}, calibration=ids)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# ---------------------------------------------------------------------------------------------------------
# What stays as it is


def test_reconstruction_leaves_routers_and_skipped_layers_as_they_are(ids: Tensor) -> None:
    network = tiny.build("qwen3_moe")
    before = {name: p.clone() for name, p in network.named_parameters()}
    prune(network, {"steps": ["wanda", "reconstruct"], "skip": ["q_proj", "experts.gate_up_proj"]}, calibration=ids)
    after = dict(network.named_parameters())
    for name in before:
        stays = any(part in name for part in ("q_proj", "mlp.gate.", "gate_up_proj", "embed", "model.norm"))
        if stays or "down_proj" in name or "layernorm" in name:
            assert torch.equal(before[name], after[name]) == stays, name


def test_a_biased_layer_that_is_skipped_keeps_its_bias(ids: Tensor) -> None:
    network = tiny.build("gpt2")
    before = {name: p.clone() for name, p in network.named_parameters()}
    prune(network, {"steps": ["wanda", "reconstruct"], "skip": ["c_fc"]}, calibration=ids)
    for name, parameter in network.named_parameters():
        if "c_fc" in name or "c_proj" in name:
            assert torch.equal(before[name], parameter) == ("c_fc" in name), name


def test_running_a_block_copies_the_experts_once_however_many_there_are(ids: Tensor) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Written(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.nbytes = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            self.nbytes += out.nbytes if "index_copy" in str(function) else 0
            return out

    for experts in (2, 8):
        network = tiny.build("qwen3_moe", num_hidden_layers=1, num_experts=experts)
        size = sum(p.nbytes for name, p in network.named_parameters() if "experts" in name)
        with Written() as written:
            prune(network, {"steps": ["wanda", "reconstruct"]}, calibration=ids)
        assert written.nbytes == len(ids) * size


def test_pruning_works_in_inference_mode(ids: Tensor) -> None:
    one, other = tiny.build(), tiny.build()
    recipe = {"steps": ["wanda", "reconstruct"], "order": "block"}
    prune(one, recipe, calibration=ids)
    with torch.inference_mode():
        prune(other, recipe, calibration=ids)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_model_made_in_inference_mode_is_refused(ids: Tensor) -> None:
    with torch.inference_mode():
        network = AutoModelForCausalLM.from_config(tiny.build().config)
        with pytest.raises(InputError, match=r"made under torch\.inference_mode.*load it under torch\.no_grad"):
            prune(network, {"steps": ["wanda"]}, calibration=ids)


def _as_it_is(network: Any) -> tuple[Any, ...]:
    return {name: part.training for name, part in network.named_modules()}, network.config._attn_implementation


def test_each_part_of_a_model_is_left_in_the_mode_in_which_it_was(ids: Tensor) -> None:
    network = tiny.build().train()
    network.model.layers[0].eval()
    before = _as_it_is(network)
    prune(network, {"steps": ["wanda"]}, calibration=ids)
    assert _as_it_is(network) == before


@pytest.mark.parametrize("kind", ["encoder", "no blocks", "inference"])
def test_a_model_that_is_refused_is_left_as_it_was(kind: str, ids: Tensor) -> None:
    with torch.inference_mode(kind == "inference"):
        network: Any = tiny.build().train()
    if kind == "encoder":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        network = BertLMHeadModel(BertConfig(vocab_size=320, **sizes)).train()
    elif kind == "no blocks":
        network.model.layers = network.model.layers[:0]
    before = _as_it_is(network)
    with pytest.raises((InputError, ModelError)):
        prune(network, {"steps": ["wanda"], "task": "text"}, calibration=ids)
    assert _as_it_is(network) == before


def test_padded_samples_are_refused_since_padding_would_count_as_text(ids: Tensor) -> None:
    seen = torch.ones_like(ids)
    network = tiny.build()
    prune(network, {"steps": ["wanda"]}, calibration=Samples.of({"input_ids": ids, "attention_mask": seen}))
    seen[:, -4:] = 0
    with pytest.raises(InputError, match=r"attention_mask of these samples hides tokens.*as groups, without padding"):
        prune(network, {"steps": ["wanda"]}, calibration=Samples.of({"input_ids": ids, "attention_mask": seen}))


def test_samples_that_are_handed_over_are_not_called_those_of_the_recipe(ids: Tensor) -> None:
    one = prune(tiny.build(), {"steps": ["wanda"]}, calibration=ids)
    assert "calibrated on 5 windows of\n32 tokens that were handed over" in one.card()
    several = Samples.of([{"input_ids": ids}, {"input_ids": ids[:, :9]}])
    two = prune(tiny.build(), {"steps": ["wanda"]}, calibration=several)
    assert "calibrated on 10 windows that were handed over" in sentence(two)
    assert "these commands take the recipe's" in command(two, "out")
    assert "handed over, 10" in str(Comparison(("one", "two"), (one, two)).rows())
