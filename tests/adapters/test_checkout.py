"""Importing from a folder that the environment names, and leaving no trace of it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from anyflash.adapters.checkout import Checkout

SOURCE = Checkout("Some System", "ANYFLASH_SRC_SOME", "https://example.org/some-system", "0123abc")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "inner" / "some_system" / "model"
    package.mkdir(parents=True)
    for heavy in (package.parent, package):
        (heavy / "__init__.py").write_text("raise RuntimeError('wants all of its dependencies')\n")
    (package / "layers.py").write_text("import its_kernel\nVALUE = 7\n")
    loose = tmp_path / "inner" / "without_init" / "parts"
    loose.mkdir(parents=True)
    (loose / "part.py").write_text("VALUE = 8\n")
    monkeypatch.setenv(SOURCE.variable, str(tmp_path))
    return tmp_path


def test_importable(folder: Path) -> None:
    kernel = ModuleType("its_kernel")
    sys.modules["its_kernel"] = kernel
    before, path = dict(sys.modules), list(sys.path)
    try:
        with SOURCE.importable(
            "some_system", "some_system.model", stubs=("its_kernel",), under="inner"
        ) as root:
            assert root == folder / "inner"
            assert importlib.import_module("some_system.model.layers").VALUE == 7
            assert importlib.import_module("without_init.parts.part").VALUE == 8
            assert sys.modules["its_kernel"] is not kernel
        assert sys.modules["its_kernel"] is kernel
        assert sys.modules.keys() == before.keys()
        assert sys.path == path
    finally:
        del sys.modules["its_kernel"]


def test_an_installed_package_of_the_name_lends_nothing(folder: Path) -> None:
    names = ("some_system", "some_system.model", "some_system.model.layers")
    installed = {name: ModuleType(name) for name in names}
    sys.modules.update(installed)
    try:
        with SOURCE.importable("some_system", "some_system.model", stubs=("its_kernel",), under="inner"):
            assert importlib.import_module(names[-1]).VALUE == 7
        assert {name: sys.modules[name] for name in names} == installed
    finally:
        for name in names:
            del sys.modules[name]


def test_a_namespace_package_that_was_there_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two folders of one name, the checkout's and one that was imported before, are one package."""
    own = folder / "elsewhere"
    for place in (own, folder / "inner"):
        (place / "its_tests").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(own))
    package = importlib.import_module("its_tests")
    try:
        with SOURCE.importable("some_system", under="inner"):
            assert len(list(package.__path__)) == 2
        assert sys.modules["its_tests"] is package
        assert list(package.__path__) == [str(own / "its_tests")]
    finally:
        del sys.modules["its_tests"]


def test_revision(folder: Path) -> None:
    assert SOURCE.installed() == "source"
    git = folder / ".git"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "refs" / "heads" / "main").write_text("0123abcdef\n")
    assert SOURCE.installed() == "0123abc"
    (git / "HEAD").write_text("fedcba9876\n")
    assert SOURCE.installed() == "fedcba9"


def test_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SOURCE.variable, raising=False)
    assert SOURCE.folder() is None
    assert SOURCE.installed() is None
    with pytest.raises(
        FileNotFoundError, match=r"git clone https://example\.org/some-system .* ANYFLASH_SRC_SOME"
    ):
        SOURCE.importable().__enter__()


def test_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(SOURCE.variable, str(tmp_path / "nothing"))
    with pytest.raises(NotADirectoryError, match="ANYFLASH_SRC_SOME"):
        SOURCE.folder()
