"""Files stay short, and nothing in them belongs to one machine."""

from __future__ import annotations

import re
from pathlib import Path

from architecture.sources import ROOT

MAX_LINES = 400
# path -> why it may be longer
LONGER: dict[str, str] = {}
FOLDERS = ("src", "tests", "docs", "packages", ".ci")
TEXT = {".py", ".md", ".toml", ".txt", ".html", ".css", ".js", ".json", ""}
# A path of somebody's home or checkout. Written so that this file does not contain one.
MACHINE = re.compile(
    "|".join(("/" + "work/", "/" + "tmp/venv", "/" + "root/", "/" + r"home/\w", "file:" + "///"))
)


def texts() -> list[Path]:
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return sorted(
        path
        for path in [*ROOT.iterdir(), *inside]
        if path.is_file() and path.suffix in TEXT and "__pycache__" not in path.parts and path.name != ".git"
    )


def test_file_length() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in texts()
        if path.suffix == ".py"
    }
    report = sorted(lengths.items(), key=lambda item: -item[1])
    long = [f"{name}: {lines} lines" for name, lines in report if lines > MAX_LINES and name not in LONGER]
    assert not long, f"split by role, or give a reason in LONGER (limit {MAX_LINES}):\n" + "\n".join(long)
    needless = [name for name in LONGER if lengths.get(name, 0) <= MAX_LINES]
    assert not needless, f"no longer long, remove from LONGER: {needless}"


def test_no_machine_in_text() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE.search(line)
    ]
    assert not found, "\n".join(found)
