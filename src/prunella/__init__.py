"""Prune a neural network in one shot.

>>> import prunella
>>> report = prunella.prune("smollm2-135m", {"steps": ["wanda"]}, output="pruned")  # doctest: +SKIP

Everything is imported when it is first asked for, so that the command line can explain itself without torch.
"""

import importlib as _importlib
import sys as _sys
import types as _types
import typing as _typing

import prunella_hook as _hook

from .version import __version__ as __version__

if _typing.TYPE_CHECKING:
    from .backward import gradients
    from .errors import InputError, ModelError, NumericalError, PrunellaError, StatisticError
    from .evaluate.perplexity import perplexity
    from .heal.run import heal
    from .iterative import Level, prune_in_rounds
    from .lenses import Inputs, Lens, register_lens
    from .model.names import find_directory
    from .model.network import Model
    from .model.state import load_state
    from .packing import load_packed
    from .pattern import keep
    from .prune import prune
    from .recipe import Recipe
    from .registry import Step, make, register
    from .report import Report
    from .statistics import register_statistic
    from .tasks import Task, open_model, register_task
    from .tasks.text import Perplexity, load_model, wrap_model
    from .tensors import read_masks
    from .torch_prune import to_torch_prune
    from .train.distil import distil
    from .types import Block, Layer, Pattern, Stats

__all__ = [
    "Block",
    "InputError",
    "Inputs",
    "Layer",
    "Lens",
    "Level",
    "Model",
    "ModelError",
    "NumericalError",
    "Pattern",
    "Perplexity",
    "PrunellaError",
    "Recipe",
    "Report",
    "StatisticError",
    "Stats",
    "Step",
    "Task",
    "distil",
    "find_directory",
    "gradients",
    "heal",
    "keep",
    "load_model",
    "load_packed",
    "load_state",
    "make",
    "open_model",
    "perplexity",
    "prune",
    "prune_in_rounds",
    "read_masks",
    "register",
    "register_lens",
    "register_statistic",
    "register_task",
    "to_torch_prune",
    "wrap_model",
]

_HOMES = {
    "backward": ("gradients",),
    "errors": ("InputError", "ModelError", "NumericalError", "PrunellaError", "StatisticError"),
    "evaluate.perplexity": ("perplexity",),
    "heal.run": ("heal",),
    "iterative": ("Level", "prune_in_rounds"),
    "lenses": ("Inputs", "Lens", "register_lens"),
    "model.names": ("find_directory",),
    "model.network": ("Model",),
    "model.state": ("load_state",),
    "packing": ("load_packed",),
    "pattern": ("keep",),
    "prune": ("prune",),
    "recipe": ("Recipe",),
    "registry": ("Step", "make", "register"),
    "report": ("Report",),
    "statistics": ("register_statistic",),
    "tasks": ("Task", "open_model", "register_task"),
    "tasks.text": ("Perplexity", "load_model", "wrap_model"),
    "tensors": ("read_masks",),
    "torch_prune": ("to_torch_prune",),
    "train.distil": ("distil",),
    "types": ("Block", "Layer", "Pattern", "Stats"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


class _Package(_types.ModuleType):
    """This package: a public name, or a module, is imported when it is first asked for."""

    def __getattr__(self, name: str) -> _typing.Any:
        if name in _HOME:
            value = getattr(_importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
            vars(self)[name] = value
            return value
        if not name.startswith("_"):
            try:
                return _importlib.import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")

    def __setattr__(self, name: str, value: object) -> None:
        # Importing the modules `prune` and `heal` would put them in the place of the functions of these names.
        if not (name in _HOME and isinstance(value, _types.ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *__all__})


_sys.modules[__name__].__class__ = _Package
_hook.register()  # it has been, where torch calls what is installed beside it

del _hook
