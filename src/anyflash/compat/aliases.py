"""Modules of ours under the names that programs import.

An alias is the same module under a second name, so a class has one identity whichever name it came by.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGES = {
    "flash_attn": "anyflash.compat.flash_attn",
    "flash_attn_interface": "anyflash.compat.flash_attn_interface",
    "flash_attn_2_cuda": "anyflash.compat.flash_attn._gpu",
}


def ours(module: ModuleType | None) -> bool:
    """Whether it is one of anyflash's modules, under any name."""
    return module is not None and module.__name__.startswith("anyflash.compat.")


class AliasFinder(MetaPathFinder):
    """Finds `PACKAGES` and what is in them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, dot, rest = fullname.partition(".")
        if package not in PACKAGES:
            return None
        name = PACKAGES[package] + dot + rest
        try:
            found = importlib.util.find_spec(name)
        except ModuleNotFoundError:
            found = None
        if found is None:
            return None
        inside = found.submodule_search_locations
        return ModuleSpec(fullname, _AliasLoader(name), origin=found.origin, is_package=inside is not None)


class _AliasLoader(Loader):
    def __init__(self, name: str) -> None:
        self.name = name
        self.spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.name)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The import system has just given the module the alias's spec; it keeps its own.
        module.__spec__ = self.spec


def provide(package: str) -> None:
    """For the distribution flash-attn, whose modules are ours: called while `package` is being imported."""
    if not any(isinstance(finder, AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, AliasFinder())
    sys.modules[package] = importlib.import_module(PACKAGES[package])


def forget() -> None:
    """Drop the aliases that have been imported."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in PACKAGES and ours(module):
            del sys.modules[name]
