"""A file imports only from layers below its own, and from outside only what its layer may know."""

from __future__ import annotations

from pathlib import Path

import pytest

from architecture.sources import MODULES, PACKAGE, imports, place

LAYERS = {
    "core": 0,
    "semantics": 1,
    "kernels": 2,
    "backends": 3,
    "dispatch": 4,
    "frontends": 5,
    "api": 6,
    "masks": 6,
    "adapters": 7,
    "compat": 7,
    "kvcache": 7,
    "parallel": 7,
    "adoption": 8,
    "contract": 8,
    "cli": 9,
    "": 10,  # __init__: the public names
    "__main__": 10,
}
# What a layer may import from outside the standard library. Layers that are not here may import all, lazily.
THIRD_PARTY = {
    "core": set(),
    "semantics": {"numpy", "ml_dtypes"},
    "kernels.llvm": {"llvmlite", "numpy"},
    "kernels.triton": {"triton", "torch"},
    "kernels.gluon": {"triton", "torch"},
    "kernels.metal": set(),
    "dispatch": {"numpy"},
    "api": {"numpy"},
    "masks": set(),
    "": set(),
}
# Packages that only some users have or want: never imported by importing a module outside these layers.
LAZY = {
    "torch",
    "jax",
    "paddle",
    "mlx",
    "transformers",
    "triton",
    "matplotlib",
    "rich",
    "typer",
    "click",
    "psutil",
}
MAY_IMPORT_FRAMEWORKS = ("frontends", "adapters", "compat", "kernels.triton", "kernels.gluon")
CLI_LIBRARIES = {"matplotlib", "rich", "typer", "click"}


def layer(dotted: str) -> int:
    head = dotted.partition(".")[0]
    assert head in LAYERS, f"anyflash.{head} is in no layer: place it in DESIGN.md's order and in LAYERS"
    return LAYERS[head]


def inside(dotted: str, folders: tuple[str, ...]) -> bool:
    return any(dotted == folder or dotted.startswith(folder + ".") for folder in folders)


def ours(module: str) -> str:
    """A module's place. `import anyflash` from inside is an import of what it shows, the api."""
    return module.partition(".")[2] or "api"


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_imports_only_from_below(path: Path) -> None:
    here = place(path)
    wrong = []
    for found in imports(path):
        if found.root != "anyflash":
            continue
        there = ours(found.module)
        same_folder = here.partition(".")[0] == there.partition(".")[0]
        if not same_folder and layer(there) >= layer(here):
            wrong.append(f"line {found.line}: {found.module} is not below anyflash.{here}")
        if inside(there, ("compat",)) and not inside(here, ("compat",)):
            wrong.append(f"line {found.line}: nothing imports compat")
        if inside(here, ("frontends",)) and inside(there, ("kernels",)):
            wrong.append(f"line {found.line}: a frontend knows no kernel")
        if inside(here, ("kernels",)) and inside(there, ("kernels",)):
            compiler, other = here.split(".")[1:2], there.split(".")[1:2]
            if compiler and other and compiler != other:
                wrong.append(f"line {found.line}: kernels of one compiler know no other")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_imports_from_outside(path: Path) -> None:
    here = place(path)
    wrong = []
    for found in imports(path):
        if not found.third_party:
            continue
        for folder, allowed in THIRD_PARTY.items():
            if (inside(here, (folder,)) if folder else here == "") and found.root not in allowed:
                wrong.append(f"line {found.line}: {folder or '__init__'} may not import {found.root}")
        if found.top_level and found.root in LAZY - CLI_LIBRARIES and not inside(here, MAY_IMPORT_FRAMEWORKS):
            wrong.append(f"line {found.line}: import {found.root} inside the function that needs it")
        if found.root in CLI_LIBRARIES and not inside(here, ("cli", "__main__")):
            wrong.append(f"line {found.line}: {found.root} belongs to the command line")
    assert not wrong, "\n".join(wrong)


FRONTENDS = [path for path in MODULES if inside(place(path), ("frontends",))]


@pytest.mark.parametrize("path", FRONTENDS, ids=place)
def test_frontend_knows_one_framework(path: Path) -> None:
    framework = place(path).split(".")[1:2]
    framework = framework[0].partition("_")[0] if framework else ""
    foreign = {found.root for found in imports(path) if found.third_party} - {framework, "numpy", "ml_dtypes"}
    assert not foreign, f"{path.relative_to(PACKAGE)} imports {sorted(foreign)}"
