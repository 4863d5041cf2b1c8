"""Encoder-decoders from sound to text: sounds are read as they are, and both stacks are pruned on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny
import torch
import transformers as t

import prunella
from prunella import InputError, ModelError, open_model
from prunella.registry import steps
from prunella.samples import Samples
from prunella.sounds import Reader, find_sounds, resampled
from prunella.stream import Stream
from prunella.tasks import task_of
from prunella.tasks.speech import Speech

WHISPER: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "num_mel_bins": 8,
    "max_source_positions": 50,
    "max_target_positions": 32,
    "d_model": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 32 for side in ("encoder", "decoder")},
}
RATE = 16000


def network() -> Any:
    torch.manual_seed(0)
    built = t.WhisperForConditionalGeneration(t.WhisperConfig(**WHISPER)).eval()
    with torch.no_grad():
        for parameter in built.parameters():  # what is zero, one or tiny at first would hide mistakes
            parameter += 0.05 * torch.randn(parameter.shape)
    return built


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Whisper that hears a second. Read only."""
    path = tmp_path_factory.mktemp("speech") / "whisper"
    path.mkdir()
    tiny.write_tokenizer(path, bos=True)
    tokenizer = t.AutoTokenizer.from_pretrained(path)
    t.WhisperProcessor(t.WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer).save_pretrained(path)
    network().save_pretrained(path)
    return path


def wave(pitch: float, rate: int = RATE, seconds: float = 0.5) -> np.ndarray:
    return 0.3 * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Six sounds in a folder, a text beside each, and a table of them."""
    folder = tmp_path / "sounds"
    folder.mkdir()
    rows = []
    for n in range(6):
        kind = ("wav", "flac")[n % 2]
        soundfile.write(folder / f"{n}.{kind}", wave(200 + 50 * n), RATE)
        (folder / f"{n}.txt").write_text(f"tone number {n}\n")
        rows.append({"audio": f"sounds/{n}.{kind}", "text": f"tone number {n}"})
    (tmp_path / "sounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


# ---------------------------------------------------------------------------------------------------------
# Sounds


def test_a_folder_and_its_table_are_the_same_sounds(sounds: Path) -> None:
    one, other = (list(find_sounds(str(source))) for source in (sounds, sounds.parent / "sounds.jsonl"))
    assert [sound.text for sound in one] == [sound.text for sound in other] == [f"tone number {n}" for n in range(6)]
    for a, b in zip(one, other, strict=True):
        assert np.array_equal(a.load(RATE), b.load(RATE))


@pytest.mark.parametrize("own", [8000, 22050, 44100, 48000])
def test_sounds_of_another_rate_are_resampled(own: int) -> None:
    found = resampled(wave(440, own)[:, None], own, RATE)
    assert len(found) == RATE // 2
    inner = slice(1000, -1000)  # where the filter sees all that it wants to
    assert np.abs(found - wave(440))[inner].max() < 0.01


def test_channels_become_their_mean(tmp_path: Path) -> None:
    left, right = wave(300), wave(500)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), RATE, subtype="FLOAT")
    (sound,) = find_sounds(str(tmp_path))
    np.testing.assert_allclose(sound.load(RATE), (left + right) / 2, atol=1e-6)
    assert sound.text is None


def test_tones_are_drawn_from_the_seed() -> None:
    def first(seed: int) -> np.ndarray:
        return next(iter(find_sounds("tones", seed))).load(RATE)

    assert np.array_equal(first(0), first(0))
    assert not np.array_equal(first(0), first(1))
    assert np.abs(first(0)).max() <= 1.2
    assert first(0).dtype == np.float32


def test_what_cannot_be_read_is_left_out_and_named_or_refused(
    sounds: Path, whisper: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_model(str(whisper))
    for n in range(6, 26):
        soundfile.write(sounds / f"{n}.wav", wave(100 + n), RATE)
        (sounds / f"{n}.txt").write_text("more")
    (sounds / "0.wav").write_bytes(b"RIFF, or not")
    (sounds / "1.flac").unlink()
    soundfile.write(sounds / "1.wav", wave(1)[:0], RATE)
    samples = Speech().samples(model, str(sounds), 24)
    said = capsys.readouterr().err
    assert len(samples) == 24
    assert "2 sounds of" in said
    assert "0.wav (" in said
    assert "1.wav (it is empty)" in said
    soundfile.write(sounds / "10.wav", np.full(100, np.nan), RATE, subtype="FLOAT")
    with pytest.raises(InputError, match=r"3 sounds of .* cannot be read: .*0\.wav .*NaN"):
        Speech().samples(model, str(sounds), 23)
    reader = Reader("none", RATE)
    broken = next(iter(find_sounds(str(sounds))))
    assert [reader(broken) for _ in range(50)] == [None] * 50
    with pytest.raises(InputError, match=r"51 sounds of 'none' cannot be read: .* and 48 more"):
        reader(broken)  # enough of an endless source


def test_what_is_longer_than_the_model_hears_is_left_out(
    sounds: Path, whisper: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(sounds / "0.wav", wave(200, seconds=1.5), RATE)
    samples = Speech().samples(open_model(str(whisper)), str(sounds), 5)
    assert "1 sounds are longer than the 1 s that the model hears, and are left out" in capsys.readouterr().err
    assert len(samples) == 5


# ---------------------------------------------------------------------------------------------------------
# Samples


def test_a_model_says_that_it_is_one(whisper: Path) -> None:
    assert task_of(str(whisper)) == task_of(network()) == {"speech": {}}


def test_samples_are_what_the_processor_makes(whisper: Path, sounds: Path) -> None:
    model = open_model(str(whisper))
    processor = model.tokenizer
    samples = Speech().samples(model, str(sounds), 4)
    assert Speech().size(samples) == 4
    for group in samples.groups:
        for n, at in enumerate(group["at"].tolist()):
            path = next(path for path in sounds.glob(f"{at - 1}.*") if path.suffix != ".txt")
            heard, _ = soundfile.read(path, dtype="float32")
            expected = processor.feature_extractor(heard, sampling_rate=RATE, return_tensors="pt").input_features
            torch.testing.assert_close(group["input_features"][n], expected[0])
            ids = processor.tokenizer(f"tone number {at - 1}")["input_ids"]
            assert group["decoder_input_ids"][n].tolist() == ids[:-1]
            assert group["labels"][n].tolist() == ids[1:]
    rest = Speech().samples(model, str(sounds), 2, used=4)
    assert sorted(int(at) for group in rest.groups for at in group["at"]) == [5, 6]


def test_the_loss_is_of_the_text_and_not_of_what_stands_before_it(whisper: Path, sounds: Path) -> None:
    model = open_model(str(whisper))
    tokenizer = model.tokenizer.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["m", "u"]})  # as <|en|> is one

    class Before:
        all_special_ids = tokenizer.all_special_ids

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [1, tokenizer.convert_tokens_to_ids("m"), *tokenizer(text)["input_ids"][1:], 2]}

    found = Speech()._said(model, Before(), "so it is", "x", "")
    assert found["labels"][0, 0] == -100
    assert (found["labels"][0, 1:] >= 0).all()
    net, task = network(), Speech()
    batch = {"input_features": torch.randn(1, 8, 100), **{k: v.clamp(max=319) for k, v in found.items()}}
    with torch.no_grad():
        outputs = task.run(net, batch)
        expected = torch.nn.functional.cross_entropy(outputs.logits[0, 1:], batch["labels"][0, 1:])
    assert task.losses(outputs, batch).item() == pytest.approx(expected.item())


# ---------------------------------------------------------------------------------------------------------
# Pruned


def samples_of(lengths: Any = (5, 3)) -> Samples:
    torch.manual_seed(1)
    tokens = [torch.randint(3, tiny.VOCABULARY, (3, n + 1)) for n in lengths]
    return Samples.of(
        [
            {"input_features": torch.randn(3, 8, 100), "decoder_input_ids": ids[:, :-1], "labels": ids[:, 1:]}
            for ids in tokens
        ]
    )


def test_both_stacks_are_replayed_exactly_from_files_too(whisper: Path) -> None:
    samples, whole = samples_of(), network()
    for model in (Speech().wrap(network()), open_model(str(whisper))):
        assert [stack[0] for stack in model.stacks] == ["model.encoder.layers.0", "model.decoder.layers.0"]
        stream = Stream(model, samples)
        for _, block in model.walk():
            stream.advance(block)
        for number, batch in enumerate(stream.batches):
            with torch.no_grad(), model.outside():
                assert torch.equal(stream.outputs(number).logits, Speech().run(whole, batch).logits)


@pytest.mark.parametrize("name", sorted(steps))
def test_every_step_prunes_both_stacks(name: str) -> None:
    before = [] if steps[name].prunes else ["wanda"]
    net = network()
    recipe = {"steps": [*before, name], "evaluate": {"source": None}, "calibration": {"min_tokens": 1}}
    report = prunella.prune(net, recipe, calibration=samples_of())
    assert report.sparsity == pytest.approx(0.5, abs=0.03)
    assert {layer.name.split(".")[1] for layer in report.layers} == {"encoder", "decoder"}
    for layer in report.layers:
        assert (net.get_submodule(layer.name).weight == 0).float().mean().item() >= layer.sparsity - 1e-6


def test_a_directory_is_pruned_on_sounds_and_loads_where_the_original_loaded(
    whisper: Path, sounds: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out, table = tmp_path / "out", sounds.parent / "sounds.jsonl"
    words = ("--calibration", table, "--samples", 4, "--evaluate", table, "--windows", 2, "--step", "sparsegpt")
    done = run("prune", whisper, "-o", out, *words, "--pattern", "2:4")
    assert done.code == 0, done.err
    report = prunella.Report.read(out)
    assert report.recipe["task"] == {"speech": {}}
    assert report.pruned["samples"] == 2
    assert 1 < report.pruned["target perplexity"] != report.dense["target perplexity"]
    loaded = t.AutoModelForSpeechSeq2Seq.from_pretrained(out)
    for name, mask_OI in prunella.read_masks(out).items():
        assert (loaded.get_submodule(name).weight[~mask_OI] == 0).all()
        assert (mask_OI.view(len(mask_OI), -1, 4).sum(2) == 2).all()
    processor = t.AutoProcessor.from_pretrained(out)  # came along
    assert processor.feature_extractor.n_samples == RATE


def test_a_fresh_machine_needs_no_sounds(whisper: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = {"steps": ["wanda"], "calibration": {"samples": 4}, "evaluate": {"windows": 3}}
    report = prunella.prune(str(whisper), recipe, output=tmp_path / "out")
    assert report.recipe["calibration"]["source"] == report.recipe["evaluate"]["source"] == "tones"
    assert "3 samples come without a target: their loss is of what the dense network answers" in capsys.readouterr().err
    assert report.dense["right"] == 1.0
    assert report.pruned["right"] < 1.0
    assert report.pruned["target perplexity"] > report.dense["target perplexity"]


# ---------------------------------------------------------------------------------------------------------
# What is refused


def test_what_does_not_fit_is_refused_in_one_line(
    whisper: Path, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(str(whisper))

    def refused(message: str, call: Callable[[], Any], kind: type[Exception] = InputError) -> None:
        with pytest.raises(kind, match=message) as error:
            call()
        assert "\n" not in str(error.value)

    def read(source: Any, count: int = 1, **options: Any) -> Callable[[], Any]:
        return lambda: Speech(**options).samples(model, str(source), count)

    def taken(**group: Any) -> Callable[[], Any]:
        wanda = {"steps": ["wanda"], "evaluate": {"source": None}}
        return lambda: prunella.prune(network(), wanda, calibration=Samples.of(group))

    refused("unknown source of sounds 'tone'. Did you mean 'tones'", read("tone"))
    (tmp_path / "empty").mkdir()
    refused("holds no sounds", read(tmp_path / "empty"))
    refused("is neither a folder of sounds nor a table", read(sounds / "0.wav"))
    refused("holds 6 sounds, but 7 are asked for", read(sounds, 7))
    refused("knows no languages: leave language out", read(sounds, language="english"))
    (tmp_path / "bad.jsonl").write_text('{"audio": "none.wav", "text": "a"}\n')
    refused(r"line 1: there is no '.*none.wav'", read(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n')
    refused("line 1: not an object with 'audio'", read(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"audio": "sounds/0.wav", "text": " "}\n')
    refused("line 1: 'text' is no text that says something", read(tmp_path / "bad.jsonl"))
    (sounds / "1.txt").write_text("word " * 60)
    refused(r"the text of .*1.flac is \d+ tokens long, and the model writes 32", read(sounds, 3))
    (sounds / "1.txt").unlink()
    refused("1 of the 6 sounds in .* have no text beside them .'1.flac'", read(sounds))
    (sounds / "1.txt").write_text("")
    refused("1.txt' is empty", read(sounds, 3))
    ids = torch.full((2, 5), 7)
    refused("samples of speech are `input_features`, `decoder_input_ids`", taken(input_ids=ids))
    refused(
        "sounds of 40 frames, where the model takes 100",
        taken(input_features=torch.zeros(2, 8, 40), decoder_input_ids=ids),
    )
    refused("token 407 lies outside", taken(input_features=torch.zeros(2, 8, 100), decoder_input_ids=ids + 400))
    wav2vec = t.Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    refused(
        "wav2vec2 is one network from end to end.*task module",
        lambda: Speech().wrap(t.Wav2Vec2Model(wav2vec)),
        ModelError,
    )
    monkeypatch.setitem(__import__("sys").modules, "soundfile", None)
    (sounds / "1.txt").write_text("one")
    refused(r"need|read by the package soundfile: pip install 'prunella\[audio\]'", read(sounds))
    monkeypatch.setitem(__import__("sys").modules, "scipy.signal", None)
    refused(
        "a sound has 8000 numbers a second and the model takes 16000: resample it",
        lambda: resampled(wave(1)[:, None], 8000, RATE),
    )
