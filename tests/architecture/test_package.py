"""What is installed, and with what."""

from __future__ import annotations

import os
import re
import tomllib

from architecture.sources import PACKAGE, ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    if line and not line.startswith("#")
)


def _name(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return match.group().lower().replace("-", "_")


def test_dependencies_are_three() -> None:
    assert {_name(one) for one in PROJECT["dependencies"]} == {"numpy", "llvmlite", "ml_dtypes"}


def test_the_package_is_python_only() -> None:
    """So one wheel serves every machine."""
    suffixes = {
        path.suffix for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert suffixes <= {".py", ".typed", ".html", ".css", ".js", ".json"}


def test_every_package_that_make_installs_is_pinned() -> None:
    extras = [one for extra in PROJECT["optional-dependencies"].values() for one in extra]
    wanted = {_name(one) for one in (*PROJECT["dependencies"], *extras)} - {"anyflash"}
    assert wanted <= {_name(name) for name in PINS}


def test_pins_without_a_build() -> None:
    """A pin such as 2.13.0+cpu would rule out the build that another machine has at hand."""
    assert PINS["torch"] == "2.13.0"
    assert all(re.fullmatch(r"[\w.]+", version) for version in PINS.values())


def test_version_agrees() -> None:
    import anyflash

    assert anyflash.__version__ == PROJECT["version"]


def test_ci_runs_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text("utf-8")


def test_readme_opens_with_the_two_commands() -> None:
    opening = (ROOT / "README.md").read_text("utf-8").splitlines()[:8]
    assert [line.split()[:3] for line in opening if line.startswith("$")] == [
        ["$", "make", name] for name in ("demo", "test")
    ]
