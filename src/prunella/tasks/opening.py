"""From a name to its task, and to a model that is open for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..foreign import blamed
from ..model.built_in import BUILT_IN
from ..model.files import read_json
from ..model.hub import config_of
from ..model.names import at_revision
from ..model.network import Model
from ..model.task import Task
from ..model.timm_models import known_to_timm
from .registry import make_task, tasks

AUTO = "auto"  # the task that the model's files name
FALLBACK = "text"  # which says best what is wrong with a model that none claims


def task_of(model: Any) -> dict[str, dict[str, Any]]:
    """What a model is for, {name of the task: its options}: as the report in its directory says, else the first task
    that claims its name or its config (`Task.claims`).

    Args:
        model: hub id, directory, .gguf file or built-in name, or a network in memory.
    """
    if isinstance(model, Model):
        return {model.task.name: {}}
    if not isinstance(model, str | Path):
        config: Any = getattr(model, "config", None)
        plain = config.to_dict() if hasattr(config, "to_dict") else {}
        return _claimed("", {**plain, "architectures": [type(model).__name__], **known_to_timm(model)})
    name, path = str(model), Path(model)
    recipe = read_json(path / "prunella.json").get("recipe")
    if isinstance(recipe, dict):
        said = recipe.get("task", FALLBACK)
        return {said: {}} if isinstance(said, str) else {str(key): dict(value) for key, value in said.items()}
    if path.is_dir():
        return _claimed(name, read_json(path / "config.json"))
    if name in BUILT_IN:
        return {BUILT_IN[name].task: {}}
    local = path.exists() or path.suffix or any(kind.claims(name, {}) for kind in _kinds())
    return _claimed(name, {} if local else config_of(name))


def _kinds() -> list[Any]:
    return [method.function for method in tasks.values()]


def _claimed(name: str, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {next((kind.name for kind in _kinds() if kind.claims(name, config)), FALLBACK): {}}


def open_model(
    name: str, task: str = AUTO, *, revision: str | None = None, dtype: str = AUTO, device: str = AUTO, **opening: Any
) -> Model:
    """A model by its name, for what it is for; its weights are not read yet where they need not be.

    Args:
        name: hub id, directory, .gguf file or built-in name, or what else a task opens.
        task: what it is for, by name; `auto`: `task_of` says it.
        revision: of a hub's model: a branch, tag or commit.
        dtype, device, opening: as for `prunella.load_model`; opening is tokenizer, remote_code, pickles, packed.

    Raises:
        InputError: no such task.
        ModelError: no such model, or none for this task.
    """
    name = at_revision(name, revision)
    found = task_of(name) if task == AUTO else {task: {}}
    made = next(make_task(kind, options) for kind, options in found.items())
    return opened(made, name, dtype=dtype, device=device, **opening)


def opened(task: Task, name: str, **opening: Any) -> Model:
    """A model that a task opens. Raises ModelError, with the task that its files are for where that is another one."""
    try:
        with blamed(type(task), f"task '{task.name}'"):
            return task.open(name, **opening)
    except ModelError as error:
        fits = next(iter(task_of(name)))
        if fits not in (task.name, FALLBACK):
            error.args = (f"{error} Its files say that it is for task '{fits}': leave --task out.",)
        raise
