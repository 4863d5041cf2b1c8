"""Lists every built-in method from its source text: nothing is imported, so that listing needs no torch."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = {  # decorator: kind
    "register": "step",
    "register_allocation": "allocation",
    "trains": "healing",
    "register_task": "task",
}
_REGISTRIES = {
    "step": ("prunella.registry", "steps"),
    "allocation": ("prunella.allocate.registry", "allocations"),
    "healing": ("prunella.train.parts", "groups"),
    "task": ("prunella.tasks.registry", "tasks"),
}
_ROOT = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """A method: its kind and name, the first line of its docstring, its options and their defaults."""

    kind: str
    name: str
    summary: str
    options: dict[str, Any]


def entries() -> list[Entry]:
    """All methods, by kind and name: those that come with Prunella, and what else this process has registered."""
    found = {
        (entry.kind, entry.name): entry
        for package in ("steps", "allocate", "heal", "tasks")
        for path in (_ROOT / package).glob("*.py")
        for entry in _entries(path)
    }
    found = _registered() | found
    order = list(_REGISTRIES)
    return sorted(found.values(), key=lambda entry: (order.index(entry.kind), entry.name))


def names(kind: str) -> list[str]:
    """The methods of one kind."""
    return [entry.name for entry in entries() if entry.kind == kind]


def _registered() -> dict[tuple[str, str], Entry]:
    """The methods in those registries that this process has imported."""
    return {
        (kind, name): Entry(kind, name, method.summary, {key: p.default for key, p in method.options.items()})
        for kind, (module, table) in _REGISTRIES.items()
        if module in sys.modules
        for name, method in vars(sys.modules[module])[table].items()
    }


def _entries(path: Path) -> Iterator[Entry]:
    for made in _parsed(path).body:
        if not isinstance(made, ast.FunctionDef | ast.ClassDef):
            continue
        for decorator in made.decorator_list:
            if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id in KINDS:
                kind, name = KINDS[decorator.func.id], ast.literal_eval(decorator.args[0])
                functions = (f for f in getattr(made, "body", []) if getattr(f, "name", "") == "__init__")
                function = next(functions, None) if isinstance(made, ast.ClassDef) else made
                arguments = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True) if function else ()
                options = {argument.arg: _value(default, path) for argument, default in arguments}
                summary = inspect.cleandoc(ast.get_docstring(made) or "").split("\n")[0]
                yield Entry(kind, name, summary, options)


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _value(node: ast.expr | None, path: Path) -> Any:
    """The value of a default: a literal, or a constant of this file or of one that it imports from."""
    if not isinstance(node, ast.Name):
        return inspect.Parameter.empty if node is None else ast.literal_eval(node)
    for statement in _parsed(path).body:
        if isinstance(statement, ast.Assign) and any(ast.unparse(t) == node.id for t in statement.targets):
            return _value(statement.value, path)
        if isinstance(statement, ast.ImportFrom) and any((a.asname or a.name) == node.id for a in statement.names):
            home = path.parents[statement.level - 1].joinpath(*(statement.module or "").split("."))
            return _value(ast.Name(node.id), home.with_suffix(".py"))
    raise LookupError(f"{path}: {node.id} is no constant")
