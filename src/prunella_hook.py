"""What other libraries should know of Prunella, told to them when they are imported, and not before.

A module of its own, outside of the package, so that it costs nothing: no torch, nothing of Prunella.

    transformers   the quantizer that loads packed models, once `prunella` is imported
    lm-eval        the model type `prunella`. The harness has a table of models and no plugins, so torch, which it
                   imports, calls `register` (entry point torch.backends): `lm_eval --model prunella` works without
                   anybody importing Prunella
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _After(Loader):
    """Loads a module as its own loader does, and then does something."""

    def __init__(self, loader: Loader, do: Callable[[], object]):
        self.loader, self.do = loader, do

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.do()


class _Finder(MetaPathFinder):
    def __init__(self, name: str, do: Callable[[], object]):
        self.name, self.do, self.searching = name, do, False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name or self.searching:
            return None
        self.searching = True  # the search below asks all finders, and us among them
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _After(spec.loader, self.do)
        return spec


def after_import(name: str, do: Callable[[], object]) -> None:
    """Call `do` as soon as the module `name` is imported: now if it is already."""
    if name in sys.modules:
        do()
    elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, do))


def register() -> None:
    """Make `lm_eval --model prunella` work."""
    after_import("lm_eval.models", _model)


def _model() -> None:
    from lm_eval.api.registry import model_registry

    if "prunella" not in model_registry:
        model_registry.register("prunella", target="prunella.harness:PrunellaLM")
