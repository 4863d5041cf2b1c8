"""Encoder-decoders from text to text: what they are run on, their loss, and every step on both stacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as t

import prunella
from prunella import InputError, ModelError, open_model
from prunella.allocate import allocations
from prunella.registry import steps
from prunella.samples import Samples
from prunella.stream import Stream
from prunella.tasks import make_task, task_of
from prunella.tasks.seq2seq import Seq2Seq, shifted_right

IDS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
SIDES: dict[str, Any] = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 32}.items()
}
BART: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "d_model": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    **IDS,
    **SIDES,
}
T5: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 4,
    **IDS,
}
KINDS: dict[str, Callable[[], Any]] = {
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)),
    "t5-untied": lambda: t.T5ForConditionalGeneration(
        t.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    ),
    "umt5": lambda: t.UMT5ForConditionalGeneration(t.UMT5Config(**T5)),
    "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**BART)),
    "mbart": lambda: t.MBartForConditionalGeneration(t.MBartConfig(**BART)),
    "marian": lambda: t.MarianMTModel(t.MarianConfig(**BART)),
    "pegasus": lambda: t.PegasusForConditionalGeneration(t.PegasusConfig(**BART)),
    "m2m": lambda: t.M2M100ForConditionalGeneration(t.M2M100Config(**BART)),
    "blenderbot": lambda: t.BlenderbotForConditionalGeneration(t.BlenderbotConfig(**BART)),
}
ALL = [pytest.param(k, marks=() if k in ("t5", "umt5", "bart", "marian") else pytest.mark.slow) for k in KINDS]
PAIRS = [("Prune roses in spring.", "roses"), ("Cut it back.", "back"), ("Apples want pruning.", "apples")] * 4


def network(kind: str = "t5") -> Any:
    torch.manual_seed(0)
    built = KINDS[kind]().eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():  # what is zero, one or tiny at first would hide mistakes
            if "embed_positions" not in name:  # Marian's and Pegasus' are a table of sines, and not in the files
                parameter += 0.05 * torch.randn(parameter.shape)
    return built


def saved(kind: str, path: Path) -> Path:
    network(kind).save_pretrained(path)
    tiny.write_tokenizer(path, eos=True)
    return path


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("t5", tmp_path_factory.mktemp("seq2seq") / "t5")


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"text": a, "target": b}) + "\n" for a, b in PAIRS))
    return path


def samples_of(shapes: Any = ((12, 5), (7, 3))) -> Samples:
    torch.manual_seed(1)
    low, high = 3, tiny.VOCABULARY
    return Samples.of(
        [{"input_ids": torch.randint(low, high, (3, n)), "labels": torch.randint(low, high, (3, m))} for n, m in shapes]
    )


# ---------------------------------------------------------------------------------------------------------
# What they are run on


def test_a_model_says_that_it_is_one(t5: Path) -> None:
    assert task_of(str(t5)) == {"seq2seq": {}}
    assert task_of(network("bart")) == {"seq2seq": {}}
    assert isinstance(open_model(str(t5)).task, Seq2Seq)


def test_pairs_are_read_as_the_tokenizer_writes_them_and_never_padded(t5: Path, pairs: Path) -> None:
    model = open_model(str(t5))
    found = Seq2Seq(prefix="sum: ").samples(model, str(pairs), 5)
    tokenizer = model.tokenizer
    seen = []
    for group in found.groups:
        assert set(group) == {"input_ids", "labels", "at"}
        for ids, labels, at in zip(group["input_ids"], group["labels"], group["at"], strict=True):
            text, target = PAIRS[int(at) - 1]
            assert ids.tolist() == tokenizer("sum: " + text)["input_ids"]
            assert labels.tolist() == tokenizer(target)["input_ids"]
            assert (ids[-1], labels[-1]) == (2, 2)
            seen.append(int(at))
    assert sorted(seen) == [1, 2, 3, 4, 5]
    assert Seq2Seq().size(found) == 5
    rest = Seq2Seq().samples(model, str(pairs), 3, used=5)
    assert sorted(int(at) for group in rest.groups for at in group["at"]) == [6, 7, 8]


def test_what_is_too_long_is_cut_and_said(t5: Path, pairs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = open_model(str(t5))
    found = Seq2Seq(length=6, target_length=4).samples(model, str(pairs), 12)
    assert all(group["input_ids"].shape[1] <= 6 and group["labels"].shape[1] <= 4 for group in found.groups)
    assert all((group["input_ids"][:, -1] == 2).all() for group in found.groups)  # the end stays
    assert "texts are longer than 6 tokens, and cut there" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("source", "target"), ("question", "answer")])
def test_columns_go_by_other_names(names: tuple[str, str], t5: Path, tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(f"{names[0]},{names[1]}\na rose,red\n")
    options = {} if names[0] == "source" else {"text": "question", "target": "answer"}
    (group,) = make_task("seq2seq", options).samples(open_model(str(t5)), str(path), 1).groups
    assert group["labels"].shape[0] == 1


def test_of_plain_text_the_rest_is_to_be_written(t5: Path) -> None:
    model = open_model(str(t5))
    task = Seq2Seq(length=16, target_length=9, prefix="go on: ")
    (group,) = task.samples(model, "pydoc", 3).groups
    assert group["input_ids"].shape == (3, 16)
    assert group["labels"].shape == (3, 9)
    prefix = model.tokenizer("go on: ", add_special_tokens=False)["input_ids"]
    read = 16 - len(prefix) - 1
    from prunella.calibrate import tokenized
    from prunella.texts import documents

    ids = tokenized(model.tokenizer, documents("pydoc"), 3 * (read + 8))
    for n in range(3):
        text = ids[n * (read + 8) : (n + 1) * (read + 8)]
        assert group["input_ids"][n].tolist() == [*prefix, *text[:read], 2]
        assert group["labels"][n].tolist() == [*text[read:], 2]
    size = task.size(Samples.of(group))
    assert size == 3 * (read + 8)
    (after,) = task.samples(model, "pydoc", 1, used=size).groups  # held out: none of it was read or written
    assert after["input_ids"][0, len(prefix) : -1].tolist() == ids[size : size + read]
    (shorter,) = Seq2Seq(length=8, target_length=5).samples(model, "pydoc", 1, used=size).groups
    assert shorter["input_ids"][0, :-1].tolist() == ids[size : size + 7]


def test_a_table_without_targets_is_text(t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(json.dumps({"text": "A garden wants care. " * 30}) + "\n")
    (group,) = Seq2Seq(length=12, target_length=6).samples(open_model(str(t5)), str(path), 2).groups
    assert len(group["labels"]) == 2
    assert "has no 'target': the beginning of each text is read, the rest is to be written" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize("kind", ALL)
def test_the_loss_is_the_models_own(kind: str) -> None:
    net, task, (batch, _) = network(kind), Seq2Seq(), samples_of().groups
    with torch.no_grad():
        found = task.losses(task.run(net, batch), batch)
        for n in range(3):
            one = {key: tensor[n : n + 1] for key, tensor in batch.items()}
            assert found[n].item() == pytest.approx(net(**one).loss.item(), rel=1e-5)
            (part,) = task.parts(lambda one=one: task.run(net, one), one)
            assert part.item() == pytest.approx(found[n].item(), rel=1e-5)


def test_a_network_that_says_only_what_its_decoder_begins_with_is_shifted_all_the_same() -> None:
    labels = torch.tensor([[5, 6, 2]])
    plain = torch.nn.Module()
    plain.config = t.BartConfig(**{**BART, "decoder_start_token_id": 7})
    assert shifted_right(plain, labels).tolist() == [[7, 5, 6]]
    plain.config.decoder_start_token_id = plain.config.bos_token_id = None
    with pytest.raises(ModelError, match="has no decoder_start_token_id"):
        shifted_right(plain, labels)


def test_scores_count_target_tokens_and_not_samples() -> None:
    task, samples, net = Seq2Seq(), samples_of(), network()
    model = prunella.Task.wrap(task, net)
    losses, answers = [1.0, 1.0, 1.0, 3.0, 3.0, 3.0], []
    for batch in samples.groups:
        outputs = task.run(net, batch)
        answers.append(task.answers(outputs, batch))
        assert answers[-1]["right"].tolist() == (outputs.logits.argmax(2) == batch["labels"]).sum(1).tolist()
    answered = {key: torch.cat([one[key] for one in answers]) for key in answers[0]}
    found = task.scores(model, samples, losses, answered)
    assert found["right"] == answered["right"].sum().item() / 24
    mean = torch.tensor((15 * 1.0 + 9 * 3.0) / 24)
    assert found["target perplexity"] == pytest.approx(mean.exp().item())
    assert (found["tokens"], found["samples"]) == (24, 6)
    assert Seq2Seq().scores(model, samples, []) == {"target perplexity": None}


def test_two_models_that_say_the_same_do_not_diverge() -> None:
    task, (batch, _) = Seq2Seq(), samples_of().groups
    one, other = (task.run(network(kind).requires_grad_(), batch) for kind in ("bart", "pegasus"))
    assert task.divergence(one, one, batch).item() == pytest.approx(0, abs=1e-6)
    p, q = (out.logits.flatten(0, 1).log_softmax(1) for out in (other, one))
    assert task.divergence(one, other, batch).item() == pytest.approx(
        (p.exp() * (p - q)).sum(1).mean().item(), rel=1e-4
    )


# ---------------------------------------------------------------------------------------------------------
# Pruned


@pytest.mark.parametrize("kind", ALL)
def test_both_stacks_are_replayed_exactly_from_files_too(kind: str, tmp_path: Path) -> None:
    path = saved(kind, tmp_path / "model")
    loaded, samples = t.AutoModelForSeq2SeqLM.from_pretrained(path), samples_of()
    for whole, model in ((network(kind), Seq2Seq().wrap(network(kind))), (loaded, open_model(str(path)))):
        assert len(model.stacks) == 2
        stream = Stream(model, samples)
        for _, block in model.walk():
            stream.advance(block)
        for number, batch in enumerate(stream.batches):
            with torch.no_grad(), model.outside():
                found = stream.outputs(number).logits
                assert torch.equal(found, Seq2Seq().run(whole, batch).logits)


@pytest.mark.parametrize("kind", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(steps))
def test_every_step_prunes_both_stacks(name: str, kind: str) -> None:
    before = [] if steps[name].prunes else ["wanda"]
    net = network(kind)
    recipe = {"steps": [*before, name], "evaluate": {"source": None}, "calibration": {"min_tokens": 1}}
    report = prunella.prune(net, recipe, calibration=samples_of())
    assert report.sparsity == pytest.approx(0.5, abs=0.03)
    names = {layer.name.split(".layers.")[0].split(".block.")[0].rpartition(".")[2] for layer in report.layers}
    assert names == {"encoder", "decoder"}
    for layer in report.layers:
        weight = net.get_submodule(layer.name).weight
        assert (weight == 0).float().mean().item() >= layer.sparsity - 1e-6  # gptq rounds some to zero
    assert report.recipe["task"] == {"seq2seq": {}}


@pytest.mark.parametrize("name", sorted(allocations))
def test_every_allocation_spreads_over_both(name: str) -> None:
    recipe = {"steps": ["wanda"], "allocate": name, "evaluate": {"source": None}, "calibration": {"min_tokens": 1}}
    report = prunella.prune(network(), recipe, calibration=samples_of())
    assert report.sparsity == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("kind", ["t5", "bart", pytest.param("marian", marks=pytest.mark.slow)])
def test_a_directory_is_pruned_and_loads_where_the_original_loaded(
    kind: str, tmp_path: Path, pairs: Path, run: Callable[..., Any]
) -> None:
    path, out = saved(kind, tmp_path / "model"), tmp_path / "out"
    words = ("--samples", 6, "--calibration", pairs, "--windows", 3, "--step", "sparsegpt", "--pattern", "2:4")
    done = run("prune", path, "-o", out, *words, "--evaluate", pairs)
    assert done.code == 0, done.err
    assert "target perplexity" in done.out
    report = prunella.Report.read(out)
    assert report.recipe["task"] == {"seq2seq": {}}
    assert report.sparsity == pytest.approx(0.5, abs=0.02)  # T5's table of relative positions is in a block
    assert report.pruned["target perplexity"] != report.dense["target perplexity"]
    loaded = t.AutoModelForSeq2SeqLM.from_pretrained(out)
    masks = prunella.read_masks(out)
    for name, mask_OI in masks.items():
        weight_OI = loaded.get_submodule(name).weight
        assert (weight_OI[~mask_OI] == 0).all()
        assert (mask_OI.view(len(mask_OI), -1, 4).sum(2) == 2).all()
    in_memory = network(kind)
    recipe = {**report.recipe, "evaluate": {"source": None}, "device": "auto", "dtype": "auto"}
    again = prunella.prune(in_memory, recipe, tokenizer=t.AutoTokenizer.from_pretrained(path))
    assert again.layers == report.layers
    found, expected = loaded.state_dict(), in_memory.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert report.dense["sample"]


def test_a_fresh_machine_needs_no_data(t5: Path, tmp_path: Path) -> None:
    recipe = {"steps": ["wanda"], "calibration": {"samples": 4, "length": 16}, "evaluate": {"windows": 2, "length": 16}}
    report = prunella.prune(str(t5), recipe, output=tmp_path / "out")
    assert report.recipe["calibration"] == {"source": "pydoc", "samples": 4, "length": 16, "min_tokens": 32}
    assert report.pruned["samples"] == 2


def test_a_bfloat16_model_is_pruned_as_it_is(tmp_path: Path) -> None:
    net = network("t5").bfloat16()
    report = prunella.prune(net, {"steps": ["sparsegpt"], "evaluate": {"source": None}}, calibration=samples_of())
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    assert net.dtype == torch.bfloat16


# ---------------------------------------------------------------------------------------------------------
# What is refused


def test_what_does_not_fit_is_refused_in_one_line(t5: Path, llama: Path, tmp_path: Path, pairs: Path) -> None:
    model = open_model(str(t5))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a", "target": "b"}\n{"text": "a", "target": 3}\n{"text": "", "target": "b"}\n')

    def refused(message: str, call: Callable[[], Any], kind: type[Exception] = InputError) -> None:
        with pytest.raises(kind, match=message) as error:
            call()
        assert "\n" not in str(error.value)

    def taken(**group: Any) -> Callable[[], Any]:
        wanda = {"steps": ["wanda"], "evaluate": {"source": None}}
        return lambda: prunella.prune(network("bart"), wanda, calibration=Samples.of(group))

    ids = torch.full((2, 6), 5)
    refused("line 2: 'target' is no text that says something", lambda: Seq2Seq().samples(model, str(bad), 3))
    refused("line 3: 'text' is no text", lambda: Seq2Seq().samples(model, str(bad), 1, used=2))
    refused("holds 12 pairs, but 13 are asked for", lambda: Seq2Seq().samples(model, str(pairs), 13))
    refused(
        "holds after the first 10 of it, which are held out, 2",
        lambda: Seq2Seq().samples(model, str(pairs), 3, used=10),
    )
    refused("knows no languages: leave src_lang out", lambda: Seq2Seq(source_lang="de").samples(model, str(pairs), 1))
    refused(
        "no room for text beside the prefix", lambda: Seq2Seq(length=4, prefix="so much").samples(model, "pydoc", 1)
    )
    refused(
        "2 tokens to read and 128 to write: both are between 4", lambda: Seq2Seq(length=2).samples(model, "pydoc", 1)
    )
    refused("samples of seq2seq are `input_ids` and `labels`; these are pixel_values", taken(pixel_values=ids))
    refused(r"hold the tokens to write, `labels` \(n, M\) of integers", taken(input_ids=ids))
    refused("these samples are padded", taken(input_ids=ids, labels=torch.where(ids > 9, ids, -100)))
    refused("these samples are padded", taken(input_ids=ids, labels=ids, attention_mask=ids * 0))
    refused("token 320 lies outside the model's vocabulary", taken(input_ids=ids, labels=ids + 315))
    refused(
        "texts of 65 tokens are longer than the 64 positions", taken(input_ids=ids[:, :1].expand(2, 65), labels=ids)
    )
    refused("to write of 65 tokens are longer than the 64", taken(input_ids=ids, labels=ids[:, :1].expand(2, 65)))
    refused(
        "is no encoder-decoder: llama is one network from end to end",
        lambda: open_model(str(llama), "seq2seq"),
        ModelError,
    )
    refused(
        "t5 is an encoder and a decoder. Another task may take it", lambda: prunella.load_model(str(t5)), ModelError
    )
