"""The application that the commands register with, and what is asked before any of them."""

from __future__ import annotations

from typing import Annotated

import typer

from ..version import __version__

MAKING, RUNNING, SEEING = "Prune and heal", "Store and run", "See and measure"

app = typer.Typer(
    name="prunella",
    epilog="`prunella COMMAND --help` explains a command; --debug, anywhere on the line, shows tracebacks.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"prunella {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    debug: Annotated[bool, typer.Option("--debug", metavar="", help="Show tracebacks.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", "-V", metavar="", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Prune a language model, or any other network, and see what is left of it."""
