"""Encoder-decoders from sound to text: Whisper, Moonshine, Speech2Text and their kin.

Sources are those of `prunella.sounds`: JSON lines with `audio` and `text`, a folder of sounds with texts beside them,
or `tones`, the default, which needs no data. Without a text the decoder is given sentences of `pydoc`, and what counts
is what the dense network says at each of their places.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, ModelError, say
from ..model.network import Model
from ..samples import Batch, Samples, in_dtype
from ..sounds import TONES, Reader, find_sounds
from .registry import register_task
from .targets import (
    IGNORED,
    UNKNOWN,
    Targets,
    built_for,
    check_labels,
    enough,
    has_end,
    load_processor,
    of_network,
    reaching,
    sentences,
    taken,
)

WORDS = 12  # of a sentence that a decoder is given where nobody says what a sound says


@register_task("speech")
class Speech(Targets):
    """Networks that write down what is said, on sounds and their texts."""

    source = TONES
    argument = "input_features"
    auto = "AutoModelForSpeechSeq2Seq"
    kind = "encoder-decoder from sound to text"

    def __init__(self, *, language: str = ""):
        """
        Args:
            language: of the texts, as the model's tokenizer calls it (Whisper: english), where it knows several.
        """
        self.spoken = language

    @classmethod
    def claims(cls, name: str, config: Mapping[str, Any]) -> bool:
        return bool(config.get("is_encoder_decoder")) and built_for("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", config)

    def admit(self, name: str, config: Any) -> None:
        if not config.is_encoder_decoder:
            raise ModelError(
                f"'{name}' is no {self.kind}: {config.model_type} is one network from end to end. What has no task"
                " of its own, an encoder with CTC say, is pruned as a module (task module)."
            )

    def load_processor(self, directory: Path, name: str, remote_code: bool) -> Any:
        return load_processor(directory, name, remote_code)

    # --- samples

    def samples(
        self, model: Model, source: str, count: int | None, *, used: int = 0, seed: int = 0, test: bool = False
    ) -> Samples:
        processor = model.tokenizer
        features, tokenizer = (getattr(processor, part, None) for part in ("feature_extractor", "tokenizer"))
        if features is None or tokenizer is None:
            raise InputError(
                f"model '{model.name}' has no processor of sounds and texts (preprocessor_config.json and a tokenizer):"
                " take them from the model that it was trained from."
            )
        has_end(source, count, TONES)
        read, found = Reader(source, features.sampling_rate), list[Batch]()
        longest = getattr(features, "n_samples", None)  # numbers in a sound that the model hears, as Whisper's 30 s
        long, texts = 0, sentences(WORDS)
        for number, sound in enumerate(find_sounds(source, seed, "test" if test else "train"), 1):
            if number <= used:
                next(texts)
                continue
            heard = read(sound)
            if heard is not None and source == TONES:
                heard = heard[:longest]
            if heard is not None and longest is not None and len(heard) > longest:
                long += 1  # its text says more than is heard
            elif heard is not None:
                one = self._heard(model, features, heard)
                said = self._said(model, tokenizer, sound.text, sound.name, next(texts))
                found.append(reaching(one | said, number))
            if len(found) == count:
                break
        read.tell()
        if long and longest is not None:
            say(f"{long} sounds are longer than the {longest / read.rate:g} s that the model hears, and are left out")
        enough(len(found), count, used, source, "sounds")
        return Samples.gathered(found)

    def _heard(self, model: Model, features: Any, sound: Any) -> dict[str, Tensor]:
        """What the network is called with for a sound, but for the decoder."""
        return taken(model.network, features(sound, sampling_rate=features.sampling_rate, return_tensors="pt"))

    def _said(self, model: Model, tokenizer: Any, text: str | None, name: str, otherwise: str) -> dict[str, Tensor]:
        """What the decoder is given, and what it is to write; of no text, what it is given."""
        if self.spoken:
            if not hasattr(tokenizer, "set_prefix_tokens"):
                raise InputError("the tokenizer of this model knows no languages: leave language out.")
            tokenizer.set_prefix_tokens(language=self.spoken, task="transcribe")
        start = getattr(model.network.config, "decoder_start_token_id", None)
        ids: list[int] = list(tokenizer(otherwise if text is None else text)["input_ids"])
        ids = ids if start is None or ids[0] == start else [start, *ids]
        limit = getattr(model.network.config, "max_target_positions", None)
        if text is None:
            ids = ids[:limit]
        if limit is not None and len(ids) > limit:
            raise InputError(
                f"the text of {name} is {len(ids)} tokens long, and the model writes {limit}: leave it out."
            )
        given = torch.tensor([ids[:-1]])
        special = set(tokenizer.all_special_ids)
        asked = [IGNORED if all(i in special for i in ids[: n + 1]) else ids[n] for n in range(1, len(ids))]
        if text is None:
            asked = [label if label == IGNORED else UNKNOWN for label in asked]
        return {"decoder_input_ids": given, "labels": torch.tensor([asked])}

    def example(self, network: Any) -> Batch:
        config = network.config
        size = min(8, config.vocab_size)
        given = {"decoder_input_ids": torch.arange(size - 5, size)[None]}
        if network.main_input_name != "input_features":
            return {network.main_input_name: torch.zeros(1, 4000), **given}
        if hasattr(config, "input_feat_per_channel"):
            return {"input_features": torch.zeros(1, 64, config.input_feat_per_channel), **given}
        return {"input_features": torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions), **given}

    def check(self, model: Model, samples: Samples) -> None:
        wanted = model.network.main_input_name
        for group in samples.groups:
            if wanted not in group or "decoder_input_ids" not in group:
                raise InputError(
                    f"samples of speech are `{wanted}`, `decoder_input_ids` and `labels`; these are {', '.join(group)}."
                )
            check_labels(self, model, {"labels": group["decoder_input_ids"]})
            expected = getattr(model.network.config, "max_source_positions", None)
            frames = group[wanted].shape[-1]
            if hasattr(model.network.config, "num_mel_bins") and expected is not None and frames != 2 * expected:
                raise InputError(
                    f"sounds of {frames} frames, where the model takes {2 * expected}, silence at the end."
                )
        super().check(model, samples)

    # --- what the network makes of them

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
        given = in_dtype(of_network(batch), getattr(network, "dtype", torch.float32))
        return network(**given, use_cache=False, **options)
