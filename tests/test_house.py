"""The house: which file may import which. The rooms are the table in docs/architecture.md, from the lowest up."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "prunella"
FILES = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}
PAGE = ROOT / "docs" / "architecture.md"

# A model has a task, and a task opens models: one of the two can only name the other's type.
TYPES = {(f"model/{name}.py", "model/task.py") for name in ("cut", "network", "open")}

# A registry finds what comes with Prunella by importing its folder, when it is first asked for something.
BY_NAME = {"__init__.py", "registry.py", "train/parts.py"}

# Files of more than 400 lines, and why.
LONG = {
    "recipe.py": "every key of a recipe, and what is refused of them: one place to read",
}

Arrow = tuple[str, str, int]  # the importing file, the imported one, the line


def module_of(file: str) -> str:
    """The name of a file as a module."""
    return ".".join(("prunella", *Path(file).with_suffix("").parts)).removesuffix(".__init__")


MODULES = {module_of(file): file for file in FILES}


def imports(file: str) -> Iterator[Arrow]:
    """What a file imports of Prunella, wherever it says so: at its top, in a function, for types alone."""
    home = module_of(file) if file.endswith("__init__.py") else module_of(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[file].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = resolve_name("." * node.level + (node.module or ""), home)
            for name in (f"{base}.{alias.name}" for alias in node.names):
                yield file, MODULES.get(name, MODULES[base]), node.lineno
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "prunella" for name in names), f"{file}:{node.lineno} is not relative"


ARROWS = sorted({arrow for file in FILES for arrow in imports(file)})


def rooms() -> list[tuple[str, list[str]]]:
    """The table of rooms: the name of each, and its files and folders."""
    section = PAGE.read_text(encoding="utf-8").partition("## The rooms")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([\w ,]+) \| (`.*?) \|", section, re.MULTILINE)
    return [(name, re.findall(r"`([\w/.]+)`", files)) for name, files in rows]


def room_of() -> dict[str, int]:
    """The number of each file's room. A file that is named is there, and not where its folder is."""
    named = {place: number for number, (_, places) in enumerate(rooms()) for place in places}
    assert sum(len(places) for _, places in rooms()) == len(named), "a file or folder is in two rooms"
    homes = {file: next((p for p in (file, f"{file.split('/')[0]}/") if p in named), None) for file in FILES}
    assert not (lost := [file for file, home in homes.items() if home is None]), f"in no room: {lost}"
    assert not (gone := set(named) - set(homes.values())), f"named in a room, and not there: {gone}"
    return {file: named[home] for file, home in homes.items() if home is not None}


def test_imports_go_down_the_rooms() -> None:
    room, names = room_of(), [name for name, _ in rooms()]
    assert len(names) > 10
    up = [
        f"{file}:{line} ({names[room[file]]}) imports {target} ({names[room[target]]})"
        for file, target, line in ARROWS
        if room[target] > room[file]
    ]
    assert not up, "\n".join(up)


def test_imports_make_no_circle() -> None:
    below: dict[str, set[str]] = {file: set() for file in FILES}
    for file, target, _ in ARROWS:
        if (file, target) not in TYPES:
            below[file].add(target)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(reversed(error.args[1])))


def test_what_is_imported_by_name_is_known() -> None:
    found = {file for file, path in FILES.items() if "import_module(" in path.read_text(encoding="utf-8")}
    assert found == BY_NAME


def test_files_are_short() -> None:
    long = {file for file, path in FILES.items() if path.read_text(encoding="utf-8").count("\n") > 400}
    assert long == set(LONG)
