"""Encoders without a task of their own: they find masked words, or what counts is what they make of a text.

Where the checkpoint has a head for words (…ForMaskedLM) the loss is that of masked words: of each text a share of the
tokens is hidden, drawn by a seed, as Devlin et al. do, "BERT: Pre-training of Deep Bidirectional Transformers for
Language Understanding", 2019 (arXiv 1810.04805): 80% of them become the mask, 10% any token, 10% stay as they are.

Where it has none, a text's embedding is what counts: its hidden states, pooled as the directory says (sentence
transformers' modules.json and 1_Pooling/config.json), else their mean. The loss is 1 - cosine to the dense network's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, normalize

from ..errors import InputError, ModelError, say
from ..model.divergence import kl
from ..model.files import MODULES, modules_behind, read_json
from ..model.names import find_directory
from ..model.network import Model
from ..model.open import open_files
from ..model.task import NO_ANSWERS, Answers, Counts
from ..samples import TARGET, Batch, Samples
from .registry import register_task
from .scores import mean_score
from .sentences import LABELS, Sentences, right_of, tensors

IGNORED = -100  # the label of a token that is not asked for, as transformers writes it
HEADS = ("ForMaskedLM", "ForPreTraining")  # how transformers' classes of such networks end
NEAREST = 4096  # texts among which the nearest one is looked for

_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda states_BLD: states_BLD.mean(1),
    "cls": lambda states_BLD: states_BLD[:, 0],
    "max": lambda states_BLD: states_BLD.amax(1),
    "last": lambda states_BLD: states_BLD[:, -1],
    "weighted": lambda states_BLD: _weighted(states_BLD),
    "mean_sqrt": lambda states_BLD: states_BLD.sum(1) / states_BLD.shape[1] ** 0.5,
}
_NAMES = {  # what sentence-transformers calls them
    "mean_tokens": "mean",
    "cls_token": "cls",
    "max_tokens": "max",
    "lasttoken": "last",
    "weightedmean_tokens": "weighted",
    "mean_sqrt_len_tokens": "mean_sqrt",
    **{name: name for name in ("mean", "cls", "max")},
    "weightedmean": "weighted",
    "mean_sqrt_len": "mean_sqrt",
}


@register_task("masked")
class Masked(Sentences):
    """Encoders: masked words, or embeddings of texts."""

    counts = Counts(128, 256)

    def __init__(
        self,
        *,
        length: int | None = None,
        text: str = "text",
        pair: str = "text_pair",
        loss: Literal["auto", "words", "cosine"] = "auto",
        share: float = 0.15,
        pooling: Literal["auto", "mean", "cls", "max", "last"] = "auto",
    ):
        """
        Args:
            length: tokens of a sample, at most: what is longer is cut, and counted; None: 512, or what the model takes.
            text: the column with the text.
            pair: the column with the second text of a pair, which masked words may stand in too.
            loss: that of masked `words`, or of `cosine`, how far embeddings are from the dense network's; `auto`: words
                where the checkpoint has a head for them, and is no sentence transformer.
            share: of the tokens, which are masked.
            pooling: how hidden states become an embedding; `auto`: as the directory says, else their mean.
        """
        super().__init__(length=length, text=text, pair=pair)
        if not 0 < share < 1:
            raise InputError(f"masked.share={share:g}: a share of the tokens lies between 0 and 1.")
        self.loss = loss
        self.share = share
        self.pooling = pooling
        self._pools: list[str] = ["mean" if pooling == "auto" else pooling]

    @classmethod
    def claims(cls, name: str, config: Mapping[str, Any]) -> bool:
        from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as KNOWN

        built = [str(one) for one in config.get("architectures") or ()]
        if any(one.endswith(HEADS) for one in built) or (name and (Path(name) / MODULES).is_file()):
            return True
        bare = any(one.endswith("Model") for one in built) and not config.get("is_decoder")
        return bare and config.get("model_type") in KNOWN and not config.get("is_encoder_decoder")

    def open(self, name: str, **options: Any) -> Model:
        auto = "AutoModelForMaskedLM" if self._of_words(name, options) else "AutoModel"
        model = open_files(name, self, auto, "encoder", admit=self.admit, check=self.check_network, **options)
        if self.pooling == "auto" and model.checkpoint is not None and not has_words(model.network):
            self._pools = _said(model.checkpoint.directory)
        return model

    def _of_words(self, name: str, options: Mapping[str, Any]) -> bool:
        """Is the network of this name opened with its head for words?"""
        if self.loss != "auto":
            return self.loss == "words"
        with contextlib.suppress(ModelError):  # which opening it says
            trust = {key: options[key] for key in ("remote_code", "pickles", "revision") if key in options}
            directory = find_directory(name, **trust)
            built = read_json(directory / "config.json").get("architectures") or ()
            return not (directory / MODULES).is_file() and any(str(one).endswith("ForMaskedLM") for one in built)
        return False

    def admit(self, name: str, config: Any) -> None:
        if config.is_encoder_decoder:
            raise ModelError(f"'{name}' is an encoder and a decoder ({config.model_type}): use --task seq2seq.")

    def check_network(self, model: Model) -> None:
        network = model.network
        if has_words(network) and model.tokenizer is not None and model.tokenizer.mask_token_id is None:
            raise ModelError(f"the tokenizer of '{model.name}' has no mask: use --set masked.loss=cosine.")
        if model.checkpoint is None or not hasattr(network, "pooler"):
            return
        if not any(name.startswith("pooler.") for name, _ in model.plan().values()):
            network.pooler = None  # whose weights are not there; nothing here is made with it

    # --- samples

    def samples(
        self, model: Model, source: str, count: int | None, *, used: int = 0, seed: int = 0, test: bool = False
    ) -> Samples:
        each = tensors(self.encode(model, self.rows(model, source, count, used, test)))
        if has_words(model.network):
            generator = torch.Generator().manual_seed(0 if test else seed)  # what is measured on stays the same
            each = [one | self._hidden(model, one["input_ids"], generator) for one in each]
        return Samples.gathered(each)

    def _hidden(self, model: Model, ids_BL: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Token ids of one text with some of them masked, at least one, and as labels what was there."""
        tokenizer = model.tokenizer
        special = torch.isin(ids_BL, torch.tensor(tokenizer.all_special_ids))
        drawn_BL = torch.rand(ids_BL.shape, generator=generator).masked_fill(special, 2.0)
        count = max(1, round(self.share * int((~special).sum())))
        chosen_BL = drawn_BL <= drawn_BL.flatten().kthvalue(count).values
        chosen_BL &= ~special
        how_BL = torch.rand(ids_BL.shape, generator=generator)
        any_BL = torch.randint(model.network.config.vocab_size, ids_BL.shape, generator=generator)
        asked_BL = ids_BL.clone()
        asked_BL[chosen_BL & (how_BL < 0.8)] = tokenizer.mask_token_id
        other = chosen_BL & (how_BL >= 0.8) & (how_BL < 0.9)
        asked_BL[other] = any_BL[other]
        return {"input_ids": asked_BL, LABELS: ids_BL.masked_fill(~chosen_BL, IGNORED)}

    def lacks(self, group: Batch) -> bool:
        return LABELS not in group and TARGET not in group

    def target(self, outputs: Any, batch: Batch) -> Tensor:
        """The dense network's embeddings; of a head for words, its own answer at each token."""
        if "logits" in outputs:
            words_BL: Tensor = outputs.logits.argmax(2)
            return words_BL
        return self.embeddings(outputs)

    def check(self, model: Model, samples: Samples) -> None:
        for group in samples.groups:
            labels_BL = group.get(LABELS)
            if labels_BL is None:
                continue
            if not has_words(model.network) or labels_BL.shape != group["input_ids"].shape:
                raise InputError(
                    f"labels {tuple(labels_BL.shape)} are of masked words, one for each token, and of a network with a"
                    f" head for words, which {type(model.network).__name__}"
                    f" {'has' if has_words(model.network) else 'has not'}."
                )
            if not (labels_BL != IGNORED).any(1).all():
                raise InputError("a text has no word that is asked for: all its labels are -100.")
        super().check(model, samples)

    # --- what the network makes of them

    def embeddings(self, outputs: Any) -> Tensor:
        """Of each text (B, D), in float32; several ways of pooling side by side."""
        states_BLD = outputs[0].to(torch.promote_types(outputs[0].dtype, torch.float32))
        return torch.cat([_POOLS[name](states_BLD) for name in self._pools], 1)

    def losses(self, outputs: Any, batch: Batch) -> Tensor:
        """The mean cross entropy of the masked words of each text; or 1 - cosine to the dense network's embedding."""
        if "logits" not in outputs:
            return 1 - cosine_similarity(self.embeddings(outputs), right_of(batch), dim=1)
        right_BL = right_of(batch)
        found = []
        for logits_LV, right_L in zip(outputs.logits, right_BL, strict=True):
            asked_TV = logits_LV[right_L != IGNORED]
            asked_TV = asked_TV.to(torch.promote_types(asked_TV.dtype, torch.float32))
            found.append(cross_entropy(asked_TV, right_L[right_L != IGNORED]))
        return torch.stack(found)

    def divergence(self, outputs: Any, teacher: Any, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """KL(teacher || model), mean over masked words; or 1 - cosine to the teacher's embedding, mean over texts."""
        if "logits" not in outputs:
            ours_BD, theirs_BD = self.embeddings(outputs), self.embeddings(teacher)
            return (1 - cosine_similarity(ours_BD, theirs_BD, dim=1)).mean()
        asked_BL = (
            batch[LABELS] != IGNORED if LABELS in batch else torch.ones_like(batch["input_ids"], dtype=torch.bool)
        )
        return kl(outputs.logits[asked_BL], teacher.logits[asked_BL], temperature)

    # --- what a report says

    def answers(self, outputs: Any, batch: Batch) -> Answers:
        if "logits" not in outputs:
            return {"embedding": self.embeddings(outputs)}
        right_BL = right_of(batch)
        asked_BL = right_BL != IGNORED
        return {"asked": asked_BL.sum(1), "found": ((outputs.logits.argmax(2) == right_BL) & asked_BL).sum(1)}

    def scores(
        self,
        model: Model,
        samples: Samples,
        losses: Sequence[float],
        answers: Answers = NO_ANSWERS,
        dense: Answers = NO_ANSWERS,
    ) -> dict[str, Any]:
        """Of masked words the loss, and the share that is found; of embeddings their cosine to the dense network's, and
        how many texts have the same nearest one among the others as there."""
        if not losses:
            return {"loss": None}
        if "embedding" not in answers:
            asked, found = (int(answers[key].sum()) for key in ("asked", "found"))
            said = {"samples": len(losses), **mean_score("loss", losses), "words": asked, "accuracy": found / asked}
            return {**said, "more": {"words": "", "accuracy": "%"}}
        ours_ND, theirs_ND = answers["embedding"], (dense or answers)["embedding"]
        cosine = mean_score("cosine", cosine_similarity(ours_ND, theirs_ND, dim=1))
        said = {"figure": "cosine", "higher": True, "unit": "", "samples": len(losses), **cosine}
        if dense and len(losses) > 2:
            same = _nearest(ours_ND[:NEAREST]) == _nearest(theirs_ND[:NEAREST])
            said |= {"same nearest": same.double().mean().item(), "more": {"same nearest": "%"}}
        return said


def has_words(network: Any) -> bool:
    """Has it a head for words?"""
    return type(network).__name__.endswith(HEADS)


def _nearest(embeddings_ND: Tensor) -> Tensor:
    """For each embedding the number of the one beside it that is nearest by cosine."""
    one_ND = normalize(embeddings_ND.float(), dim=1)
    return (one_ND @ one_ND.T).fill_diagonal_(-2).argmax(1)


def _weighted(states_BLD: Tensor) -> Tensor:
    """Mean with weights 1, 2, … along the text."""
    weights_L = torch.arange(1, states_BLD.shape[1] + 1, dtype=states_BLD.dtype, device=states_BLD.device)
    return (states_BLD * weights_L[:, None]).sum(1) / weights_L.sum()


def _said(directory: Path) -> list[str]:
    """How a directory pools, by its modules.json. Raises ModelError for a way that is not known."""
    names: list[str] = []
    for module in modules_behind(directory):
        kind = module["type"].rpartition(".")[2]
        if kind == "Pooling":
            path = directory / module["path"] / "config.json"
            said = read_json(path)
            own = said.get("pooling_mode")
            wanted = [key.removeprefix("pooling_mode_") for key, on in said.items() if on is True]
            wanted = [own] if isinstance(own, str) else [key for key in wanted if key in _NAMES or "token" in key]
            if not wanted or any(one not in _NAMES for one in wanted):
                raise ModelError(
                    f"'{path}' pools in a way that is not known ({json.dumps(said)}): use --set masked.pooling=mean."
                )
            names = [_NAMES[one] for one in wanted]
        elif kind not in ("Normalize", "Dropout"):
            say(f"'{directory}' has a {kind} behind its pooling: embeddings are compared before it")
    return names or ["mean"]
