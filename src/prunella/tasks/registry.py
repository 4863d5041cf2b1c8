"""The registry of tasks.

Third parties register their own: `@register_task("mine")` in a file of theirs, then `--task path/to/mine.py:mine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..foreign import blamed
from ..model.task import Task
from ..registry import Method, checked, lookup

T = TypeVar("T", bound=type[Task])

tasks: dict[str, Method] = {}


def register_task(name: str) -> Callable[[T], T]:
    """Make a class derived from `Task` a task: a decorator.

    The keyword arguments of its `__init__` are the task's options, with their types and defaults.

    Args:
        name: what users call it.
    """

    def add(kind: T) -> T:
        if not (isinstance(kind, type) and issubclass(kind, Task)):
            raise TypeError(f"task '{name}' is no class derived from Task")
        kind.name = name
        tasks[name] = Method(name, frozenset(), kind, per_layer=False)
        return kind

    return add


def find_task(name: str) -> Method:
    """The registered task `name`, or the one that `path/to/file.py:name` registers. Raises InputError."""
    return lookup("task", tasks, name)


def make_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """A task with its options. Raises InputError for an unknown name, an unknown option or a wrong value."""
    method = find_task(name)
    chosen = checked("task", method, options or {})
    with blamed(method.function, f"task '{name}'"):
        task: Task = method.function(**chosen)
    task.name = name
    return task
