"""Element types by name. A dtype is its lower-case name: "float32", "bfloat16", "int64", "bool"."""

from __future__ import annotations

FLOATS = ("float16", "bfloat16", "float32", "float64")
# Stored, never computed in: of q, k and v alone.
FLOATS8 = ("float8_e4m3fn", "float8_e5m2")
INTEGERS = ("int8", "uint8", "int16", "int32", "int64")
ITEMSIZE = {
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
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


# What a table of a program may hold.
TABLES = tuple(name for name in ITEMSIZE if name not in FLOATS8)


def accumulate(dtype: str) -> str:
    """The type in which sums of `dtype` products are kept, and of lse."""
    return "float64" if dtype == "float64" else "float32"


def result(dtype: str) -> str:
    """The type of out for queries of `dtype`: the same, but bfloat16 for 8-bit floats."""
    return "bfloat16" if dtype in FLOATS8 else dtype


def kind(dtype: str) -> str:
    """Which of "float", "int" and "bool" a dtype is."""
    if dtype in FLOATS or dtype in FLOATS8:
        return "float"
    return "bool" if dtype == "bool" else "int"
