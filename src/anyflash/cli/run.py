"""`anyflash run`: a program that imports flash_attn, run on anyflash."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from anyflash.core.errors import AnyflashError

# What stands behind the program's name is the program's.
CONTEXT = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def command(
    program: Annotated[
        list[str],
        typer.Argument(
            metavar="PROGRAM.py | -m MODULE [ARGUMENTS]...", help="As one would give it to python."
        ),
    ],
) -> None:
    """Run a Python program whose `import flash_attn` finds anyflash.

    Processes that the program starts with a new interpreter do not inherit it; for those install
    packages/flash-attn.
    """
    import anyflash.compat

    first, *rest = program
    if first == "-m" and not rest:
        raise typer.BadParameter("-m needs the name of a module", param_hint="PROGRAM")
    if first != "-m" and not Path(first).exists():
        raise typer.BadParameter(f"{first}: no such file", param_hint="PROGRAM")
    anyflash.compat.install()
    if not sys.flags.safe_path:
        sys.path[0] = "" if first == "-m" else str(Path(first).resolve().parent)
    if first == "-m":
        sys.argv = rest
        _traced(lambda: runpy.run_module(rest[0], run_name="__main__", alter_sys=True))
    else:
        sys.argv = program
        _traced(lambda: runpy.run_path(first, run_name="__main__"))


def _traced(program: Callable[[], object]) -> None:
    """Run it. What it raises is shown as python would show it, not as an error of our command line."""
    try:
        program()
    except (AnyflashError, ModuleNotFoundError):
        sys.excepthook(*sys.exc_info())
        raise SystemExit(1) from None
