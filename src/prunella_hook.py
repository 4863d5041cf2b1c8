"""What other libraries should know of Prunella, told to them when they are imported, and not before.

A module of its own, outside of the package, so that it costs nothing: no torch, nothing of Prunella.

    transformers   how packed models are loaded; Prunella itself is imported when the first of them is
    lm-eval        the model type `prunella`
    torchvision    operators that it takes for granted, where its compiled ones do not load beside this torch

The first two have tables and no plugins, so torch, which they import, calls `register` (entry point torch.backends):
packed models load, and `lm_eval --model prunella` works, without anybody importing Prunella. Without the entry point
(switched off, or Prunella not installed but on the path) `import prunella` does it. Where torchvision is installed
transformers imports it for any model at all.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder, ModuleSpec
from types import ModuleType
from typing import Any


class _Around(Loader):
    """Loads a module as its own loader does, and does something before or after."""

    def __init__(self, loader: Loader, do: Callable[[], object], before: bool):
        self.loader, self.do, self.before = loader, do, before

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader  # it knows the module's source, and more
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        if self.before:
            self.do()
        self.loader.exec_module(module)
        if not self.before:
            self.do()


class _Finder(MetaPathFinder):
    def __init__(self, name: str, do: Callable[[], object], before: bool = False):
        self.name, self.do, self.before, self.searching = name, do, before, False

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name or self.searching:
            return None
        self.searching = True  # the search below asks all finders, and us among them
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Around(spec.loader, self.do, self.before)
        return spec


def after_import(name: str, do: Callable[[], object]) -> None:
    """Call `do` as soon as the module `name` is imported: now if it is already."""
    if name in sys.modules:
        do()
    else:
        _watch(_Finder(name, do))


def before_import(name: str, do: Callable[[], object]) -> None:
    """Call `do` just before the module `name` is imported: never if it is already."""
    if name not in sys.modules:
        _watch(_Finder(name, do, before=True))


def _watch(finder: _Finder) -> None:
    if not any(isinstance(other, _Finder) and other.name == finder.name for other in sys.meta_path):
        sys.meta_path.insert(0, finder)


def register() -> None:
    """Make packed models load, `lm_eval --model prunella` work, and torchvision import."""
    table = sys.modules.get("transformers.quantizers.auto")
    # If that very module is importing torch, its tables are to come, and so are the models that need them.
    half = table is not None and not hasattr(table, "AUTO_QUANTIZATION_CONFIG_MAPPING")
    after_import("transformers.modeling_utils" if half else "transformers.quantizers.auto", _quantizer)
    after_import("lm_eval.models", _model)
    before_import("torchvision", _operators)


class _Config:
    """In transformers' table until the first packed model is loaded: to import Prunella takes a second."""

    @staticmethod
    def from_dict(*arguments: Any, **options: Any) -> Any:
        from prunella.packed.quantizer import PrunellaConfig  # which puts itself into the table

        return PrunellaConfig.from_dict(*arguments, **options)


def _quantizer() -> None:
    sys.modules["transformers.quantizers.auto"].AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("prunella", _Config)


def _model() -> None:
    from lm_eval.api.registry import model_registry

    if "prunella" not in model_registry:
        model_registry.register("prunella", target="prunella.evaluate.harness:PrunellaLM")


# What torchvision describes to torch when it is imported, without asking whether its compiled operators are there.
_DESCRIBED = ("nms", "qnms")
_declared: list[Any] = []  # what is declared is gone when its library is


def _operators() -> None:
    """Before torchvision is imported: tell torch of the operators that this import takes for granted, where its
    compiled ones do not load, as those made for CUDA beside a torch for CPUs. Its transforms then work, and with them
    transformers and timm; to select boxes is still refused, by torchvision itself. On a healthy installation nothing
    is declared."""
    torch: Any = importlib.import_module("torch")
    found = importlib.util.find_spec("torchvision")
    if found is None or _declared or any(hasattr(torch.ops.torchvision, name) for name in _DESCRIBED):
        return
    for place in found.submodule_search_locations or ():
        compiled = FileFinder(place, (ExtensionFileLoader, EXTENSION_SUFFIXES)).find_spec("_C")
        if compiled is not None and compiled.origin is not None:
            with contextlib.suppress(OSError):
                torch.ops.load_library(compiled.origin)  # as torchvision is about to
                return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in _DESCRIBED:
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
