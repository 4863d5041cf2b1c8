"""Healing: a pruned directory becomes a healed one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..errors import ModelError, command
from ..machine import fork_random, pick_device
from ..progress import OnStep, Track, no_track
from ..recipe import Recipe
from ..report import Report
from ..train.shard import asked
from ..workshop import check_output, finished
from .line import Line
from .report import calibrated

DEFAULT: tuple[dict[str, dict[str, Any]], ...] = ({"mask-lora": {}},)  # what trains if nobody says what


def heal(
    directory: str | Path,
    recipe: Recipe | Mapping[str, Any] | None = None,
    *,
    output: str | Path,
    resume: bool = False,
    track: Track = no_track,
    watch: OnStep | None = None,
    remote_code: bool = False,
    pickles: bool = False,
    portion: tuple[int, int] = (0, 1),
) -> Report:
    """Retrain a pruned model, the mask held.

    Args:
        directory: a model that Prunella pruned (the masks saved with it hold), or any other model with zeros (they
            are the mask).
        recipe: its `heal` section says what trains and how; `evaluate`, `seed`, `device` and `calibration` count too
            (the calibration is that of the pruning, if nothing else is said), the rest does not.
        output: directory for the result, exactly as sparse; it appears when it is whole. With `lora`, which is kept
            apart, its subdirectory `adapter` has PEFT's format.
        resume: continue the run that was interrupted while it wrote `output`, or begin it.
        track: wraps loops over blocks, `track(range, what, total)`, to show progress.
        watch: called after each step, `watch(step, steps, loss)`.
        remote_code, pickles: trust code that comes with the model, weights that are pickles.
        portion: (k, n): of n times as much text take the k-th portion, from 0, as the rounds of iterative pruning do.

    Returns:
        The report of the pruning with a section on the healing, as it stands in prunella.json.

    Raises:
        PrunellaError: anything about the input that the user can mend; a loss that is not finite.

    >>> import prunella
    >>> report = prunella.heal("pruned", {"heal": {"train": ["mask-lora", "norms"]}}, output="healed")  # doctest: +SKIP
    """
    if not isinstance(recipe, Recipe):
        recipe = Recipe.of(calibrated(directory, recipe or {}))
    recipe = recipe.resolved(str(directory))
    if not recipe.heal.train:
        recipe = recipe.model_copy(update={"heal": recipe.heal.model_copy(update={"train": DEFAULT})})
    path = Path(output)
    if finished(path) and resume:
        return Report.read(path)
    check_output(path)
    if recipe.make_task().language and not Path(directory).is_dir():
        raise ModelError(
            f"'{directory}' is not a directory: prune a model first, {command('prune', 'MODEL', '-o', directory)}."
        )
    with ExitStack() as stack:
        stack.enter_context(fork_random(pick_device(recipe.device)))
        sharded = stack.enter_context(asked())
        run = Line(Path(directory), recipe, path, resume, track, watch, remote_code, pickles, portion, sharded=sharded)
        return run.all()
