"""The registry of steps, and how a function becomes one.

Third parties register their own: `@register("mine")` in a file of theirs, then `--step path/to/mine.py:mine`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from .errors import InputError, unknown
from .foreign import Registered, call
from .statistics import statistics
from .statistics.registry import OUTPUTS, taking
from .types import Block, Layer

M = TypeVar("M", bound=Registered)


@dataclass(frozen=True)
class Step:
    """A step with its options, as `make` returns it: `apply` turns a block into one with other masks or weights.

    name:      what users call it
    needs:     the statistics, and outputs of blocks, that it reads
    apply:     block -> block
    per_layer: it looks at one layer at a time, and so can work in `layer` order
    prunes:    it chooses a mask where there is none yet
    options:   all of them, with their values
    """

    name: str
    needs: frozenset[str]
    apply: Callable[[Block], Block]
    per_layer: bool
    prunes: bool
    options: Mapping[str, Any]

    @property
    def beside(self) -> bool:
        """Does it read what only a dense model that runs beside the pruned one can tell?"""
        return "dense" in self.needs or bool(taking("dense_TI", self.needs))

    @property
    def back(self) -> bool:
        """Does it read gradients, and so work on the way back (`order: back`)?"""
        return bool(taking("gradient_NOI", self.needs))


@dataclass(frozen=True)
class Method:
    """A registered function or class and what its signature says."""

    name: str
    needs: frozenset[str]
    function: Callable[..., Any]
    per_layer: bool
    prunes: bool = True

    @property
    def summary(self) -> str:
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    @property
    def options(self) -> dict[str, inspect.Parameter]:
        parameters = inspect.signature(self.function).parameters
        return {k: p for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    @property
    def defaults(self) -> dict[str, Any]:
        return {key: parameter.default for key, parameter in self.options.items()}


steps: dict[str, Method] = {}


def register(
    name: str, needs: Iterable[str] = (), *, prunes: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function a step: a decorator.

    The function turns a `Layer` into a `Layer`, or a `Block` into a `Block`; the annotation of its first argument says
    which. Its keyword arguments are the step's options, with their types and defaults.

    Args:
        name: what users call it.
        needs: the statistics it reads (norm, moments, gram, drift, fisher, gradients, one that is registered, or
            `path/to/file.py:name`), and outputs of blocks (targets, dense); reading any other raises.
        prunes: whether it chooses a mask where there is none yet; if not, the recipe needs another step that does.
    """
    wanted = frozenset(need if need in OUTPUTS else _statistic(need) for need in needs)

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        first = next(iter(inspect.signature(function).parameters))
        kind = typing.get_type_hints(function).get(first)
        if kind not in (Layer, Block):
            raise TypeError(f"the first argument of step '{name}' must be annotated as Layer or Block")
        for need in sorted(wanted & OUTPUTS):
            if kind is Layer:
                raise TypeError(f"step '{name}' works on layers, but `{need}` belong to blocks")
        steps[name] = Method(name, wanted, function, kind is Layer, prunes)
        return function

    return add


def _statistic(name: str) -> str:
    """The name by which the registry knows a statistic, which may be that of a file."""
    if ".py:" in name:
        return lookup("statistic", statistics, name).name
    if name not in statistics:
        raise ValueError(unknown("statistic", name, statistics.keys() | OUTPUTS))
    return name


def each_layer(function: Callable[[Layer], Layer]) -> Callable[[Block], Block]:
    """Lift layer -> layer to block -> block. A layer with target sparsity 0 is left as it is."""

    def apply(block: Block) -> Block:
        return replace(block, layers=tuple(function(la) if la.sparsity > 0 else la for la in block.layers))

    return apply


def find(name: str) -> Method:
    """The registered step `name`, or the one that `path/to/file.py:name` registers."""
    for package in ("steps", "heal"):  # where the built-in ones register themselves, importing this module
        importlib.import_module(f"{__package__}.{package}")
    return lookup("step", steps, name)


def make(name: str, options: Mapping[str, Any] | None = None) -> Step:
    """A step with its options, ready to apply: `make("wanda", {"group": "layer"}).apply(block)`.

    Args:
        name: of a registered step, or `path/to/file.py:name`.
        options: those that differ from the step's defaults.

    Raises:
        InputError: an unknown name, an unknown option or a wrong value.
    """
    method = find(name)
    chosen = checked("step", method, options or {})

    def bound(thing: Any) -> Any:
        where = f"step '{name}' at {'layer' if method.per_layer else 'block'} '{thing.name}'"
        return call(method, where, type(thing), thing, chosen)

    apply = each_layer(bound) if method.per_layer else bound
    return Step(name, method.needs, apply, method.per_layer, method.prunes, method.defaults | chosen)


def lookup(kind: str, methods: Mapping[str, M], name: str) -> M:
    """The method called `name`, or the one that `path/to/file.py:name` registers. Raises InputError."""
    if ".py:" in name:
        path, _, name = name.rpartition(":")
        module = import_file(Path(path), kind)
        own: dict[str, M] = _of_file.setdefault((module, kind), {})  # two files may use one name
        own |= {key: method for key, method in methods.items() if method.function.__module__ == module}
        methods = {**methods, **own}
    if name not in methods:
        raise InputError(unknown(kind, name, methods))
    return methods[name]


def checked(kind: str, method: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the method's signature wants them. Raises InputError for an unknown one or a wrong value."""
    out = dict(options)
    made: Any = method.function
    hints = typing.get_type_hints(made.__init__ if inspect.isclass(made) else made, include_extras=True)
    for key, value in options.items():
        if key not in method.options:
            raise InputError(unknown(f"option of {kind} {method.name}", key, method.options))
        try:
            out[key] = pydantic.TypeAdapter(hints.get(key, Any)).validate_python(value)
        except pydantic.ValidationError as error:
            raise InputError(f"{method.name}.{key}={value}: {error.errors()[0]['msg']}.") from None
    return out


_of_file: dict[tuple[str, str], dict[str, Any]] = {}


def import_file(path: Path, kind: str) -> str:
    """Run a file once; the name of its module, in `sys.modules`. Raises InputError."""
    if not path.is_file():
        raise InputError(f"{kind} file '{path}' does not exist.")
    key = f"prunella_step_{path.stem}_{abs(hash(path.resolve()))}"
    if key in sys.modules:
        return key
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[key]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{kind} file '{path}' cannot be imported: {reason}") from error
    return key
