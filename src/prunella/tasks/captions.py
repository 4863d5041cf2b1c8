"""Models of pictures and text (LLaVA, Qwen2-VL, PaliGemma, SmolVLM, Idefics and their kin), on pictures and texts.

A source is JSON lines (or another table, or `hf:`) with `image`, a path from the folder of that file, and `text`; or
`photos`, the default, which needs no data. Without a text the decoder is given sentences of `pydoc`, and what counts is
what the dense network says at each of their places. The vision tower is pruned first, then the decoder.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, ModelError, first_line
from ..model.network import Model
from ..photos import PHOTOS
from ..pictures import Found, Picture, find_pictures, read_pictures, stored
from ..samples import Batch, Samples, in_dtype
from ..texts import is_prose, not_empty, records
from .registry import register_task
from .targets import (
    IGNORED,
    UNKNOWN,
    Targets,
    built_for,
    enough,
    has_end,
    load_processor,
    of_network,
    reaching,
    sentences,
    taken,
)
from .text import demand_causal

WORDS = 12  # of a sentence that a decoder is given where nobody says what a picture shows
ROWS = "@rows"  # behind the name of an argument of which a picture has several rows, which the network gets in one list
_WRITERS = "models that write one token after the other"
_SUFFIX = ("paligemma",)  # whose processors are told apart what is given and what is to be written


@register_task("captions")
class Captions(Targets):
    """Models that write about pictures, on pictures and texts."""

    source = PHOTOS
    auto = "AutoModelForImageTextToText"
    kind = "model of pictures and text"

    def __init__(self, *, prompt: str = "Describe the picture."):
        """
        Args:
            prompt: what the model is asked about each picture.
        """
        self.prompt = prompt
        self.processor: Any = None

    @classmethod
    def claims(cls, name: str, config: Mapping[str, Any]) -> bool:
        """What has pictures and is no causal language model besides, which `text` prunes the decoder of."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

        return (
            built_for("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", config) and config.get("model_type") not in CAUSAL
        )

    def admit(self, name: str, config: Any) -> None:
        if not hasattr(config, "vision_config"):
            raise ModelError(
                f"'{name}' is no {self.kind}: {config.model_type} sees no pictures. Leave --task out, and its"
                " config says what it is for."
            )

    def load_processor(self, directory: Path, name: str, remote_code: bool) -> Any:
        self.processor = load_processor(directory, name, remote_code)
        if self.processor is None:
            raise ModelError(
                f"'{name}' has no processor of pictures and texts (preprocessor_config.json, processor_config.json):"
                " take it from the model that it was trained from."
            )
        return self.processor

    def wrap(self, network: Any, tokenizer: Any = None, name: str = "") -> Model:
        self.processor = tokenizer
        if not hasattr(tokenizer, "image_processor"):
            raise ModelError(
                f"what makes samples of pictures for this {type(network).__name__} is not known: hand its processor"
                " over (tokenizer=AutoProcessor.from_pretrained(…))."
            )
        return super().wrap(network, tokenizer, name)

    # --- samples

    def samples(
        self, model: Model, source: str, count: int | None, *, used: int = 0, seed: int = 0, test: bool = False
    ) -> Samples:
        has_end(source, count, PHOTOS)
        texts: dict[int, str | None] = {}
        numbered: Iterator[Picture]
        if source == PHOTOS:
            found = find_pictures(PHOTOS, seed, test)
            numbered = (Picture(p.name, n, p.load) for n, p in enumerate(found.pictures))
        else:
            if is_prose(source) or Path(source).is_dir():
                raise InputError(f"'{source}' is no table with 'image' and 'text', JSON lines say, nor '{PHOTOS}'.")
            make = partial(self._of_row, folder=Path(source).parent)
            rows = records(source, make, ("image", "text"), "test" if test else "train")
            numbered = self._numbered(rows, texts)
        made, otherwise = list[Batch](), sentences(WORDS)
        kept = Found(source, numbered, None, None)
        skip = 0 if source == PHOTOS else used  # of which test pictures are others
        for number, (picture, at) in enumerate(read_pictures(kept, lambda image: image, count, skip), skip + 1):
            text = texts.get(at or 0)
            one = self._sample(model.network, model.tokenizer, picture, text, next(otherwise))
            made.append(reaching(one, number))
        enough(len(made), count, skip, source, "pictures")
        return Samples.gathered(made)

    @staticmethod
    def _numbered(rows: Iterator[tuple[Picture, str | None]], texts: dict[int, str | None]) -> Iterator[Picture]:
        """Pictures by numbers, under which their texts are noted."""
        for number, (picture, text) in enumerate(rows):
            texts[number] = text
            yield Picture(picture.name, number, picture.load)

    @staticmethod
    def _of_row(row: Any, place: str, *, folder: Path) -> tuple[Picture, str | None]:
        if not isinstance(row, Mapping) or not row.get("image"):
            raise InputError(f"{place}: not an object with 'image', the path of a picture.")
        text, image = row.get("text"), row["image"]
        text = None if text is None else not_empty(text, "text", place)
        if isinstance(image, str) and not (folder / image).is_file():
            raise InputError(f"{place}: there is no '{folder / image}'.")
        if isinstance(image, str):
            return Picture(str(folder / image), None, lambda: stored({"path": folder / image})), text
        return Picture(place, None, (lambda: stored(image)) if isinstance(image, Mapping) else (lambda: image)), text

    def _sample(self, network: nn.Module, processor: Any, picture: Any, text: str | None, otherwise: str) -> Batch:
        """A picture, what is asked, and what is to be written."""
        written = otherwise if text is None else text
        config: Any = network.config
        try:
            if config.model_type in _SUFFIX:
                asked = processor.image_token + self.prompt
                made = processor(images=picture, text=asked, suffix=written, return_tensors="pt")
                start = int((made.pop("labels")[0] == IGNORED).sum())
            else:
                head, whole = self._asked(processor, written)
                made = processor(images=[picture], text=whole, return_tensors="pt")
                before = processor(images=[picture], text=head, return_tensors="pt")["input_ids"][0].tolist()
                ids = made["input_ids"][0].tolist()
                same = (n for n, (a, b) in enumerate(itertools.zip_longest(before, ids)) if a != b)
                start = next(same, len(ids))
        except Exception as error:
            raise InputError(
                f"the processor of this {type(network).__name__} makes no sample of a picture and a text:"
                f" {first_line(error)}"
            ) from error
        ids_1L = made["input_ids"]
        labels = torch.full_like(ids_1L, IGNORED)
        labels[:, start - 1 : -1] = ids_1L[:, start:] if text is not None else UNKNOWN
        rows = {key if len(tensor) == 1 else key + ROWS: tensor for key, tensor in taken(network, made).items()}
        return {key: tensor[None] if key.endswith(ROWS) else tensor for key, tensor in rows.items()} | {
            "labels": labels
        }

    def _asked(self, processor: Any, written: str) -> tuple[str, str]:
        """What is given and, with that, what is to be written: by the processor's chat template, if it has one that
        knows of pictures."""
        if getattr(processor, "chat_template", None) is not None:
            ask = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": self.prompt}]}
            say = {"role": "assistant", "content": [{"type": "text", "text": written}]}
            head = processor.apply_chat_template([ask], add_generation_prompt=True, tokenize=False)
            if processor.image_token in head:
                return head, processor.apply_chat_template([ask, say], tokenize=False)
        head = f"{processor.image_token}\n{self.prompt} "
        return head, head + written

    def example(self, network: nn.Module) -> Batch:
        from PIL import Image

        if self.processor is None:
            raise NotImplementedError
        return self._sample(network, self.processor, Image.new("RGB", (64, 64), (90, 120, 60)), "a leaf", "")

    def check(self, model: Model, samples: Samples) -> None:
        for group in samples.groups:
            if "input_ids" not in group or group.get("labels", torch.empty(0)).shape != group["input_ids"].shape:
                shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in group.items())
                raise InputError(
                    "samples of captions are what the model's processor makes, and `labels`, for each of the"
                    f" `input_ids` the one that follows; these are {shapes}."
                )
        super().check(model, samples)

    # --- the network's blocks

    def check_block(
        self, network: nn.Module, index: int, run: Callable[[Batch], tuple[Tensor, Any]], batch: Batch, dimension: int
    ) -> None:
        """What a block makes of all but the last token must not depend on that one."""
        changed = batch["input_ids"].clone()
        changed[:, -1] = torch.where(changed[:, -1] == changed[:, -2], changed[:, -1] - 1, changed[:, -2])
        (entering, gave), (_, others) = (run({**batch, "input_ids": ids}) for ids in (batch["input_ids"], changed))
        if gave.shape != entering.shape or gave.ndim != 3 or gave.shape[1] != changed.shape[1]:
            return  # where its tokens stand cannot be told
        demand_causal(network, index, entering[:, :-1], gave[:, :-1], others[:, :-1], _WRITERS)

    # --- what the network makes of them

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
        given = in_dtype(of_network(batch), getattr(network, "dtype", torch.float32))
        given = {key.removesuffix(ROWS): t.flatten(0, 1) if key.endswith(ROWS) else t for key, t in given.items()}
        return network(**given, use_cache=False, **options)
