"""Make transformers know the packed format without importing it: that takes seconds, and not every use of
Prunella needs it. The quantizer registers itself as soon as transformers' own registry is imported."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


class _After(Loader):
    """Loads the registry as its own loader does, then our quantizer into it."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        from . import quantizer  # noqa: F401


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.searching = False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY or self.searching:
            return None
        self.searching = True  # the search below asks all finders, and us among them
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _After(spec.loader)
        return spec


def register() -> None:
    """Register the quantizer now if transformers' registry is there already, else when it comes."""
    if REGISTRY in sys.modules:
        from . import quantizer  # noqa: F401
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
