"""From a text to windows of tokens.

The documents of a source (`prunella.texts`) are joined by an empty line, the text is tokenized once and cut into
consecutive windows. Where the model's tokenizer puts a BOS before a text, each window begins with one: a model that was
never without it in training is thrown off by text that lacks it. `self` is text that the dense model samples itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import InputError, first_line, say
from .machine import cache_directory, fork_random
from .model.network import Model
from .texts import Split, documents, endless, lead

MANY = 256  # windows of a data set that is too long to be evaluated as a whole


def context(model: Model) -> int:
    """The longest window that the model takes, in tokens."""
    return getattr(model.network.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


def window_length(model: Model, length: int | None) -> int:
    """What a recipe leaves open: 2048 tokens, or the context if that is shorter."""
    return length if length is not None else min(2048, context(model))


def windows(
    model: Model,
    source: str,
    count: int,
    length: int,
    *,
    skip: int = 0,
    seed: int = 0,
    bos: bool = True,
    split: Split = "train",
) -> Tensor:
    """`count` consecutive windows of `length` tokens, (N, L) int64, after the first `skip` windows.

    Args:
        seed: of `self`.
        bos: each begins with what the tokenizer puts before a text, if anything; else none does.
        split: what a data set that goes by its usual name is wanted for.

    Raises InputError if the source is unknown, unreadable, or too short; the error says how many tokens there are.
    """
    found, tokens = _cut(model, source, skip + count if count > 0 else count, length, seed, bos, split)
    if len(found) < skip + count:
        needed = (skip + count) * text_tokens(model, length, bos)
        raise InputError(
            f"'{source}' holds {tokens:,} tokens, but {skip + count} windows of {length} take {needed:,}"
            + (f" ({skip} of them held out for calibration)" if skip else "")
            + ". Ask for fewer (--samples, --windows) or shorter (--length) windows, or give a longer text."
        )
    return found[skip:]


def all_windows(model: Model, source: str, length: int, *, bos: bool = True, split: Split = "train") -> Tensor:
    """The whole source in windows of `length` tokens, (N, L); what is left over at the end is dropped. Of a data set
    of the hub that may have no end in sight, the first 256."""
    if source == "self":
        raise InputError("the text that a model writes itself has no end: say how many windows (--windows).")
    found, _ = _cut(model, source, MANY if endless(source) else None, length, 0, bos, split)
    return found if len(found) else windows(model, source, 1, length, bos=bos, split=split)  # says what is missing


def up_to(model: Model, source: str, count: int, length: int, seed: int = 0, *, bos: bool = True) -> Tensor:
    """The first `count` windows of `length` tokens, (N, L), or as many as the source holds: maybe none."""
    return _cut(model, source, count, length, seed, bos, "train")[0]


def text_tokens(model: Model, length: int, bos: bool) -> int:
    """How many tokens of a text are in a window of this length: those that are not its BOS."""
    return length - len(lead(model.tokenizer)) if bos and model.tokenizer is not None else length


def with_bos(model: Model, windows_NL: Tensor) -> bool:
    """Does every window begin with the model's BOS?"""
    start = _opening(model.tokenizer)
    return bool(start) and bool((windows_NL[:, : len(start)].cpu() == torch.tensor(start)).all())


def _opening(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text or, if that is nothing, the BOS that it has all the same."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return (lead(tokenizer) if tokenizer is not None else []) or ([] if bos is None else [bos])


def _cut(
    model: Model, source: str, count: int | None, length: int, seed: int, bos: bool, split: Split
) -> tuple[Tensor, int]:
    """The first `count` windows of a source, or as many as there are, and how many tokens of text were read."""
    if length < 2 or (count is not None and count < 1):
        shown = "all" if count is None else count
        raise InputError(f"{shown} windows of {length} tokens: at least 1 window of 2 tokens is needed.")
    limit = context(model)
    if length > limit:
        raise InputError(f"windows of {length} tokens are longer than the model's context of {limit}.")
    if source == "self":
        assert count is not None
        return sample_self(model, count, length, seed, bos=bos), count * length
    if model.tokenizer is None:
        raise InputError(f"model '{model.name}' has no tokenizer, so the text of '{source}' cannot be used.")
    start = lead(model.tokenizer) if bos else []
    own = length - len(start)
    if own < 1:
        raise InputError(f"windows of {length} tokens have no room for text: the tokenizer begins with {len(start)}.")
    needed = None if count is None else count * own
    ids = tokenized(model.tokenizer, documents(source, model.tokenizer, split), needed)
    found = len(ids) // own if count is None else min(count, len(ids) // own)
    text_NT = torch.tensor(ids[: found * own], dtype=torch.int64).view(found, own)
    return torch.cat([torch.tensor(start, dtype=torch.int64).expand(found, -1), text_NT], 1), len(ids)


def check_windows(model: Model, windows_NL: Tensor) -> None:
    """Raises InputError for what is no windows of the model's token ids, (N, L)."""
    if windows_NL.ndim != 2 or not windows_NL.numel() or windows_NL.is_floating_point():
        raise InputError(
            f"windows are {str(windows_NL.dtype)[6:]} of shape {tuple(windows_NL.shape)}, expected token"
            " ids as integers of shape (N, L)."
        )
    check_tokens(model, windows_NL, "windows")


def check_tokens(model: Model, ids: Tensor, what: str) -> None:
    """Raises InputError for token ids, (N, L), that the model has no embedding or no position for."""
    embedding = model.network.get_input_embeddings()
    size = getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise InputError(
            f"token {low if low < 0 else high} lies outside the model's vocabulary of {size:,}: the tokenizer or the"
            " token ids are those of another model."
        )
    limit = positions(model)
    if limit is not None and ids.shape[1] > limit:
        raise InputError(
            f"{what} of {ids.shape[1]} tokens are longer than the {limit} positions that the model has learned: use"
            " fewer tokens."
        )


def positions(model: Model) -> int | None:
    """How many tokens a model can place that has learned an embedding for every position; None for any other."""
    size, words = context(model), model.network.get_input_embeddings()
    for module in model.network.modules():  # the table may begin with a few rows for padding
        if isinstance(module, nn.Embedding) and module is not words and 0 <= module.num_embeddings - size < 8:
            padding = module.padding_idx if module.num_embeddings == size else None  # RoBERTa counts from there
            return size if padding is None else size - padding - 1
    return None


def room(model: Model, prompt_BL: Tensor, tokens: int) -> int:
    """How many of `tokens` the model can put behind a prompt. Raises InputError where it cannot read even that."""
    check_tokens(model, prompt_BL, "prompts")
    limit = positions(model)  # the last token is written, but not read
    return tokens if limit is None else min(tokens, limit - prompt_BL.shape[1] + 1)


def tokenized(tokenizer: Any, docs: Iterator[str], needed: int | None) -> list[int]:
    """Token ids of the joined documents: all of them, or at least `needed` where there are that many.

    Only as much text is read as it takes. Tokenizing the beginning of a text gives the beginning of its
    tokens, up to a word at the cut; a margin keeps that word out.
    """
    text, chars, exhausted = "", sys.maxsize if needed is None else needed * 6, False
    while True:
        parts = [text] if text else []
        size = len(text)
        for document in docs:
            parts.append(document)
            size += len(document)
            if size > chars:
                break
        else:
            exhausted = True
        text = "\n\n".join(parts)
        whole = exhausted and len(text) <= chars
        ids: list[int] = tokenizer(text if whole else text[:chars], add_special_tokens=False, verbose=False)[
            "input_ids"
        ]
        if whole or needed is None or len(ids) >= needed + 64:
            return ids
        chars *= 2


def sample_self(model: Model, count: int, length: int, seed: int, *, bos: bool = True, batch: int = 16) -> Tensor:
    """Windows that the dense model writes itself, (N, L): each starts from the beginning-of-text token (without one,
    or with `bos` false, from a random token) and every further one is drawn from the model's own distribution.

    Batch b is drawn with seed + b, so that more windows begin with the same ones. Kept in the cache.
    """
    first = _opening(model.tokenizer) if bos else []
    key = hashlib.sha256(f"{_fingerprint(model)}|{length}|{seed}|{batch}|{first}".encode()).hexdigest()[:16]
    path = cache_directory() / "self" / f"{key}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, KeyError):  # a damaged one is made again
        have: Tensor = load_file(path)["windows"]
        if len(have) >= count:
            return have[:count]
    say(f"sampling {count} windows of {length} tokens from the dense model")
    parts = []
    with model.whole() as network, torch.no_grad(), fork_random(model.device):
        for number in range(-(-count // batch)):
            torch.manual_seed(seed + number)
            start = torch.tensor(first).expand(batch, -1)
            if not first:
                start = torch.randint(network.config.vocab_size, (batch, 1))
            ids = network.generate(
                start.to(model.device),
                attention_mask=torch.ones_like(start).to(model.device),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                repetition_penalty=1.0,
                min_new_tokens=length - start.shape[1],
                max_new_tokens=length - start.shape[1],
                pad_token_id=0,
            )
            parts.append(ids.cpu())
    out = torch.cat(parts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        save_file({"windows": out}, temporary)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        say(f"the text is not kept for another run, since '{path.parent}' cannot be written ({first_line(error)})")
    return out[:count]


def _fingerprint(model: Model) -> str:
    """What the model's weights are, as far as names, sizes and a few values tell."""
    if model.checkpoint is not None:
        files = [(model.checkpoint.directory / name).stat() for name in model.checkpoint.files]
        return repr([(str(model.checkpoint.directory), s.st_size, s.st_mtime_ns) for s in files] + [str(model.dtype)])
    some: Iterable[Tensor] = itertools.islice(model.network.parameters(), 8)
    return repr([(tuple(p.shape), p.float().sum().item()) for p in some])
