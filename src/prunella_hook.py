"""What other libraries should know of Prunella, told to them when they are imported, and not before.

A module of its own, outside of the package, so that it costs nothing: no torch, nothing of Prunella.

    transformers   how packed models are loaded; Prunella itself is imported when the first of them is
    lm-eval        the model type `prunella`

Both have tables and no plugins, so torch, which they import, calls `register` (entry point torch.backends): packed
models load, and `lm_eval --model prunella` works, without anybody importing Prunella. Without the entry point (switched
off, or Prunella not installed but on the path) `import prunella` does it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _After(Loader):
    """Loads a module as its own loader does, and then does something."""

    def __init__(self, loader: Loader, do: Callable[[], object]):
        self.loader, self.do = loader, do

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader  # it knows the module's source, and more
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
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
    """Make packed models load, and `lm_eval --model prunella` work."""
    table = sys.modules.get("transformers.quantizers.auto")
    # If that very module is importing torch, its tables are to come, and so are the models that need them.
    half = table is not None and not hasattr(table, "AUTO_QUANTIZATION_CONFIG_MAPPING")
    after_import("transformers.modeling_utils" if half else "transformers.quantizers.auto", _quantizer)
    after_import("lm_eval.models", _model)


class _Config:
    """In transformers' table until the first packed model is loaded: to import Prunella takes a second."""

    @staticmethod
    def from_dict(*arguments: Any, **options: Any) -> Any:
        from prunella.sparse.quantizer import PrunellaConfig  # which puts itself into the table

        return PrunellaConfig.from_dict(*arguments, **options)


def _quantizer() -> None:
    sys.modules["transformers.quantizers.auto"].AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("prunella", _Config)


def _model() -> None:
    from lm_eval.api.registry import model_registry

    if "prunella" not in model_registry:
        model_registry.register("prunella", target="prunella.evaluate.harness:PrunellaLM")
