"""A file imports only from layers below its own, and from outside only what its layer may know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from architecture.sources import MODULES, Import, imports, place

LAYERS = {
    "core": 0,
    "semantics": 1,
    "kernels": 2,
    "backends": 3,
    "dispatch": 4,
    "frontends": 5,
    "api": 6,
    "masks": 6,
    "torch": 8,
    "adapters": 7,
    "compat": 7,
    "kvcache": 7,
    "parallel": 7,
    "adoption": 8,
    "bench": 8,
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
    "kernels.triton": {"triton", "torch", "numpy"},
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
    "onnx",
    "onnxruntime",
    "openvino",
}
# `bench` runs on torch throughout; only the command of that name imports it, when it runs.
MAY_IMPORT_FRAMEWORKS = ("frontends", "adapters", "compat", "kernels.triton", "kernels.gluon", "bench")
# `adapters.neox` is beside compat: to give its system an importable flash_attn is all it does.
INSTALL_COMPAT = ("compat", "cli.run", "adoption.rows.flash_attn", "adapters.neox")
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


def violations(here: str, found: list[Import]) -> list[str]:
    """What the module at `here` imports and may not."""
    height = layer(here)
    wrong: list[str] = []
    for one in found:
        why = _from_outside(here, one) if one.third_party else _from_inside(here, height, one)
        wrong += [f"line {one.line}: import of {one.module}: {reason}" for reason in why]
    return wrong


def _from_inside(here: str, height: int, found: Import) -> Iterator[str]:
    if found.root != "anyflash":
        return
    there = ours(found.module)
    installs = inside(there, ("compat",)) and inside(here, INSTALL_COMPAT)
    if here.partition(".")[0] != there.partition(".")[0] and layer(there) >= height and not installs:
        yield f"{there} is not below {here}"
    if inside(there, ("compat",)) and not installs:
        yield "nothing imports compat but what installs it for a program"
    if inside(here, ("frontends",)) and inside(there, ("kernels",)):
        yield "a frontend knows no kernel"
    compilers = [dotted.split(".")[1] for dotted in (here, there) if dotted.startswith("kernels.")]
    # Gluon is a language of Triton's: launches, generated functions and the device are in kernels/triton.
    if len(set(compilers)) > 1 and compilers != ["gluon", "triton"]:
        yield "kernels of one compiler know no other"


def _from_outside(here: str, found: Import) -> Iterator[str]:
    for folder, allowed in THIRD_PARTY.items():
        if (inside(here, (folder,)) if folder else here == "") and found.root not in allowed:
            yield f"{folder or '__init__'} may import {sorted(allowed) or 'the standard library only'}"
    if found.root in CLI_LIBRARIES and not inside(here, ("cli",)):
        yield "it belongs to the command line"
    elif found.root in LAZY - CLI_LIBRARIES and found.top_level and not inside(here, MAY_IMPORT_FRAMEWORKS):
        yield "not at the top level, but inside the function that needs it"
    if inside(here, ("frontends",)):
        framework = here.split(".")[1].partition("_")[0] if "." in here else ""
        if found.root not in {framework, "numpy", "ml_dtypes"}:
            yield "a frontend knows one framework"


@pytest.mark.parametrize("path", MODULES, ids=place)
def test_layers(path: Path) -> None:
    assert violations(place(path), imports(path)) == []


@pytest.mark.parametrize(
    ("here", "module", "top_level", "allowed"),
    [
        ("semantics.mask", "anyflash.core.errors", True, True),
        ("core.view", "anyflash.semantics.expr", False, False),
        ("core.view", "numpy", True, False),
        ("adapters.pytorch", "anyflash", True, True),
        ("dispatch.plan", "anyflash", False, False),
        ("kernels.triton.forward", "anyflash.kernels.llvm.cache", True, False),
        ("kernels.llvm.forward", "torch", False, False),
        ("frontends.torch_op", "torch", True, True),
        ("frontends.torch_op", "jax", False, False),
        ("frontends.torch_op", "anyflash.kernels.llvm.cache", False, False),
        ("adoption.run", "torch", True, False),
        ("adoption.run", "torch", False, True),
        ("adoption.run", "anyflash.compat.flash_attn", False, False),
        ("adapters.neox", "anyflash.compat", False, True),
        ("adapters.megatron", "anyflash.compat", False, False),
        ("adoption.run", "rich.progress", False, False),
        ("cli.draw", "rich.text", True, True),
    ],
)
def test_rules_themselves(here: str, module: str, top_level: bool, allowed: bool) -> None:
    assert (violations(here, [Import(module, 1, top_level)]) == []) == allowed


def test_unknown_folder_is_refused() -> None:
    with pytest.raises(AssertionError, match="in no layer"):
        violations("nowhere.file", [])
