"""Prune and heal, once or in rounds: iterative magnitude pruning is `magnitude` and `all`, in several."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import InputError, PrunellaError
from ..machine import pick_device
from ..model.names import find_directory, named
from ..progress import OnStep
from ..pruning import prune_once
from ..recipe import Recipe
from ..report import Report
from ..save import REPORT, begun_as, compare, model_files
from ..tasks import opened
from ..team import Team, team
from ..tensors import write_text
from ..train.schedule import make_schedule
from ..train.shard import asked
from ..workshop import MARK, RUN, Workshop, partial_of, place, workshop
from .line import adapt, check_dtype, check_sharded, check_way
from .run import heal
from .sources import Sources
from .text import Text


def prune_and_heal(
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
    """Prune, to the sparsity of each round and heal, in directories beside the output that go in
    the end. A run that was interrupted continues in the round where it stopped. Of several processes the first one
    prunes, and has the report."""
    rounds = recipe.heal.rounds
    crew = team(pick_device(recipe.device))
    check_way(recipe.heal.way, crew)
    if rounds > 1 and recipe.shape.sparsity is not None:
        raise InputError(f"pattern {recipe.pattern} has one sparsity, which leaves nothing to do in {rounds} rounds.")
    if recipe.format != "dense":
        raise InputError(
            f"healing writes dense checkpoints: leave --format {recipe.format} out, then prunella pack the result."
        )
    names = {name for item in recipe.heal.train for name in item}
    for name in sorted(names & {"new-biases", "lora"} if rounds > 1 else ()):
        raise InputError(f"'{name}' is for one round: what it adds is not there when the next one prunes.")
    task = recipe.make_task()
    with asked() as sharded:
        check_sharded(task, sharded and crew.size > 1)
    trust = {"remote_code": remote_code, "pickles": pickles}
    dense_model = opened(task, model, dtype=recipe.dtype, device=recipe.device, tokenizer=tokenizer, **trust)
    part = recipe.model_copy(update={"heal": recipe.heal.model_copy(update=_part(recipe))})
    check_dtype(dense_model.dtype, recipe.heal.way)  # now, not when the model has been pruned
    given = Text(part, portion=(0, rounds)) if task.language else Sources(part)
    given.check(dense_model)
    dense = recipe.heal.dense or model
    dense = str(Path(dense).resolve()) if Path(dense).exists() else dense
    if task.language:
        dense = str(find_directory(dense, remote_code=remote_code, pickles=pickles))
    shop = None
    if crew.main:
        shop = Workshop(aside_of(path), resume)
        try:
            workshop(path, shop.resumed).close()  # now, not when the model has been pruned
            said = {**_identity(recipe), "model files": model_files(dense_model.checkpoint)}
            if (before := begun_as(shop)) is not None:
                compare(said, before, shop.directory)
            write_text(shop.directory / RUN, json.dumps(said, indent=1) + "\n")
        except BaseException:
            shop.close()
            raise
    crew.barrier()
    try:
        options |= {"tokenizer": tokenizer, "remote_code": remote_code, "pickles": pickles}
        report = _rounds(model, recipe, path, dense, crew, **options)
        if shop:
            shop.remove(done=True)
        return report
    except PrunellaError:
        if shop and {MARK, RUN} >= set(os.listdir(shop.directory)):
            shop.remove()  # nothing was done
        raise
    finally:
        if shop:
            shop.close()


def _rounds(
    model: str,
    recipe: Recipe,
    path: Path,
    dense: str,
    crew: Team,
    *,
    tokenizer: Any,
    watch: OnStep | None,
    **options: Any,
) -> Report:
    """What `prune_and_heal` does in the directory beside the output; what is there already is not done again."""
    aside, rounds = aside_of(path), recipe.heal.rounds
    schedule = make_schedule("imp", rounds, {"rounds": rounds})  # a round is its step
    shares = {"*": recipe.default_sparsity, **recipe.sparsity}
    source, report = model, None
    if recipe.heal.adapt:
        source = str(aside / "adapted")
        if not (aside / "adapted").exists():
            with asked() as sharded:
                adapt(dense, recipe, aside / "adapted", sharded=sharded, watch=watch, **options)
        dense = str(aside / "adapted")
    for k in range(rounds):
        pruned, healed = aside / f"{k + 1}-pruned", path if k == rounds - 1 else aside / f"{k + 1}-healed"
        part = schedule.sparsity(k)
        assert part is not None
        sparsity = {glob: share * part for glob, share in shares.items()}
        plain = recipe.model_copy(
            update={
                "sparsity": recipe.sparsity if recipe.shape.sparsity is not None else sparsity,
                "heal": recipe.heal.model_copy(update={"train": ()}),
            }
        )
        heals = recipe.heal.model_copy(update={"dense": dense, **_part(recipe)})
        if crew.main:
            if not pruned.exists():
                own = tokenizer if source == model else None  # what was written has it
                begun = partial_of(pruned).exists()
                prune_once(source, plain, pruned, resume=begun, tokenizer=own, **options)
            told = Report.read(pruned)
            if k:  # what was pruned is the model of the first round
                first = Report.read(aside / "1-pruned")
                told = replace(told, model=first.model, dense=first.dense, fingerprint=first.fingerprint)
            elif recipe.heal.adapt:  # and not what was made of it
                measured = Report.read(Path(dense)).healing["before"]
                told = replace(told, model={**told.model, **named(model)}, dense={**told.dense, **measured})
            told = replace(told, recipe={**told.recipe, "model": model})
            write_text(pruned / REPORT, json.dumps(told.plain(), indent=1) + "\n")
        crew.barrier()
        if not healed.exists() or healed == path:
            report = heal(
                pruned,
                recipe.model_copy(update={"heal": heals}),
                output=healed,
                resume=True,
                portion=(k, rounds),
                watch=watch,
                **options,
            )
        source = str(healed)
    assert report is not None
    return report


def _part(recipe: Recipe) -> dict[str, Any]:
    """What is another thing in each round: its share of the text. The dense model is trained before all of them."""
    share = {"tokens": recipe.heal.tokens // recipe.heal.rounds} if recipe.make_task().language else {}
    return {**share, "adapt": 0}


def aside_of(path: Path) -> Path:
    """Where what comes before the last round's healing is made."""
    path = place(path)
    return path.with_name(path.name + ".rounds")


def ended(path: Path) -> bool:
    """Was a run killed when its output was there already and only the rounds were not gone yet? They go now."""
    aside = aside_of(path)
    if not (aside / MARK).is_file() or not (place(path) / REPORT).is_file():
        return False
    if Path(str(Report.read(path).healing.get("source"))).parent != aside:
        return False
    Workshop(aside, resume=True).remove(done=True)
    return True


def _identity(recipe: Recipe) -> dict[str, Any]:
    """What must be the same for rounds to go on; files count as the same by any of their names."""
    plain: dict[str, Any] = json.loads(json.dumps(recipe.plain()))
    del plain["model"], plain["heal"]["dense"]
    for part in (plain["calibration"], plain["evaluate"]):
        part["source"] = _file(part["source"])
    plain["heal"]["text"] = [_file(source) for source in plain["heal"]["text"]]
    return plain


def _file(source: str | None) -> str | None:
    return str(Path(source).resolve()) if source and Path(source).is_file() else source
