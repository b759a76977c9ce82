"""The command line as a whole: every file is a subcommand, and what is missing is said in one line."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from anyflash.cli import main

WITHOUT = """
import sys
sys.modules[{library!r}] = None
sys.argv = ["anyflash", *{arguments!r}]
from anyflash.cli.main import main
main()
"""


@pytest.mark.parametrize("name", main.names())
def test_each_file_is_a_subcommand_with_help(name: str) -> None:
    module = importlib.import_module(f"anyflash.cli.{name}")
    assert module.command.__doc__
    shown = CliRunner().invoke(main.app(), [name, "--help"])
    assert shown.exit_code == 0, shown.output


def test_help_lists_every_subcommand() -> None:
    shown = CliRunner().invoke(main.app(), ["--help"])
    assert all(name in shown.output for name in main.names())


def _run(library: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT.format(library=library, arguments=arguments)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_missing_library_is_one_line_with_the_remedy() -> None:
    done = _run("typer", "doctor")
    assert done.returncode == 1
    assert done.stderr == "anyflash: the command line needs typer: pip install 'anyflash[cli]'\n"
