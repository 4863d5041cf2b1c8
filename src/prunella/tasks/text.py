"""Causal language models: windows of tokens, in which each next one is predicted."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..calibrate import check_windows, room, text_tokens, window_length, windows, with_bos
from ..errors import InputError, ModelError
from ..linalg import apart
from ..machine import at_a_time
from ..model.checkpoint import Source
from ..model.checks import check_config
from ..model.divergence import kl
from ..model.files import read_json
from ..model.network import Model
from ..model.open import open_files
from ..model.task import Task
from ..overlap import fingerprint, joined
from ..samples import Batch, Samples
from ..waits import demand, fetch
from .loss import next_token_loss
from .registry import register_task

ROWS = 256  # tokens at a time, on a CPU, whose logits are made
CAUSAL = 16  # tokens on which it is tried whether a block sees what comes after
PROMPT = "The most important thing about a garden is"

_OWN_MASKS = ("git",)  # hide what comes later, though their attention says that it is not causal
_BOTH_WAYS = ("cpmant", "xlnet")  # see tokens that come later, and nothing in their config says so


@register_task("text")
class Text(Task):
    """Causal language models, on windows of text."""

    source = "pydoc"
    figure = "perplexity"
    language = True
    training: ClassVar = {"batch": 8, "micro": 4, "held_out": 8}

    def __init__(self, *, length: int | None = None, bos: bool = True):
        """
        Args:
            length: tokens in a window; None: 2048, or the model's context if that is shorter.
            bos: windows begin with what the tokenizer puts before a text, if anything; else none does.
        """
        self.length = length
        self.bos = bos

    def open(self, name: str, **options: Any) -> Model:
        model = load_model(name, **options)
        model.task = self
        return model

    def wrap(self, network: Any, tokenizer: Any = None, name: str = "") -> Model:
        check_config(network)
        _admit(name or "in memory", network.config)
        model = super().wrap(network, tokenizer, name)
        try:
            check_causal(model)
        except ModelError:
            model.give_back()
            raise
        return model

    # --- samples

    def samples(
        self, model: Model, source: str, count: int | None, *, used: int = 0, seed: int = 0, test: bool = False
    ) -> Samples:
        assert count is not None
        length = window_length(model, self.length)
        skip = -(-used // text_tokens(model, length, self.bos)) if used else 0
        split: Any = "test" if test else "train"
        found_NL = windows(model, source, count, length, skip=skip, seed=seed, bos=self.bos, split=split)
        return Samples.of(found_NL)

    def reads(self, model: Model) -> bool:
        return model.tokenizer is not None

    def size(self, samples: Samples) -> int:
        """In tokens."""
        return sum(group["input_ids"].numel() for group in samples.groups)

    def about(self, samples: Samples) -> dict[str, Any]:
        lengths = {group["input_ids"].shape[1] for group in samples.groups}
        return {"length": lengths.pop() if len(lengths) == 1 else None}

    def example(self, network: nn.Module) -> Batch:
        return {"input_ids": torch.arange(8)[None]}

    def check(self, model: Model, samples: Samples) -> None:
        for group in samples.groups:
            if "input_ids" not in group:
                raise InputError(f"samples of text are token ids, `input_ids`; these are {', '.join(group)}.")
            check_windows(model, group["input_ids"])
            seen_NL = group.get("attention_mask")
            if seen_NL is not None and seen_NL.ndim == 2 and not seen_NL.all():
                raise InputError(
                    "the attention_mask of these samples hides tokens, which would count as text: give samples of"
                    " different lengths as groups, without padding."
                )

    # --- the network's blocks

    def stacks(self, network: Any) -> tuple[tuple[str, ...], ...]:
        """Those of the decoder: of all lists of modules that lie in no other, the one with most weights, packed ones
        too. Those of a vision tower do not count where the network says which part of it is the text's decoder."""
        lists = {name: module for name, module in network.named_modules() if isinstance(module, nn.ModuleList)}
        find: Any = getattr(network, "get_decoder", lambda: network)
        decoder = find()
        within = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
        lists = {name: module for name, module in lists.items() if id(module) in within} or lists
        outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
        size = {name: sum(t.numel() for t in (*lists[name].parameters(), *lists[name].buffers())) for name in outer}
        best = max(size, key=lambda name: size[name], default=None)
        if best is None or not size[best]:
            raise ModelError(
                f"no blocks were found in {type(network).__name__}: it has no list of decoder layers. Prunella prunes"
                " causal language models built as a list of blocks."
            )
        return (tuple(f"{best}.{i}" for i in range(len(lists[best]))),)

    def check_block(
        self, network: nn.Module, index: int, run: Callable[[Batch], tuple[Tensor, Any]], batch: Batch, dimension: int
    ) -> None:
        """What a block makes of the first tokens must not depend on the last one."""
        ids_BL = batch["input_ids"][:, :CAUSAL]
        changed = ids_BL.clone()
        changed[:, -1] = torch.where(ids_BL[:, -1] == ids_BL[:, 0], ids_BL[:, ids_BL.shape[1] // 2], ids_BL[:, 0])
        (entering, gave), (other, others) = (run({"input_ids": ids}) for ids in (ids_BL, changed))
        dimensions = [d for d, size in enumerate(entering.shape) if d != dimension and size > 1]
        changes = fetch([(entering != other).movedim(d, 0).flatten(1).any(1) for d in dimensions])
        places = [(d, int(at.nonzero())) for d, at in zip(dimensions, changes, strict=True) if at.sum() == 1]
        if len(places) != 1 or gave.shape != entering.shape:
            return  # the two tokens are one, or where tokens stand cannot be told
        tokens, place = places[0]

        def early(state: Tensor) -> Tensor:
            return state.narrow(tokens, 0, place)

        demand_causal(network, index, early(entering), early(gave), early(others), "causal language models")

    # --- what the network makes of them

    def run(self, network: nn.Module, batch: Batch, **options: Any) -> Any:
        """`logits_to_keep` is for the networks that know it: others make all logits."""
        if "logits_to_keep" in options and "logits_to_keep" not in inspect.signature(network.forward).parameters:
            del options["logits_to_keep"]
        return network(**batch, use_cache=False, **options)

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """Mean negative log-likelihood per predicted token of each window."""
        # One at a time: in float32 its logits are as large as all of them in bfloat16.
        each = zip(outputs.logits, batch["input_ids"], strict=True)
        return torch.stack([cross_entropy(logits_LV[:-1].float(), ids_L[1:]) for logits_LV, ids_L in each])

    def parts(self, run: Callable[..., Any], batch: Batch) -> Iterator[Tensor]:
        """The cross entropy of a few tokens at a time."""
        (ids_L,) = batch["input_ids"]
        predicted = len(ids_L) - 1
        if not predicted:
            raise InputError("windows of a single token have no next token to predict: use longer ones.")
        for rows_R in torch.split(torch.arange(predicted, device=ids_L.device), at_a_time(ROWS, ids_L.device)):
            logits_RV = run(logits_to_keep=rows_R).logits[0]
            if len(logits_RV) != len(rows_R):
                logits_RV = logits_RV[rows_R]
            logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
            yield cross_entropy(logits_RV, ids_L[rows_R + 1], reduction="sum") / predicted

    def divergence(self, outputs: Any, teacher: Any, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """KL(teacher || model), mean over predicted tokens."""
        ours_TV, theirs_TV = (out.logits[:, :-1].flatten(0, 1) for out in (outputs, teacher))
        return kl(ours_TV, theirs_TV, temperature)

    def objective(
        self, outputs: Any, batch: Batch, teacher: Any = None, *, share: float = 1.0, temperature: float = 1.0
    ) -> Tensor:
        """Made a few tokens at a time, with its gradient."""
        theirs_BLV = None if teacher is None else teacher.logits
        return next_token_loss(outputs.logits, batch["input_ids"], theirs_BLV, share=share, temperature=temperature)

    # --- what a report says

    def scores(self, model: Model, samples: Samples, losses: Sequence[float], *_: Any, **__: Any) -> dict[str, Any]:
        if not losses:
            return {"perplexity": None}
        ids_NL = samples.groups[0]["input_ids"]
        found = Perplexity.of(losses, ids_NL.shape[1])
        return {"text": samples.digest, "bos": with_bos(model, ids_NL), **found.as_dict()}

    def specimen(self, model: Model, checkpoint: Source | None = None, tokens: int = 24) -> str | None:
        """A greedy continuation of a fixed prompt, where the whole model fits comfortably in memory."""
        if not model.fits():
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

    def fingerprint(self, samples: Samples) -> str:
        return joined(*(fingerprint(group["input_ids"]) for group in samples.groups))


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a model on windows of text, each scored on its own.

    perplexity: exp of the mean of `nll`
    windows:    how many
    length:     tokens in each
    nll:        negative log-likelihood of each window, its mean over the tokens that are predicted
    """

    perplexity: float
    windows: int
    length: int
    nll: tuple[float, ...]

    @classmethod
    def of(cls, nll: Sequence[float], length: int) -> Perplexity:
        """From the losses of windows of so many tokens."""
        return cls(math.exp(min(sum(nll) / len(nll), 700.0)), len(nll), length, tuple(nll))

    def as_dict(self) -> dict[str, float | int | list[float]]:
        """As plain data, ready for JSON."""
        return {
            "perplexity": self.perplexity,
            "windows": self.windows,
            "length": self.length,
            "nll": list(self.nll),
        }


def demand_causal(network: nn.Module, index: int, entering: Tensor, before: Tensor, after: Tensor, kind: str) -> None:
    """ModelError for a block that makes something else of tokens, `before` and `after` a later one was changed.

    Args:
        entering: what the block is given of these tokens.
        kind: what is pruned in place of such a network.
    """
    # Which tokens meet in an expert changes the rounding of some; attention to what comes later changes nearly all.
    many = (before != after).float().mean() > 0.25  # of none, NaN
    demand(
        ~(many & (apart(before, after) > 1e-3 * apart(before, entering))),
        lambda: ModelError(
            f"{type(network).__name__} reads a text from both sides: what its block {index} makes of a token"
            f" depends on the tokens that follow. Prunella prunes {kind}."
        ),
    )


# ---------------------------------------------------------------------------------------------------------
# Opening


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    remote_code: bool = False,
    pickles: bool = False,
    packed: bool = False,
    revision: str | None = None,
    tokenizer: Any = None,
) -> Model:
    """Open a causal language model without reading its weights.

    Args:
        name: hub id, directory, .gguf file or built-in name.
        dtype: float32, bfloat16, float16; `auto` is what the checkpoint is stored in.
        device: where blocks are computed: cpu, cuda, cuda:1 …; `auto` is cuda where there is one.
        remote_code: run Python that comes with the model.
        pickles: read weights that only come as pickles.
        packed: take a packed model as well; it is read into memory, packed as it is, and cannot be pruned.
        revision: of a hub's model: a branch, tag or commit.
        tokenizer: in place of the model's own: a tokenizer, or the directory or hub id of one.

    Raises:
        ModelError: no such model, or one that cannot be read or pruned: a tensor is missing, it is quantized, it is no
            causal language model.
    """
    recipe = read_json(Path(name) / "prunella.json").get("recipe")
    if isinstance(recipe, dict) and "text" not in (task := recipe.get("task", "text")):
        raise ModelError(f"'{name}' is of task '{', '.join(task)}': this takes causal language models only, yet.")
    if isinstance(recipe, dict) and ":" in (store := recipe.get("format", "dense")):
        raise ModelError(
            f"'{name}' was written by the store '{store}', whose files are its own: open the model that it was pruned"
            " from, and give what the store reads as `checkpoint`."
        )
    return open_files(
        name,
        Text(),
        "AutoModelForCausalLM",
        "causal language model",
        admit=_admit,
        check=check_causal,
        dtype=dtype,
        device=device,
        remote_code=remote_code,
        pickles=pickles,
        packed=packed,
        revision=revision,
        tokenizer=tokenizer,
    )


def wrap_model(network: Any, tokenizer: Any = None, name: str = "") -> Model:
    """A transformers model that is already in memory, as a `Model`. It stays on the device on which it is.

    It is put into evaluation mode, and its attention and its experts are computed in the way that pruning can watch,
    until `Model.give_back` is called.

    Args:
        network: the transformers model.
        tokenizer: its tokenizer, if text is to be read.
        name: what reports call it; by default the name that it was loaded by.

    Raises:
        ModelError: it is no causal language model, or it is spread over several devices.
    """
    return Text().wrap(network, tokenizer, name)


def _admit(name: str, config: Any) -> None:
    """Raises ModelError for an encoder and a decoder."""
    if config.is_encoder_decoder:
        raise _no_decoder(name, f"{config.model_type} is an encoder and a decoder")


def check_causal(model: Model) -> None:
    """Raises ModelError for what would see the answer: encoders, and decoders that attend to an encoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    config = model.network.config
    _admit(model.name, config)
    modules = [m for block in model.blocks for m in model.module(block).modules()]
    flags = {bool(m.is_causal) for m in modules if isinstance(getattr(m, "is_causal", None), bool)}
    if len(flags) > 1:
        raise _no_decoder(model.name, f"this {config.model_type} is a decoder that attends to an encoder")
    switch = getattr(config, "is_decoder", getattr(config, "causal", None))  # of families that are both
    if flags and config.model_type not in _OWN_MASKS:
        causal = flags == {True}
    elif config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        causal = bool(switch)
    else:
        causal = config.model_type not in _BOTH_WAYS
    if not causal:
        raise _no_decoder(model.name, f"{config.model_type} is an encoder, whose predictions see the word to predict")


def _no_decoder(name: str, why: str) -> ModelError:
    return ModelError(
        f"'{name}' is no causal language model: {why}. Another task may take it: leave --task out, or open it by"
        " prunella.open_model."
    )
