"""What a run measures before and after: perplexity on held-out text, and a sample of what the model writes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..calibrate import check_tokens, check_windows, context, positions, text_tokens, windows, with_bos
from ..errors import InputError
from ..machine import free_memory
from ..model.checkpoint import Source
from ..model.network import Model
from ..progress import Track
from ..recipe import Recipe
from ..texts import same_text
from .perplexity import perplexity

if TYPE_CHECKING:
    from ..save import Output

PROMPT = "The most important thing about a garden is"


def window_length(model: Model, length: int | None) -> int:
    """What a recipe leaves open: 2048 tokens, or the context if that is shorter."""
    return length if length is not None else min(2048, context(model))


def held_out_windows(model: Model, recipe: Recipe, used: int) -> Tensor | None:
    """The windows to evaluate on: none that holds text of the calibration, which is at most `used` tokens."""
    wanted = recipe.evaluate
    if wanted.source is None or model.tokenizer is None:
        return None
    length = window_length(model, wanted.length)
    skip = 0
    if same_text(recipe.calibration.source, wanted.source):
        skip = -(-used // text_tokens(model, length, recipe.bos))
    options: dict[str, Any] = {"skip": skip, "seed": recipe.seed, "bos": recipe.bos}
    found_NL = windows(model, wanted.source, wanted.windows, length, split="test", **options)
    check_windows(model, found_NL)
    return found_NL


def whole_name(source: str) -> str:
    """A source as it can be found from anywhere."""
    return os.path.abspath(source) if Path(source).is_file() else source


def measure(
    model: Model, recipe: Recipe, ids_NL: Tensor | None, checkpoint: Source | None, track: Track
) -> dict[str, Any]:
    """Perplexity on held-out windows and a sample of text; of the weights in `checkpoint`, if one is given. `text` says
    which windows they were, `bos` whether each begins with a BOS."""
    if ids_NL is None:
        return {"perplexity": None, "sample": None}
    result = perplexity(model, ids_NL, checkpoint=checkpoint, track=track).as_dict()
    said = {"source": recipe.evaluate.source, "text": digest(ids_NL), "bos": with_bos(model, ids_NL)}
    return {**said, **result, "sample": _sample(model, checkpoint)}


def measure_once(
    out: Output | None,
    side: str,
    model: Model,
    recipe: Recipe,
    ids_NL: Tensor | None,
    checkpoint: Source | None,
    track: Track,
) -> dict[str, Any]:
    """As `measure`; a run that resumes does not measure the same side (dense, pruned, …) on the same windows again."""
    key = side if ids_NL is None else f"{side} on {digest(ids_NL)}"
    found = out.notes.get(key) if out else None
    if found is None:
        found = measure(model, recipe, ids_NL, checkpoint, track)
        if out and ids_NL is not None:
            out.note(key, found)
    return dict(found)


def digest(ids_NL: Tensor) -> str:
    """The same for the same windows, and for no others."""
    return hashlib.sha256(f"{tuple(ids_NL.shape)}".encode() + ids_NL.cpu().numpy().tobytes()).hexdigest()[:16]


def room(model: Model, prompt_BL: Tensor, tokens: int) -> int:
    """How many of `tokens` the model can put behind a prompt. Raises InputError where it cannot read even that."""
    check_tokens(model, prompt_BL, "prompts")
    limit = positions(model)  # the last token is written, but not read
    return tokens if limit is None else min(tokens, limit - prompt_BL.shape[1] + 1)


def _sample(model: Model, checkpoint: Source | None, tokens: int = 24) -> str | None:
    """A greedy continuation of a fixed prompt, where the whole model fits comfortably in memory."""
    size = model.parameters * model.dtype.itemsize
    if model.checkpoint is not None and size > free_memory(model.device) // 3:
        return None
    inputs = model.tokenizer(PROMPT, return_tensors="pt").to(model.device)
    try:
        tokens = room(model, inputs.input_ids, tokens)
    except InputError:  # a prompt that this model cannot read
        return None
    with model.whole(checkpoint) as network, torch.no_grad():
        ids = network.generate(
            inputs.input_ids,
            attention_mask=inputs.attention_mask,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=model.tokenizer.pad_token_id or model.tokenizer.eos_token_id or 0,
        )
    text: str = model.tokenizer.decode(ids[0], skip_special_tokens=True)
    return " ".join(text.split())
