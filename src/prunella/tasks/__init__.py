"""Tasks: what networks are for. One file a task.

A task is a class derived from `Task`, with its options as keyword arguments of `__init__`:

    @register_task("mine")
    class Mine(Task):
        def samples(self, model, source, count, *, used=0, seed=0, test=False): ...
        def losses(self, outputs, batch): ...
"""

from ..model.task import Task
from . import captions, classify, images, masked, module, seq2seq, speech, text  # noqa: F401  (importing registers)
from .opening import AUTO, open_model, opened, task_of
from .registry import find_task, make_task, register_task, tasks

__all__ = ["AUTO", "Task", "find_task", "make_task", "open_model", "opened", "register_task", "task_of", "tasks"]
