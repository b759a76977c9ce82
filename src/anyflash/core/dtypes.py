"""Element types by name. A dtype is its lower-case name: "float32", "bfloat16", "int64", "bool"."""

from __future__ import annotations

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "uint8", "int16", "int32", "int64")
ITEMSIZE = {
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}


def accumulate(dtype: str) -> str:
    """The type in which sums of `dtype` products are kept, and of lse."""
    return "float64" if dtype == "float64" else "float32"


def kind(dtype: str) -> str:
    """Which of "float", "int" and "bool" a dtype is."""
    if dtype in FLOATS:
        return "float"
    return "bool" if dtype == "bool" else "int"
