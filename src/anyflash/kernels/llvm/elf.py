"""The little of the ELF64 object format that is needed: which symbols an object expects from elsewhere."""

from __future__ import annotations

import struct
from dataclasses import dataclass

_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SYMTAB = 2
_UNDEFINED = 0


@dataclass(frozen=True, slots=True)
class _Section:
    kind: int
    offset: int
    size: int
    link: int


def undefined_symbols(data: bytes) -> set[str]:
    """Names that the object refers to and does not define. Empty if it is not little-endian ELF64."""
    if data[:6] != b"\x7fELF\x02\x01":
        return set()
    header = _HEADER.unpack_from(data)
    first, size, count = header[6], header[11], header[12]
    sections: list[_Section] = []
    for index in range(count):
        row = _SECTION.unpack_from(data, first + index * size)
        sections.append(_Section(row[1], row[4], row[5], row[6]))
    names: set[str] = set()
    for section in sections:
        if section.kind != _SYMTAB:
            continue
        strings = sections[section.link].offset
        for at in range(section.offset, section.offset + section.size, _SYMBOL.size):
            name, _, _, defined_in, _, _ = _SYMBOL.unpack_from(data, at)
            if defined_in == _UNDEFINED and name:
                start = strings + name
                names.add(data[start : data.index(b"\0", start)].decode())
    return names - {"_GLOBAL_OFFSET_TABLE_"}
