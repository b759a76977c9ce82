"""Composer and llm-foundry without the packages that they import but that nothing here calls.

Composer wants torchvision, of which PyPI has builds for CUDA alone: beside a torch without it they cannot
load their operators, nor be imported for that, and transformers with them. It also wants the client of a
training service. llm-foundry wants two dozen packages more, none of them for its models. What is missing or
broken gets a stand-in, for this process.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

# Their own dependencies would bring another torch.
COMPOSER = (
    "pip install --no-deps 'mosaicml==0.32.1' 'torchmetrics<1.7.5' lightning-utilities torch_optimizer "
    "pytorch-ranger coolname 'tabulate==0.9.0' py-cpuinfo 'importlib_metadata<9'"
)
LLM_FOUNDRY = "pip install --no-deps 'llm-foundry==0.22.0' 'catalogue<3' einops"
_VISION = (
    "torchvision",
    "torchvision.datasets",
    "torchvision.models",
    "torchvision.models.resnet",
    "torchvision.ops",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.utils",
)
_kept: list[object] = []


class _StandIn(ModuleType):
    """A package in which every name is an empty class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None, is_package=True)
        self.__path__ = []

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def composer() -> None:
    """Make `import composer` work. Raises ImportError if it does not even so."""
    if "mcli" not in sys.modules and importlib.util.find_spec("mcli") is None:
        sys.modules["mcli"] = ModuleType("mcli")
    try:
        importlib.import_module("torchvision")
    except ImportError:
        _do_without()
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _define_operators()
    importlib.import_module("composer")


def llm_foundry() -> None:
    """Make llm-foundry's MPT models importable. Raises ImportError if they are not even so."""
    composer()
    if "llmfoundry" not in sys.modules:
        folder = Path(str(importlib.metadata.distribution("llm-foundry").locate_file("llmfoundry")))
        for name in ("llmfoundry", "llmfoundry.models", "llmfoundry.utils"):
            package = ModuleType(name)
            package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
            sys.modules[name] = package
    importlib.import_module("llmfoundry.models.mpt")


def _do_without() -> None:
    """transformers looks once whether torchvision is there, and is to find that it is not."""
    utils = importlib.import_module("transformers.utils")
    utils.is_torchvision_available()
    for name in _VISION:
        module = sys.modules[name] = _StandIn(name)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)


def _define_operators() -> None:
    """torchvision registers what its operators do to shapes as it is imported; so they must have names."""
    import torch

    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).with_name("_meta_registrations.py").read_text(encoding="utf-8")
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(set(re.findall(r'(?:register_meta\("|"torchvision::)(\w+)"', source))):
        library.define(f"{name}(Tensor x) -> Tensor")
    # Taken back when the library is collected.
    _kept.append(library)
