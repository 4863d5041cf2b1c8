"""What networks are healed on that are not causal language models: samples to train on, those that are held out, those
that are calibrated and measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..errors import InputError, say
from ..foreign import blamed
from ..model.network import Model
from ..overlap import known_among
from ..pruning import held_out
from ..recipe import Healing, Recipe
from ..samples import Samples
from ..tasks import Task
from ..tasks.augment import augmented

HELD_OUT = 256  # samples, or a tenth of all if that is less


@dataclass(frozen=True)
class Sources:
    """Samples of a task, as a recipe wants them. They are trained on in passes over all of them, in each round."""

    recipe: Recipe
    _known: dict[str, tuple[Samples, Samples | None]] = field(default_factory=dict)  # read once

    @property
    def _settings(self) -> Healing:
        return self.recipe.heal

    def calibration(self, model: Model) -> Samples:
        """What statistics and targets are made from."""
        found = self._read(model)
        return augmented(model.task, found, self.recipe.seed) if self.recipe.calibration.augment else found

    def _read(self, model: Model) -> Samples:
        wanted = self.recipe.calibration
        task = self.recipe.make_task(wanted.length)
        with blamed(type(task), f"task '{task.name}'"):
            return task.samples(model, wanted.source, wanted.samples, seed=self.recipe.seed)

    def test(self, model: Model, recipe: Recipe) -> Samples | None:
        """What is measured on."""
        if recipe.evaluate.source is None:
            return None
        used = model.task.size(self._read(model))
        task = model.task
        with blamed(type(task), f"task '{task.name}'"):
            return held_out(model, recipe, used)

    def check(self, model: Model) -> None:
        """Raises InputError for what `training` and the evaluation have to say, before any work is done."""
        if self._settings.way == "retrain":
            self.training(model)
        else:
            self.test(model, self.recipe)

    def training(self, model: Model) -> tuple[Samples, Samples | None]:
        """Samples to train on, and those that are held out; never those to evaluate on, by what is in them."""
        if not self._known:
            self._known[""] = self._training(model)
        return self._known[""]

    def _training(self, model: Model) -> tuple[Samples, Samples | None]:
        settings, recipe = self._settings, self.recipe
        if model.task.blind and settings.distill < 1:
            raise InputError(
                f"task '{model.task.name}' has no loss here to train by: follow the dense network's outputs alone, with"
                " --distill 1 (--set heal.distill=1), or give a loss."
            )
        sources = list(settings.text) or [recipe.calibration.source]
        task = recipe.make_task(recipe.calibration.length)
        found: list[Samples] = []
        for source in sources:
            missing = None if settings.samples is None else settings.samples - sum(map(len, found))
            if missing is None or missing > 0:
                with blamed(type(task), f"task '{task.name}'"):
                    found.append(task.samples(model, source, missing, seed=recipe.seed))
        every = Samples.gathered(group for some in found for group in some.groups)
        test = self.test(model, recipe)
        if test is not None:
            every = without(every, test, task)
        held = min(HELD_OUT, len(every) // 10) if settings.held_out is None else settings.held_out
        if len(every) <= held:
            raise InputError(
                f"{' and '.join(sources)}: {len(every)} samples to train on are too few to hold {held} of them out."
                " Give more, or --set heal.held_out=0."
            )
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
        return every.take(order[held:]), every.take(order[:held]) if held else None

    def own(self, samples: Samples) -> Samples:
        """What is trained on in this round: all of it."""
        return samples

    def steps(self, samples: Samples) -> int:
        """How many steps are taken on what is trained on."""
        return math.ceil(self._settings.epochs * len(samples) / self._settings.step)

    def amount(self, samples: Samples, taken: int) -> dict[str, int]:
        """What a report says of so many samples that were trained on, of these."""
        return {"samples": taken}


def without(samples: Samples, test: Samples, task: Task) -> Samples:
    """Samples but for those that are among the ones to evaluate on, whatever their labels. Raises InputError where none
    is left."""
    hashes = samples.hashes(task.labels)
    same = known_among(test.hashes(task.labels), hashes)
    if not any(same):
        return samples
    if all(same):
        raise InputError(
            "every sample to train on is also one to evaluate on: train on others (--text …), or evaluate on others"
            " (--evaluate …, or `evaluate` beside a module's factory)."
        )
    say(f"{sum(same)} of {len(samples)} samples to train on are left out: they are among those to evaluate on")
    return samples.take(number for number, known in enumerate(same) if not known)
