from __future__ import annotations

from pathlib import Path

import pytest

from prunella import catalogue
from prunella.allocate import allocations
from prunella.heal import groups
from prunella.registry import Method, steps
from prunella.tasks import tasks


@pytest.mark.parametrize(
    ("kind", "registry"), [("step", steps), ("allocation", allocations), ("healing", groups), ("task", tasks)]
)
def test_sources_say_of_every_method_what_its_registry_says(
    monkeypatch: pytest.MonkeyPatch, kind: str, registry: dict[str, Method]
) -> None:
    monkeypatch.setattr(catalogue, "_registered", dict)  # the sources alone
    own = {name: method for name, method in registry.items() if method.function.__module__.startswith("prunella.")}
    read = {entry.name: entry for entry in catalogue.entries() if entry.kind == kind}
    assert list(read) == sorted(own) == catalogue.names(kind)
    for name, method in own.items():
        assert read[name].summary == method.summary
        assert read[name].options == {key: parameter.default for key, parameter in method.options.items()}


def test_a_default_that_is_no_constant_is_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("@register('mine')\ndef mine(layer, *, one=1, two=TWO):\n    'Mine.'\n")
    with pytest.raises(LookupError, match="TWO is no constant"):
        list(catalogue._entries(path))
    path.write_text("TWO = 1 + 1j\n@register('mine')\ndef mine(layer, *, one=-1, two=TWO, three):\n    'Mine.'\n")
    (entry,) = catalogue._entries(path)
    assert (entry.name, entry.summary) == ("mine", "Mine.")
    assert {**entry.options, "three": None} == {"one": -1, "two": 1 + 1j, "three": None}
