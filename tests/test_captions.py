"""Models of pictures and text, on pictures: both of their stacks are pruned, what they read is what they are asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers as t
from PIL import Image

import prunella
from prunella import InputError, Model, ModelError, open_model
from prunella.registry import steps
from prunella.samples import Samples
from prunella.stream import Stream
from prunella.tasks import task_of
from prunella.tasks.captions import Captions

WORDS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 256,
    "vocab_size": 340,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EYES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
SIZE = {"height": 32, "width": 32}


def tokenizer(folder: Path, *special: str) -> Any:
    folder.mkdir(exist_ok=True)
    tiny.write_tokenizer(folder, bos=True)
    (folder / "chat_template.jinja").unlink()
    made = t.AutoTokenizer.from_pretrained(folder)
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def llava(folder: Path) -> tuple[Any, Any]:
    words = tokenizer(folder, "<image>")
    eyes = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIZE)
    processor = t.LlavaProcessor(
        eyes,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**EYES),
        text_config=t.LlamaConfig(**WORDS),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    return t.LlavaForConditionalGeneration(config), processor


def paligemma(folder: Path) -> tuple[Any, Any]:
    eyes = t.SiglipImageProcessor(size=SIZE)
    eyes.image_seq_length = 16
    processor = t.PaliGemmaProcessor(eyes, tokenizer(folder, "<image>"))
    config = t.PaliGemmaConfig(
        vision_config=t.SiglipVisionConfig(**EYES, projection_dim=16),
        text_config=t.GemmaConfig(**WORDS | {"vocab_size": len(processor.tokenizer) + 5}),
        image_token_index=processor.image_token_id,
        projection_dim=16,
        hidden_size=16,
    )
    return t.PaliGemmaForConditionalGeneration(config), processor


def idefics3(folder: Path) -> tuple[Any, Any]:
    words = tokenizer(folder, "<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    eyes = t.Idefics3ImageProcessor(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    template = (
        "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] }}{% endfor %}<end_of_utterance>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    processor = t.Idefics3Processor(eyes, words, image_seq_len=4, chat_template=template)
    config = t.Idefics3Config(
        vision_config=dict(EYES),
        text_config=t.LlamaConfig(**WORDS | {"vocab_size": 360}),
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    return t.Idefics3ForConditionalGeneration(config), processor


def qwen2_vl(folder: Path) -> tuple[Any, Any]:
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    words = tokenizer(folder, *names)
    image, video, start, end = map(words.convert_tokens_to_ids, names)
    eyes = t.Qwen2VLImageProcessor(min_pixels=32 * 32, max_pixels=64 * 64, patch_size=8, merge_size=2)
    processor = t.Qwen2VLProcessor(eyes, words, t.Qwen2VLVideoProcessor(patch_size=8, merge_size=2))
    config = t.Qwen2VLConfig(
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 16,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        text_config=WORDS
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    return t.Qwen2VLForConditionalGeneration(config), processor


KINDS: dict[str, Callable[[Path], tuple[Any, Any]]] = {
    "llava": llava,
    "paligemma": paligemma,
    "idefics3": idefics3,
    "qwen2_vl": qwen2_vl,
}


def made(kind: str, folder: Path) -> tuple[Any, Any]:
    torch.manual_seed(0)
    network, processor = KINDS[kind](folder)
    with torch.no_grad():
        for parameter in network.parameters():  # what is zero, one or tiny at first would hide mistakes
            parameter += 0.05 * torch.randn(parameter.shape)
    return network.eval(), processor


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny one of each kind, in a directory. Read only."""
    root = tmp_path_factory.mktemp("captions")
    for kind in KINDS:
        network, processor = made(kind, root / kind)
        network.save_pretrained(root / kind)
        processor.save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures of one color and a table of them."""
    rows = []
    for n in range(6):
        Image.new("RGB", (40 + 8 * (n % 2), 40), (40 * n, 100, 200 - 30 * n)).save(tmp_path / f"{n}.png")
        rows.append({"image": f"{n}.png", "text": ("a wall", "a red wall in the sun")[n % 2]})
    (tmp_path / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "pictures.jsonl"


def in_memory(kind: str, folder: Path) -> Model:
    network, processor = made(kind, folder)
    return Captions().wrap(network, processor)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_walked_stack_after_stack_exactly(kind: str, models: dict[str, Path], pictures: Path) -> None:
    assert task_of(str(models[kind])) == {"captions": {}}
    model = open_model(str(models[kind]))
    samples = Captions().samples(model, str(pictures), 5)
    stream = Stream(model, samples)
    assert len(model.stacks) >= 2
    assert any("language_model" in stack[0] or "text_model" in stack[0] for stack in model.stacks)
    assert any("vis" in stack[0] for stack in model.stacks)
    for _, block in model.walk():
        stream.advance(block)
    whole = t.AutoModelForImageTextToText.from_pretrained(models[kind])
    for number, batch in enumerate(stream.batches):
        with torch.no_grad(), model.outside():
            assert torch.equal(stream.outputs(number).logits, Captions().run(whole, batch).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_of_the_text_alone(kind: str, models: dict[str, Path], pictures: Path) -> None:
    """What the network itself says with the prompt's labels hidden."""
    model = open_model(str(models[kind]))
    whole = t.AutoModelForImageTextToText.from_pretrained(models[kind])
    task = Captions()
    words = model.tokenizer.tokenizer
    for group in task.samples(model, str(pictures), 2).groups:
        labels, ids = group["labels"], group["input_ids"]
        asked = labels != -100
        assert torch.equal(labels[:, :-1][asked[:, :-1]], ids[:, 1:][asked[:, :-1]])
        said = words.decode(labels[asked], skip_special_tokens=True)
        assert said.strip() in ("a wall", "a red wall in the sun")
        own = torch.full_like(ids, -100)
        own[:, 1:] = torch.where(asked[:, :-1], ids[:, 1:], -100)
        with torch.no_grad():
            outputs = task.run(whole, group)
            losses = task.losses(outputs, group)
        logits = outputs.logits[:, :-1].float()
        found = torch.nn.functional.cross_entropy(logits.transpose(1, 2), own[:, 1:], reduction="none").sum(1)
        torch.testing.assert_close(losses, found / (own[:, 1:] != -100).sum(1))


@pytest.mark.parametrize("kind", ["qwen2_vl", pytest.param("llava", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", sorted(steps))
def test_every_step_prunes_both_stacks(name: str, kind: str, tmp_path: Path, pictures: Path) -> None:
    before = [] if steps[name].prunes else ["wanda"]
    model = in_memory(kind, tmp_path / "model")
    samples = Captions().samples(model, str(pictures), 4)
    recipe = {"steps": [*before, name], "evaluate": {"source": None}, "calibration": {"min_tokens": 1}}
    report = prunella.prune(model, recipe | {"task": "captions"}, calibration=samples)
    assert report.sparsity == pytest.approx(0.5, abs=0.03)
    for stack in model.stacks:
        assert any(layer.name.startswith(stack[-1]) and layer.sparsity > 0 for layer in report.layers)


def test_a_directory_is_pruned_and_loads_where_the_original_loaded(
    models: dict[str, Path], pictures: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    out = tmp_path / "out"
    words = ("--calibration", pictures, "--samples", 4, "--evaluate", pictures, "--windows", 2, "--step", "sparsegpt")
    done = run(
        "prune",
        models["idefics3"],
        "-o",
        out,
        *words,
        "--pattern",
        "2:4",
        "--skip",
        "patch_embedding",
        "--set",
        "captions.prompt=What is it?",
    )
    assert done.code == 0, done.err
    report = prunella.Report.read(out)
    assert report.recipe["task"] == {"captions": {"prompt": "What is it?"}}
    assert report.pruned["target perplexity"] != report.dense["target perplexity"]
    loaded = t.AutoModelForImageTextToText.from_pretrained(out)
    masks = prunella.read_masks(out)
    assert {name.split(".")[1] for name in masks} >= {"vision_model", "text_model"}
    for name, mask_OI in masks.items():
        weight = loaded.get_submodule(name).weight
        assert (weight.reshape(mask_OI.shape)[~mask_OI] == 0).all() if weight.ndim == 2 else True
    assert t.AutoProcessor.from_pretrained(out).image_seq_len == 4  # came along


def test_a_fresh_machine_needs_no_pictures(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = {"steps": ["wanda"], "calibration": {"samples": 3}, "evaluate": {"windows": 2}}
    report = prunella.prune(str(models["llava"]), recipe, output=tmp_path / "out")
    assert report.recipe["calibration"]["source"] == "photos"
    assert report.dense["right"] == 1.0
    assert report.pruned["target perplexity"] > report.dense["target perplexity"]


def test_what_sees_the_text_that_follows_is_refused(tmp_path: Path, pictures: Path) -> None:
    model = in_memory("llava", tmp_path / "model")
    samples = Captions().samples(model, str(pictures), 4)
    for layer in model.network.model.language_model.layers:
        layer.self_attn.is_causal = False
        forward = layer.forward
        layer.forward = lambda x, forward=forward, **given: forward(x, **{**given, "attention_mask": None})
    with pytest.raises(ModelError, match="reads a text from both sides: what its block"):
        Stream(model, samples)


def test_what_does_not_fit_is_refused_in_one_line(
    models: dict[str, Path], llama: Path, tmp_path: Path, pictures: Path
) -> None:
    model = open_model(str(models["llava"]))

    def refused(message: str, call: Callable[[], Any], kind: type[Exception] = InputError) -> None:
        with pytest.raises(kind, match=message) as error:
            call()
        assert "\n" not in str(error.value)

    def read(source: Any, count: int | None = 1, **options: Any) -> Callable[[], Any]:
        return lambda: Captions(**options).samples(model, str(source), count)

    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"image": "none.png", "text": "a"}\n')
    refused(r"line 1: there is no '.*none.png'", read(bad))
    bad.write_text('{"text": "a"}\n')
    refused("line 1: not an object with 'image'", read(bad))
    bad.write_text('{"image": "0.png", "text": ""}\n')
    refused("line 1: 'text' is no text that says something", read(bad))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    bad.write_text('{"image": "broken.png", "text": "a"}\n')
    refused("1 of 1 pictures of .* cannot be read", read(bad))
    refused("is no table with 'image' and 'text'", read(tmp_path))
    refused("'photos' has no end", read("photos", None))
    refused("holds 6 pictures, but 7 are asked for", read(pictures, 7))
    refused("llama sees no pictures", lambda: open_model(str(llama), "captions"), ModelError)
    network = made("llava", tmp_path / "model")[0]
    refused("hand its processor over", lambda: Captions().wrap(network), ModelError)
    wrong = Samples.of({"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.ones(2, 4, dtype=torch.long)})
    wanda = {"steps": ["wanda"], "evaluate": {"source": None}, "task": "captions"}
    refused(
        "samples of captions are what the model's processor makes",
        lambda: prunella.prune(in_memory("llava", tmp_path / "m"), wanda, calibration=wrong),
    )
