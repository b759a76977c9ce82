"""Score programs and masks to try on kernels, by name. Each makes the keyword arguments of a call."""

from __future__ import annotations

from typing import Any

import numpy as np

from anyflash.core.dtypes import FLOATS
from anyflash.semantics import expr as ex
from anyflash.semantics.arrays import numpy_dtype
from anyflash.semantics.expr import Table
from kernels.cases import Array, Program

HEADS, QUERIES, KEYS, BATCH = 6, 49, 130, 2
TABLE_DTYPES = (
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
)  # fmt: skip
Kwargs = dict[str, Any]


def table(array: Array) -> Table:
    kind = {"b": "bool", "i": "int", "u": "int"}.get(array.dtype.kind, "float")
    return Table(array, kind)


def floats(rng: np.random.Generator, *shape: int, dtype: str = "float32") -> Array:
    return rng.standard_normal(shape).astype(numpy_dtype(dtype))


def lookups(mask: bool) -> Program:
    """Tables of every dtype, read by key and at clamped indices, of a score or of a mask."""

    def make(rng: np.random.Generator) -> Kwargs:
        tables: list[tuple[Table, Table]] = []
        for dtype in TABLE_DTYPES:
            if dtype == "bool":
                one, two = rng.random(KEYS) < 0.5, rng.random((HEADS, 40)) < 0.5
            elif dtype in FLOATS:
                one, two = floats(rng, KEYS, dtype=dtype), floats(rng, HEADS, 40, dtype=dtype)
            else:
                low = 0 if dtype == "uint8" else -100
                one, two = (rng.integers(low, 120, shape).astype(dtype) for shape in (KEYS, (HEADS, 40)))
                one[0] = np.iinfo(dtype).max if np.dtype(dtype).itemsize < 4 else 2**24
            tables.append((table(one), table(two)))

        def reads(at: Any) -> Any:
            # The second index leaves the table on either side.
            return [(a[at.k], b[at.head, at.q - at.k - 11]) for a, b in tables]

        def score(s: Any, at: Any) -> Any:
            for x, y in reads(at):
                s = s + (
                    ex.where(x, 1.5, -0.5) * ex.where(y, 0.25, 1.0) if x.kind == "bool" else 0.01 * (x + y)
                )
            return s

        def allowed(at: Any) -> Any:
            found = at.k >= 0
            for x, y in reads(at):
                found = found & (x | y if x.kind == "bool" else (x > -60) | (y > 0))
            return found

        return {"mask": allowed} if mask else {"score": score}

    return make


def documents(rng: np.random.Generator) -> Kwargs:
    ids = table(np.sort(rng.integers(0, 4, (BATCH, KEYS)), axis=1).astype(np.int32))
    return {"mask": lambda at: (ids[at.batch, at.k] == ids[at.batch, at.q]) & (at.k <= at.q)}


def relative_bias(rng: np.random.Generator) -> Kwargs:
    bias = table(floats(rng, HEADS, 17))
    bucket = lambda at: ex.minimum(abs(at.q - at.k) // 3, 12) + ex.where(at.k > at.q, 4, 0)
    return {"score": lambda s, at: s + bias[at.head, bucket(at)]}


def two_loads(rng: np.random.Generator) -> Kwargs:
    slopes, gates = table(floats(rng, HEADS)), table(floats(rng, BATCH, KEYS))
    return {"score": lambda s, at: s * slopes[at.head] + gates[at.batch, at.k] * gates[0, at.q]}


def integer_arithmetic(rng: np.random.Generator) -> Kwargs:
    offsets = table(rng.integers(-3, 4, KEYS).astype(np.int16))

    def score(s: Any, at: Any) -> Any:
        by = offsets[at.k]  # zero now and then: division by it gives 0
        turn = (at.q - at.k) // by + (at.q - at.k) % by + (at.k - at.q) // -5 + (at.q - at.k) % 7
        return (
            s + 0.03 * turn + 0.01 * (-at.head) * abs(at.k - 60) + ex.where(at.row == 3, at.k_len, at.q_len)
        )

    return {"score": score, "mask": lambda at: ((at.q * 3 - at.k) // 4) % 3 != 1}


def functions(rng: np.random.Generator) -> Kwargs:
    def score(s: Any, at: Any) -> Any:
        bent = ex.where(s > 0, ex.log(1 + s), -ex.exp(s) + 1) + ex.maximum(s, 0.5) / (ex.minimum(s, 0) - 2)
        return bent + 0.2 * abs(s) - ex.exp(0.01 * (at.q - at.k)) / 3 + ex.tanh(-s)

    return {"score": score}


def hides_by_log(rng: np.random.Generator) -> Kwargs:
    """log(0) is -inf: a mask within the score."""
    weights = rng.random(KEYS).astype(np.float32)
    weights[::3] = 0
    found = table(weights)
    return {"score": lambda s, at: s + ex.log(found[at.k])}


def sinks(value: float | None = None) -> Program:
    def make(rng: np.random.Generator) -> Kwargs:
        found = floats(rng, HEADS)
        if value is not None:
            found[::2] = value
        return {"sinks": found, "causal": True}

    return make


def clamped_head(rng: np.random.Generator) -> Kwargs:
    """A dense table whose first index leaves it."""
    bias = table(floats(rng, 3, QUERIES, KEYS))
    return {"score": lambda s, at: s + bias[at.head - 2, at.row, at.k]}


def both_ways(rng: np.random.Generator) -> Kwargs:
    """A dense table read along its rows and along its columns."""
    bias = table(floats(rng, KEYS, KEYS))
    return {"score": lambda s, at: s + bias[at.row, at.k] + bias[at.k, at.row]}


PROGRAMS: dict[str, Program] = {
    "causal": lambda rng: {"causal": True},
    "window": lambda rng: {"window": (20, 3)},
    "softcap": lambda rng: {"softcap": 2.0, "causal": True},
    "alibi": lambda rng: {"alibi_slopes": floats(rng, HEADS)},
    "alibi per batch": lambda rng: {"alibi_slopes": floats(rng, BATCH, HEADS), "window": (None, 40)},
    "two biases": lambda rng: {
        "bias": [floats(rng, 1, HEADS, QUERIES, KEYS), floats(rng, BATCH, 1, 1, KEYS)],
    },
    "bias of rows": lambda rng: {"bias": floats(rng, HEADS, QUERIES, 1), "causal": True},
    "bias in float16": lambda rng: {"bias": floats(rng, HEADS, QUERIES, KEYS, dtype="float16")},
    "bias of everything": lambda rng: {"bias": floats(rng, BATCH, HEADS, QUERIES, KEYS)},
    "dense mask": lambda rng: {"mask": rng.random((BATCH, 1, QUERIES, KEYS)) < 0.5},
    "key mask": lambda rng: {"mask": rng.random((BATCH, 1, 1, KEYS)) < 0.7},
    "documents": documents,
    "relative bias": relative_bias,
    "two loads": two_loads,
    "integers": integer_arithmetic,
    "functions": functions,
    "log of zero": hides_by_log,
    "minus infinity": lambda rng: {"score": lambda s, at: ex.where((at.q + at.k) % 5 == 0, -np.inf, s)},
    "nothing but the place": lambda rng: {"score": lambda s, at: 0.01 * (at.k - at.q)},
    "one number": lambda rng: {"score": lambda s, at: 3.0},
    "never": lambda rng: {"mask": lambda at: at.k < 0},
    "first rows empty": lambda rng: {"mask": lambda at: at.k < at.row - 20},
    "sinks": sinks(),
    "sinks -inf": sinks(-np.inf),
    "sinks alone": lambda rng: {"sinks": floats(rng, HEADS), "mask": lambda at: at.k < at.row - 20},
    "dropout": lambda rng: {"dropout_p": 0.3, "causal": True},
    "dropout and bias": lambda rng: {"dropout_p": 0.5, "bias": floats(rng, HEADS, 1, KEYS), "softcap": 5.0},
    "scale": lambda rng: {"scale": -0.7, "window": (30, 30)},
    "score of every dtype": lookups(mask=False),
    "mask of every dtype": lookups(mask=True),
    "clamped beside rows and keys": clamped_head,
    "both ways": both_ways,
}  # fmt: skip
