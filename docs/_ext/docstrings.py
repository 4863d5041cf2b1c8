"""The docstrings of this project, as Sphinx takes them.

Fields and keys stand in them as an aligned table of words,

    name:   what it is
    other:  what that is, which may
            go on

and that is made a list here. Bars are bars, not the substitutions of reStructuredText. Sections (Args, Raises) are
Google's.
"""

import re
from typing import Any

from sphinx.application import Sphinx
from sphinx.ext.napoleon import Config, GoogleDocstring

NAMED = re.compile(r"(\w+(?:, \w+)*): +(\S.*)")


def _process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    listed = [line for paragraph in _paragraphs(lines) for line in _listed(paragraph)]
    # As of a function, whatever it is: of a property all before a colon would be taken for its type.
    lines[:] = GoogleDocstring(listed, Config(), app, "function", name, obj, options).lines()


def _paragraphs(lines: list[str]) -> list[list[str]]:
    """Lines up to, and with, the next empty one."""
    out: list[list[str]] = [[]]
    for line in lines:
        out[-1].append(line)
        if not line:
            out.append([])
    return out


def _listed(paragraph: list[str]) -> list[str]:
    """The paragraph; a table of words as a list of them."""
    if not paragraph or not NAMED.fullmatch(paragraph[0]):
        return [line.replace("|", "\\|") for line in paragraph]
    out: list[str] = []
    for line in paragraph:
        if match := NAMED.fullmatch(line):
            out += ["", f"* {', '.join(f'``{word}``' for word in match[1].split(', '))}: {match[2]}"]
        else:
            out.append(f"  {line.strip()}" if line else "")
    return out


def _signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, str | None] | None:
    """Types by their names alone. None of a recipe, which is made from plain data."""
    if hasattr(obj, "model_fields"):
        return "", None
    if not signature:
        return None
    short = re.sub(r"~(?:\w+\.)+|TypeAliasForwardRef\('(\w+)'\)", r"\1", signature)
    return re.sub(r"<function (\w+)>", r"\1", short.replace("<factory>", "...")), returns


def setup(app: Sphinx) -> dict[str, bool]:
    """Make reStructuredText of docstrings."""
    app.connect("autodoc-process-docstring", _process)
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
