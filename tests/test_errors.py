from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from prunella.errors import command


@pytest.mark.parametrize("name", ["plain", "two words", "it's", "$HOME;`x`", "[b]*?", ""])
def test_a_command_is_read_by_a_shell_as_it_was_meant(name: str) -> None:
    assert shlex.split(command("pack", Path("a") / name, "-o", name)) == [
        *("prunella", "pack", str(Path("a") / name), "-o", name)
    ]


def test_a_command_with_plain_names_is_printed_as_one_types_it() -> None:
    assert command("pack", "runs/out-1", "-o", "packed") == "prunella pack runs/out-1 -o packed"
