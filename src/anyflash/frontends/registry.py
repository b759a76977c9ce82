"""Which framework an array belongs to.

No framework is imported to find out: an array's own is imported already. A frontend is a file of this folder
named after its framework's module with an underscore behind it.
"""

from __future__ import annotations

import importlib
import sys
from functools import lru_cache
from typing import Any, NoReturn

import anyflash.frontends
from anyflash.core.errors import InvalidCall
from anyflash.frontends.base import Frontend

_by_type: dict[type, Frontend] = {}
_by_name: dict[str, Frontend] = {}


def of(argument: str, array: Any) -> Frontend:
    """The frontend of an array. Raises InvalidCall, naming the argument, for what no frontend owns."""
    return _by_name[_name_of(type(array)) or _refuse(argument, array)]


def same(frontend: Frontend, argument: str, array: Any) -> None:
    """Raises InvalidCall unless `array` belongs to `frontend`."""
    found = of(argument, array)
    if found is not frontend:
        raise InvalidCall(
            argument,
            f"an array of {found.name}",
            f"one of {frontend.name}, as the first is",
            "All arrays of a call belong to one framework",
        )


@lru_cache(maxsize=1)
def frameworks() -> tuple[str, ...]:
    """Names of the frameworks that have a frontend here, imported or not."""
    import pkgutil  # here, because only a first call needs it

    files = pkgutil.iter_modules(anyflash.frontends.__path__)
    return tuple(sorted(file.name[:-1] for file in files if file.name.endswith("_")))


def load(framework: str) -> Frontend:
    """The frontend of a framework; imports the framework."""
    return importlib.import_module(f"{anyflash.frontends.__name__}.{framework}_").FRONTEND


def _name_of(kind: type) -> str | None:
    """The name of the frontend that owns arrays of this type; leaves the frontend in `_by_name`."""
    found = _by_type.get(kind)
    if found is None:
        found = _find(kind)
        if found is None:
            return None
        _by_type[kind] = found
    _by_name[found.name] = found
    return found.name


# torch.compile calls this while it traces and keeps the name; it cannot trace the search and the imports.
_name_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find(kind: type) -> Frontend | None:
    for framework in frameworks():
        if framework in sys.modules:
            frontend = load(framework)
            if frontend.owns(kind):
                return frontend
    return None


def _refuse(argument: str, array: Any) -> NoReturn:
    kind, shape = type(array), getattr(array, "shape", None)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    raise InvalidCall(
        argument,
        f"type {name}" if shape is None else f"type {name}, shape {tuple(shape)}",
        f"an array of {' or '.join(frameworks())}",
        "numpy.asarray makes one of lists" if isinstance(array, (list, tuple)) else None,
    )
