"""Prune a language model in one shot.

>>> import prunella
>>> report = prunella.prune("smollm2-135m", {"steps": ["wanda"]}, output="pruned")  # doctest: +SKIP
"""

__version__ = "0.1.0.dev0"

from . import sparse as _sparse  # registers the packed format with transformers
from . import steps as _steps  # registers the built-in methods
from .errors import InputError, ModelError, NumericalError, PrunellaError, StatisticError
from .evaluate import Perplexity, perplexity
from .heal.run import heal
from .load import Model, find_directory, load_model, wrap_model
from .pattern import keep
from .prune import prune
from .recipe import Recipe
from .registry import Step, make, register
from .report import Report
from .tensors import read_masks
from .types import Block, Layer, Pattern, Stats

del _sparse, _steps

__all__ = [
    "Block",
    "InputError",
    "Layer",
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
    "find_directory",
    "heal",
    "keep",
    "load_model",
    "make",
    "perplexity",
    "prune",
    "read_masks",
    "register",
    "wrap_model",
]
