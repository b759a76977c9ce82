"""Opening and closing the way in: what `install` and `remove` do."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from anyflash.compat import transformers_door
from anyflash.compat.aliases import PACKAGES, AliasFinder, forget, ours
from anyflash.compat.version import FLASH_ATTN
from anyflash.core.errors import InvalidCall

_FILES = {
    "METADATA": (
        f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {FLASH_ATTN}\nSummary: anyflash as flash_attn\n"
    ),
    "top_level.txt": "".join(f"{name}\n" for name in PACKAGES),
}


class _Metadata(Distribution):
    """What `importlib.metadata` says of flash-attn while the door is open."""

    def read_text(self, filename: str) -> str | None:
        return _FILES.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent / path


class _Door(AliasFinder):
    """The aliases, the metadata of a distribution, and what other packages must be told as they load."""

    def __init__(self) -> None:
        self.busy = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in transformers_door.WATCHED and not self.busy:
            return self._watched(fullname)
        return super().find_spec(fullname, path, target)

    def _watched(self, fullname: str) -> ModuleSpec | None:
        """The module's own spec, with a loader that calls the transformers door behind its own."""
        self.busy = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.busy = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Telling(spec.loader)
        return spec

    def find_distributions(self, context: Any = None) -> Iterable[Distribution]:
        context = DistributionFinder.Context() if context is None else context
        name = context.name
        return [_Metadata()] if name is None or name.lower().replace("_", "-") == "flash-attn" else []


class _Telling(Loader):
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        transformers_door.open_in(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


_DOOR = _Door()
_PROGRAM = "the program"
_holders: set[str] = set()


def install() -> None:
    """Let `import flash_attn`, `flash_attn_interface` and what is in them find anyflash.

    Also tells `importlib.metadata` of a flash-attn distribution, and transformers, once it is imported, that
    `attn_implementation="flash_attention_2"` works on any device. An installed flash-attn is shadowed. Twice
    is once. Processes that the program starts with a new interpreter do not inherit it.

    Raises:
        InvalidCall: another flash_attn has been imported already.

    Example:
        >>> import anyflash.compat
        >>> anyflash.compat.install()
        >>> from flash_attn import flash_attn_func
        >>> anyflash.compat.remove()
    """
    hold(_PROGRAM)


def remove() -> None:
    """Undo `install`. What a program has imported meanwhile keeps working. Without an `install`, nothing."""
    release(_PROGRAM)


def hold(holder: str) -> None:
    """`install` for one of several who need it, such as adapters: open until each of them has released it."""
    _open()
    _holders.add(holder)


def release(holder: str) -> None:
    """Undo `hold`. Closes if nobody else holds it open."""
    _holders.discard(holder)
    if not _holders:
        _close()


def _open() -> None:
    if _DOOR in sys.meta_path:
        return
    for name in PACKAGES:
        module = sys.modules.get(name)
        if module is not None and not ours(module):
            raise InvalidCall(
                "install",
                f"{name} has been imported already, from {getattr(module, '__file__', None)}",
                "a program that has not imported it yet",
                "Call anyflash.compat.install() before the first import, or start it with `anyflash run`",
            )
    sys.meta_path.insert(0, _DOOR)
    importlib.invalidate_caches()
    transformers_door.open_everywhere()


def _close() -> None:
    if _DOOR not in sys.meta_path:
        return
    sys.meta_path.remove(_DOOR)
    forget()
    transformers_door.close()
    importlib.invalidate_caches()
