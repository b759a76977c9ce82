"""The fenced blocks of the project's Markdown files.

`python tests/docs/fences.py` writes what the commands shown print now into the files.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(?P<kind>[^\n]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Fence:
    """One block: its language, its text, and the line of the file where the text starts."""

    kind: str
    body: str
    line: int


def fences(page: Path, kind: str) -> list[Fence]:
    text = page.read_text(encoding="utf-8")
    found = (
        Fence(match["kind"].strip(), match["body"], text.count("\n", 0, match.start("body")) + 1)
        for match in _FENCE.finditer(text)
    )
    return [fence for fence in found if fence.kind == kind]


def commands(fence: Fence) -> Iterator[tuple[str, str]]:
    """Each `$ anyflash ...` of a console block with what is shown below it."""
    for part in re.split(r"^\$ ", fence.body, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        if command.startswith("anyflash "):
            yield command, output


def run(command: str) -> str:
    """What an `anyflash` command prints, without trailing blanks. Raises CalledProcessError if it fails."""
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", *shlex.split(command)],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            check=True,
        )
    return "".join(line.rstrip() + "\n" for line in done.stdout.rstrip().splitlines())


def update() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for fence in fences(page, "console"):
            for command, output in commands(fence):
                text = text.replace(f"$ {command}\n{output}", f"$ {command}\n{run(command)}")
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    update()
