"""The whole network is retrained, merged and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..evaluate.measure import measure
from ..model.network import Model
from ..model.task import NO_ANSWERS, Answers
from ..progress import OnStep, Track
from ..recipe import Recipe
from ..samples import Samples
from ..save import Output
from ..train.around import statistics_of
from ..train.parts import Chosen, attach, choose, detach, parts_of, trained
from ..train.retrain import retrain
from ..train.shard import gather, scatter, shard
from ..workshop import partial_of
from .lora import save_adapter, undo
from .masks import verify
from .report import write
from .sources import Sources
from .teacher import teacher_in_memory, teacher_streamed
from .text import Text


@dataclass(frozen=True)
class Retraining:
    """One retraining, of a `Line` whose fields these are.

    open:  a model by its name
    given: what it is trained on
    """

    recipe: Recipe
    path: Path
    resume: bool
    track: Track
    watch: OnStep | None
    whole: bool
    sharded: bool
    open: Callable[[Path | str], Model]
    given: Text | Sources

    def run(
        self,
        model: Model,
        dense: Model | None,
        masks: Mapping[str, Tensor],
        new: Sequence[str],
        samples: Samples,
        held: Samples | None,
        test: Samples | None,
        out: Output | None,
        answers: Mapping[str, Answers],
    ) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Train, merge, and write what changed."""
        recipe, settings = self.recipe, self.recipe.heal
        if settings.augment and settings.distill and settings.teacher == "stream":
            raise InputError("a teacher that is streamed once knows no augmented samples: leave heal.teacher out.")
        folder = partial_of(self.path) / "training"
        groups = settings.make_groups()
        total = model.parameters
        with ExitStack() as stack:

            def ready(model: Model) -> list[Chosen]:
                """Load all of it, and choose and attach what trains."""
                stack.enter_context(model.whole())
                chosen = choose(parts_of(model, masks, new), groups)
                attach(chosen)
                return chosen

            torch.manual_seed(recipe.seed)
            if self.sharded:
                assert model.checkpoint is not None
                trainee = self.open(model.checkpoint.directory)
                chosen = shard(trainee, groups, masks, new)
            else:
                trainee = model
                chosen = ready(model)
            count = sum(parameter.numel() for item in chosen for parameter in item.change.parameters())
            teacher = None
            if dense is not None and settings.teacher == "memory":
                teacher = stack.enter_context(teacher_in_memory(dense, self.sharded))
            elif dense is not None:
                scored = held.groups if held is not None and model.task.blind else ()
                seen = Samples((*samples.groups, *scored))
                teacher = stack.enter_context(teacher_streamed(dense, seen, self.track))
            still = {name: buffer.clone() for name, buffer in statistics_of(trainee.network).items()}
            did = retrain(
                trainee,
                chosen,
                samples,
                held,
                self.given.steps(samples),
                folder,
                recipe.seed,
                teacher,
                self.resume,
                self.watch,
                **settings.retraining,
            )
            if self.sharded:
                values = gather(trained(chosen), keep=out is not None)
                if out is None:
                    return {}, None
                model = out.model
                chosen = ready(model)
                scatter(values, trained(chosen))
                del values  # as much as all that trains
            apart = [item for item in chosen if item.change.apart]
            merged = [item for item in chosen if not item.change.apart]
            changed = detach(merged, merge=did.best_step > 0)  # else what was there before is best
            if not did.best_step:
                undo(apart)
            moved = still if not did.best_step else statistics_of(trainee.network)
            for name, buffer in statistics_of(model.network).items():
                if not torch.equal(moved[name], still[name]):
                    changed[name] = moved[name]
                buffer.copy_(moved[name])
            after = None
            if apart and out is not None:
                with torch.no_grad():
                    whole = model.task.wrap(model.network, model.tokenizer)
                    against = answers.get("dense", NO_ANSWERS)
                    after, _ = measure(whole, recipe.evaluate.source, test, None, self.track, against)
                save_adapter(out.folder / "adapter", apart, str(self.path), model.task.language)
            detach(apart)
            verify(model, masks)
            if out is not None:
                write(model, changed, {} if self.whole else masks, out)
        return {
            "trained": count / total,
            "trained_parameters": count,
            "parameters": total,
            "steps": did.steps,
            **self.given.amount(samples, did.steps * settings.step),
            "losses": list(did.losses),
            "held_out": {str(step): loss for step, loss in did.held_out.items()},
            "best_step": did.best_step,
            "apart": sorted({item.group.name for item in apart}),
        }, after
