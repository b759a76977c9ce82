"""What the documentation shows is run: Python blocks, and `anyflash` commands with their output."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from anyflash.cli.main import names
from anyflash.core.settings import SETTINGS
from docs.fences import PAGES, ROOT, commands, fences, run

CONSOLE = [
    pytest.param(command, output, id=f"{page.name}:{fence.line}:{command}")
    for page in PAGES
    for fence in fences(page, "console")
    for command, output in commands(fence)
]
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if fences(page, "python")], ids=lambda page: page.name
)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, so that a later block may use what an earlier one made."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "docs"}
    for fence in fences(page, "python"):
        code = compile("\n" * (fence.line - 1) + fence.body, str(page), "exec")
        exec(code, namespace)


@pytest.mark.parametrize(("command", "output"), CONSOLE)
def test_commands_print_what_is_shown(command: str, output: str) -> None:
    assert run(command) == output, "python tests/docs/fences.py brings the pages up to date"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [
        link for link in LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()
    ]
    assert not missing, f"{page.relative_to(ROOT)} links to {missing}"


def test_the_table_of_commands_is_the_folder() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `anyflash (\w+)`", page, re.MULTILINE)) == names()


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    rows = [f"| `{name}` | {meaning} |" for name, (meaning, _) in SETTINGS.items()]
    assert [row for row in rows if row not in page] == []
    assert set(re.findall(r"ANYFLASH_\w+", page)) == set(SETTINGS)
