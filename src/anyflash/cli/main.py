"""The `anyflash` command.

Its subcommands are the files of this folder: each defines `command`, and the file's name is the subcommand's.
A file may define `CONTEXT`, click's settings for how its arguments are read.
This file and names that start with an underscore are not subcommands.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import TYPE_CHECKING

import anyflash.cli

if TYPE_CHECKING:
    import typer

_LIBRARIES = {"typer", "click", "rich", "matplotlib", "psutil"}


def names() -> list[str]:
    """The subcommands' names, sorted."""
    found = pkgutil.iter_modules(anyflash.cli.__path__)
    return sorted(
        module.name for module in found if module.name != "main" and not module.name.startswith("_")
    )


def app() -> typer.Typer:
    """The command with all its subcommands."""
    import typer

    made = typer.Typer(
        name="anyflash",
        help="Attention in linear memory on any device: what is here, how well it does, whether it is right.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(_root)
    for name in names():
        module = importlib.import_module(f"{anyflash.cli.__name__}.{name}")
        made.command(name, context_settings=getattr(module, "CONTEXT", None))(module.command)
    return made


def _root() -> None:
    # Its presence keeps the subcommand's name required even while there is only one.
    return None


def main() -> None:
    """Run the command line; errors of ours end it with one line, not a traceback."""
    from anyflash.core.errors import AnyflashError

    try:
        app()()
    except ModuleNotFoundError as missing:
        if missing.name is None or missing.name.partition(".")[0] not in _LIBRARIES:
            raise
        sys.exit(f"anyflash: the command line needs {missing.name}: pip install 'anyflash[cli]'")
    except AnyflashError as error:
        sys.exit(f"anyflash: {error}")
