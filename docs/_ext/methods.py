"""What the registries and the signatures say about methods, as tables: nothing of it is typed twice.

```{methods} step        every step in a row, with a link to its page
```{options} step wanda  the options of one: values, default, meaning
```{keys} heal           the keys of a section of the recipe
"""

import inspect
import json
import re
import typing
from typing import Any

import pydantic
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from prunella.allocate import allocations
from prunella.heal import groups
from prunella.recipe import Recipe
from prunella.registry import Method, steps
from prunella.tasks import tasks

KINDS = {"step": steps, "allocation": allocations, "healing": groups, "task": tasks}


def made(method: Method) -> Any:
    """The function whose options a method's are: of a class, what makes one."""
    function: Any = method.function
    return function.__init__ if isinstance(function, type) else function


def meanings(method: Method) -> dict[str, str]:
    """What the Args section of a docstring says of each option."""
    match = re.search(r"^Args:\n(.*?)(?:\n\n|\Z)", inspect.getdoc(made(method)) or "", re.DOTALL | re.MULTILINE)
    lines = match[1].split("\n") if match else []
    found: dict[str, str] = {}
    name = ""
    for line in lines:
        if head := re.match(r"    (\w+): (.*)", line):
            name, found[head[1]] = head[1], head[2]
        elif name:
            found[name] += " " + line.strip()
    return found


def values(hint: Any) -> str:
    """Which values an option takes, in words."""
    return words(pydantic.TypeAdapter(hint).json_schema())


def words(schema: dict[str, Any]) -> str:
    """Which values a JSON schema allows."""
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(words(part) for part in schema["anyOf"])
    if schema.get("type") == "array":
        return "list"
    name = {"null": "`null`", "boolean": "`true`, `false`"}.get(schema["type"], schema["type"])
    if "exclusiveMinimum" in schema:
        return f"{name} above {schema['exclusiveMinimum']:g}"
    return f"{name} from {schema['minimum']:g}" if "minimum" in schema else name


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


class Methods(SphinxDirective):
    """Every method of a kind."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        rows = []
        for name, method in sorted(KINDS[self.arguments[0]].items()):
            needs = ", ".join(f"`{need}`" for need in sorted(method.needs)) or "–"
            rows.append([f"[{name}]({name}.md)", method.summary, needs])
        columns = 3 if self.arguments[0] == "step" else 2
        head = ["name", "what it does", "statistics"]
        return self.parse_text_to_nodes(table(head[:columns], [row[:columns] for row in rows]))


class Options(SphinxDirective):
    """The options of one method."""

    required_arguments = 2

    def run(self) -> list[nodes.Node]:
        kind, name = self.arguments
        if name not in KINDS[kind]:
            raise self.error(f"there is no {kind} '{name}'")
        method = KINDS[kind][name]
        hints = typing.get_type_hints(made(method), include_extras=True)
        said = meanings(method)
        text = "None."
        if method.options:
            rows = [
                [f"`{name}.{key}`", values(hints[key]), f"`{_default(option.default)}`", said.get(key, "")]
                for key, option in method.options.items()
            ]
            text = table(["`--set` key", "values", "default", "meaning"], rows)
        return self.parse_text_to_nodes(text)


class Keys(SphinxDirective):
    """The keys of one section of the recipe, as the docstring of its class explains them."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        section = self.arguments[0]
        model: Any = Recipe.model_fields[section].annotation
        said = dict(re.findall(r"^(\w+): +(.*(?:\n +.*)*)", inspect.getdoc(model) or "", re.MULTILINE))
        rows = [
            [f"`{section}.{key}`", words(schema), f"`{_default(schema['default'])}`", " ".join(said[key].split())]
            for key, schema in model.model_json_schema()["properties"].items()
        ]
        return self.parse_text_to_nodes(table(["`--set` key", "values", "default", "meaning"], rows))


def _default(value: Any) -> str:
    """A default as `--set` would take it."""
    return value if isinstance(value, str) else json.dumps(value)


def setup(app: Sphinx) -> dict[str, bool]:
    """Offer the directives."""
    app.add_directive("methods", Methods)
    app.add_directive("options", Options)
    app.add_directive("keys", Keys)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
