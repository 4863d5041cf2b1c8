"""The text of a healing: what it trains on, what is held out, what it is calibrated and measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..calibrate import context, text_tokens, up_to, window_length, windows
from ..errors import InputError
from ..model.network import Model
from ..pruning import held_out
from ..recipe import Healing, Recipe
from ..samples import Samples
from ..texts import same_text


@dataclass(frozen=True)
class Text:
    """Windows of tokens (N, L), as a recipe wants them.

    dense:   the dense model: text of `self` is written by it
    portion: (k, n): of n times as much text the k-th portion is trained on, from 0
    skip:    windows of the text to pass over
    whole:   it is a dense model that trains
    """

    recipe: Recipe
    dense: Callable[[], Model] | None = None
    portion: tuple[int, int] = (0, 1)
    skip: int = 0
    whole: bool = False

    @property
    def _settings(self) -> Healing:
        return self.recipe.heal

    def _author(self, model: Model, source: str | None) -> Model:
        return self.dense() if source == "self" and self.dense is not None else model

    def calibration(self, model: Model) -> Samples:
        """What statistics and targets are made from."""
        wanted = self.recipe.calibration
        author, length = self._author(model, wanted.source), window_length(model, wanted.length)
        found = windows(author, wanted.source, wanted.samples, length, seed=self.recipe.seed, bos=self.recipe.bos)
        return Samples.of(found)

    def _calibrated(self, model: Model) -> int:
        """At most so many tokens of the calibration come before those to evaluate on, if they are of one text."""
        wanted = self.recipe.calibration
        return wanted.samples * window_length(model, wanted.length)

    def test(self, model: Model, recipe: Recipe) -> Samples | None:
        """What perplexities are measured on."""
        return held_out(self._author(model, recipe.evaluate.source), recipe, self._calibrated(model))

    def check(self, model: Model) -> None:
        """Raises InputError for what `training` and the evaluation have to say against the text, before any work is
        done; what a model that is not there yet will write is not looked at."""
        sources = self._settings.text or (self.recipe.calibration.source,)
        if self._settings.way == "retrain" and "self" not in sources:
            self.training(model)
        if self.recipe.evaluate.source != "self":
            held_out(model, self.recipe, self._calibrated(model))

    def _check_step(self, length: int) -> None:
        """Raises InputError if the tokens to train on are not enough for a step of windows of this length."""
        settings, (_, rounds) = self._settings, self.portion
        step, key = settings.step * length, "adapt" if self.whole else "tokens"
        if settings.tokens < step:
            each = f" in each of {rounds} rounds" if rounds > 1 else ""
            raise InputError(
                f"{settings.tokens:,} tokens to train on{each} are less than a single step takes, {settings.step}"
                f" windows of {length}: give at least {step * rounds} (--set heal.{key}={step * rounds}), shorter"
                " windows (--set heal.length=…) or fewer of them a step (--set heal.batch=…)."
            )

    def training(self, model: Model) -> tuple[Samples, Samples | None]:
        """Windows to train on in all portions, shuffled, and those that are held out; never those to evaluate on.

        Raises InputError where there are too few.
        """
        settings, test, bos = self._settings, self.recipe.evaluate, self.recipe.bos
        length = min(settings.length, context(model))
        self._check_step(length)
        sources = list(settings.text) or [self.recipe.calibration.source]
        _, portions = self.portion
        held = settings.held_out or 0
        wanted = portions * (settings.tokens // length) + held
        missing = self.skip + wanted
        parts: list[torch.Tensor] = []
        for source in sources:
            if missing <= 0:
                break
            first = last = 0  # windows that hold tokens to evaluate on
            if test.source is not None and same_text(source, test.source):
                theirs = text_tokens(model, window_length(model, test.length), bos)
                ours = text_tokens(model, length, bos)
                same = same_text(self.recipe.calibration.source, test.source)
                skip = -(-self._calibrated(model) // theirs) if same else 0
                first, last = skip * theirs // ours, -(-(skip + test.windows) * theirs // ours)
            author, count = self._author(model, source), missing + last - first
            found_NL = up_to(author, source, count, length, self.recipe.seed, bos=bos)
            parts.append(torch.cat([found_NL[:first], found_NL[last:]])[:missing])
            missing -= len(parts[-1])
        all_NL = torch.cat(parts)
        all_NL = all_NL[self.skip :] if len(all_NL) >= self.skip + wanted else all_NL[:wanted]
        if len(all_NL) <= held:
            raise InputError(
                f"{' and '.join(sources)}: {len(all_NL)} windows of {length} tokens to train on are too few to hold"
                f" {held} of them out. Give more text, or --set heal.held_out=0."
            )
        order = torch.randperm(len(all_NL), generator=torch.Generator().manual_seed(self.recipe.seed))
        shuffled_NL = all_NL[order]
        return Samples.of(shuffled_NL[held:]), Samples.of(shuffled_NL[:held]) if held else None

    def own(self, samples: Samples) -> Samples:
        """The portion that is trained on, or all of it where there are too few windows."""
        at, portions = self.portion
        own_NL = samples.groups[0]["input_ids"].tensor_split(portions)[at]
        return Samples.of(own_NL) if len(own_NL) else samples

    def steps(self, samples: Samples) -> int:
        """How many steps are taken on what is trained on."""
        settings = self._settings
        return settings.tokens // (settings.step * samples.groups[0]["input_ids"].shape[1])

    def amount(self, samples: Samples, taken: int) -> dict[str, int]:
        """What a report says of so many samples that were trained on, of these."""
        return {"tokens": taken * samples.groups[0]["input_ids"].shape[1]}
