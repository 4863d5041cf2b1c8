"""Prune and heal, once or in rounds: iterative magnitude pruning is `magnitude` and `all`, in several."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..load import find_directory, load_model, pick_device
from ..recipe import Recipe
from ..report import Report
from ..save import REPORT, partial_of, unfinished
from ..tensors import write_text
from .processes import asked, check_way, world
from .run import adapt, check_dtype, check_text, heal

RECIPE = "recipe.json"


def schedule(target: float, rounds: int) -> list[float]:
    """The sparsity after each round, s_k = s (1 - (1 - k/K)^3): large steps first, the last one ends at `target`.

    Zhu & Gupta, "To prune, or not to prune", 2017.
    """
    return [target * (1 - (1 - k / rounds) ** 3) for k in range(1, rounds)] + [target]


def prune_and_heal(
    prune: Callable[..., Report],
    model: str,
    recipe: Recipe,
    path: Path,
    *,
    tokenizer: Any,
    resume: bool,
    remote_code: bool,
    pickles: bool,
    **options: Any,
) -> Report:
    """Prune, by `prunella.prune`, to the sparsity of each round and heal, in directories beside the output that go in
    the end. A run that was interrupted continues in the round where it stopped. Of several processes the first one
    prunes, and has the report."""
    rounds = recipe.heal.rounds
    team = world(pick_device(recipe.device))
    check_way(recipe.heal.way, team)
    if rounds > 1 and recipe.shape.sparsity is not None:
        raise InputError(f"pattern {recipe.pattern} has one sparsity, which leaves nothing to do in {rounds} rounds.")
    if recipe.packing is not None:
        raise InputError("healing writes dense checkpoints: leave --format packed out, then prunella pack the result.")
    names = {name for item in recipe.heal.train for name in item}
    for name in sorted(names & {"new-biases", "lora"} if rounds > 1 else ()):
        raise InputError(f"'{name}' is for one round: what it adds is not there when the next one prunes.")
    aside = path.with_name(path.name + ".rounds")
    if aside.exists() and not resume:
        raise unfinished(aside)
    said = {**json.loads(json.dumps(recipe.plain())), "model": model}
    before = json.loads((aside / RECIPE).read_text(encoding="utf-8")) if (aside / RECIPE).is_file() else said
    if before != said:
        keys = sorted(key for key in said.keys() | before.keys() if said.get(key) != before.get(key))
        raise InputError(
            f"the unfinished run in '{aside}' was another one: {', '.join(keys)} differ. Repeat its command with"
            " --resume, or delete that directory."
        )
    shares = {
        glob: schedule(share, rounds) for glob, share in {"*": recipe.default_sparsity, **recipe.sparsity}.items()
    }
    opened = load_model(model, dtype=recipe.dtype, device=recipe.device, remote_code=remote_code, pickles=pickles)
    part = recipe.heal.model_copy(update={"tokens": recipe.heal.tokens // rounds, "adapt": 0})
    check_dtype(opened.dtype, recipe.heal.way)  # now, not when the model has been pruned
    check_text(opened, recipe.model_copy(update={"heal": part}), rounds)
    dense = find_directory(recipe.heal.dense or model, remote_code=remote_code, pickles=pickles)
    options |= {"remote_code": remote_code, "pickles": pickles}
    source, report = model, None

    def goes_on(directory: Path) -> bool:
        """Was it begun? All processes look before one writes."""
        begun = resume and partial_of(directory).exists()
        team.wait_for_everyone()
        return begun

    if recipe.heal.adapt:
        source = str(aside / "adapted")
        if not (aside / "adapted").exists():
            with asked() as sharded:
                begun = goes_on(aside / "adapted")
                adapt(str(dense), recipe, output=aside / "adapted", resume=begun, sharded=sharded, **options)
        dense = aside / "adapted"
        if team.is_main_process:
            write_text(aside / RECIPE, json.dumps(said, indent=1) + "\n")
    for k in range(rounds):
        pruned, healed = aside / f"{k + 1}-pruned", path if k == rounds - 1 else aside / f"{k + 1}-healed"
        sparsity = {glob: steps[k] for glob, steps in shares.items()}
        plain = recipe.model_copy(
            update={
                "sparsity": recipe.sparsity if recipe.shape.sparsity is not None else sparsity,
                "heal": recipe.heal.model_copy(update={"train": ()}),
            }
        )
        begun = goes_on(pruned)
        if team.is_main_process:
            if not pruned.exists():
                own = tokenizer if source == model else None  # what was written has it
                prune(source, plain, output=pruned, resume=begun, tokenizer=own, **options)
            write_text(aside / RECIPE, json.dumps(said, indent=1) + "\n")
            told = Report.read(pruned)
            if k:  # what was pruned is the model of the first round
                first = Report.read(aside / "1-pruned")
                told = replace(told, model=first.model, dense=first.dense, fingerprint=first.fingerprint)
            elif recipe.heal.adapt:  # and not what was made of it
                measured = Report.read(dense).healing["before"]
                told = replace(told, model={**told.model, "name": model}, dense={**told.dense, **measured})
            told = replace(told, recipe={**told.recipe, "model": model})
            write_text(pruned / REPORT, json.dumps(told.plain(), indent=1) + "\n")
        team.wait_for_everyone()
        if not healed.exists() or healed == path:
            heals = recipe.model_copy(update={"heal": part.model_copy(update={"dense": str(dense)})})
            report = heal(pruned, heals, output=healed, resume=goes_on(healed), portion=(k, rounds), **options)
        source = str(healed)
    if team.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    assert report is not None
    return report
