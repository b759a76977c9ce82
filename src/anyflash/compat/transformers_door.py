"""transformers asks for a GPU before it looks for flash_attn; while the door is open it does not.

Of transformers 5: the question `is_flash_attn_2_available`; the table of devices that its errors and warnings
are made from; and, in continuous batching, the question whether a device of Intel's is here, which decides
whether decoding reads the pages of its cache through `flash_attn_with_kvcache`. Where a version lacks one of
these, nothing is changed.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

_AVAILABLE = "is_flash_attn_2_available"
_TABLE = "FLASH_ATTENTION_COMPATIBILITY_MATRIX"
_CACHED = ("_package_distribution_mapping", "is_flash_attn_greater_or_equal")
_BATCHING = "transformers.generation.continuous_batching.initialization"
_PAGES = "is_torch_xpu_available"
WATCHED = ("transformers.utils.import_utils", "transformers.modeling_flash_attention_utils", _BATCHING)

_before: dict[str, Any] = {}
_rows: list[tuple[dict[str, Any], dict[str, Any]]] = []


def _yes(*args: Any, **kwargs: Any) -> bool:
    return True


def open_in(module: ModuleType) -> None:
    """Change what of these a module of transformers holds."""
    names = vars(module)
    for question in (_AVAILABLE, *([_PAGES] if module.__name__ == _BATCHING else [])):
        asked = names.get(question)
        if asked is not None and asked is not _yes:
            _before.setdefault(question, asked)
            setattr(module, question, _yes)
    _forget_answers(names)
    row = names.get(_TABLE, {}).get(2)
    if row is not None and not any(row is changed for changed, _ in _rows):
        _rows.append((row, dict(row)))
        row["general_availability_check"] = _yes
        row["supported_devices"] = (*row["supported_devices"], (_yes, "cpu"))


def open_everywhere() -> None:
    """The same in all of transformers that has been imported."""
    for module in _modules():
        open_in(module)


def close() -> None:
    """Undo it."""
    for module in _modules():
        for question, asked in _before.items():
            if vars(module).get(question) is _yes:
                setattr(module, question, asked)
        _forget_answers(vars(module))
    for row, before in _rows:
        row.clear()
        row.update(before)
    _rows.clear()
    _before.clear()


def _forget_answers(names: dict[str, Any]) -> None:
    """What transformers has found out about installed packages, it keeps."""
    for name in _CACHED:
        if hasattr(names.get(name), "cache_clear"):
            names[name].cache_clear()


def _modules() -> list[ModuleType]:
    return [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "transformers" and isinstance(module, ModuleType)
    ]
