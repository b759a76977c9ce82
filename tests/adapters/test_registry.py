"""Every file of the adapters' folder is an adapter, and importing one imports no framework."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from anyflash.adapters import registry
from anyflash.adapters.base import Adapter, Target


@pytest.mark.parametrize("name", registry.names())
def test_protocol(name: str) -> None:
    adapter = registry.get(name)
    assert adapter.name == name
    assert isinstance(adapter.target, Target)
    for method in ("install", "remove", "self_check"):
        found = inspect.signature(getattr(adapter, method))
        wanted = inspect.signature(getattr(Adapter, method))
        assert not found.parameters
        assert found.return_annotation == wanted.return_annotation


@pytest.mark.parametrize("name", registry.names())
def test_import_brings_no_framework(name: str) -> None:
    probe = (
        f"import sys; from anyflash.adapters import registry; registry.get({name!r});"
        "sys.exit(' '.join({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    assert done.stderr == "\n" or not done.stderr, done.stderr


def test_unknown_name() -> None:
    with pytest.raises(KeyError, match=r"there are: .*transformers"):
        registry.get("no such system")


RANGE = Target("torch", "torch", "2.13", "2.14", "pip install torch")


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("2.12.9", False),
        ("2.13", True),
        ("2.13.0+cpu", True),
        ("2.13.1rc1", True),
        ("2.14.0", False),
        ("3.0", False),
        ("main", False),
    ],
)
def test_versions(version: str, tested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "installed", lambda self: version)
    if tested:
        RANGE.warn_if_untested()
    else:
        with pytest.warns(UserWarning, match=r"outside the range .*torch>=2\.13,<2\.14"):
            RANGE.warn_if_untested()


@pytest.mark.parametrize("name", registry.names())
def test_every_adapter_warns_of_an_untested_version(name: str) -> None:
    """What `install` does without the system cannot be run here, so it is read."""
    module = inspect.getsource(inspect.getmodule(registry.get(name).install))
    assert "target.warn_if_untested()" in module


def test_absent_system() -> None:
    absent = Target("no-such-distribution", "nothing", "1", "2", "pip install nothing")
    assert absent.installed() is None
    absent.warn_if_untested()
