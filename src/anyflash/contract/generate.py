"""Cases drawn from two seeds: one decides the geometry, the program and the layout, the other the numbers.

A case is named by a short text, which is all that a repro needs:

    table:float32-causal           a case of the table
    seed:17:3                      geometry 17, data 3
    seed:17:3:dtype=float64        the same with a field of `Case` replaced, to narrow a failure down
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import get_args

from anyflash.contract.cases import Case, Data, Packed, Sinks
from anyflash.contract.poison import CONTIGUOUS, Layout
from anyflash.contract.rules import MASKS, Causal, Dense, Rule, Window
from anyflash.contract.table import BIASES, by_id
from anyflash.contract.terms import SCORES, Alibi, Biases, Softcap, Term
from anyflash.core.dtypes import FLOATS
from anyflash.core.errors import InvalidCall

HEADS = ((1, 1), (2, 2), (3, 1), (4, 2), (6, 2), (5, 5), (12, 3))
DIMS = (1, 2, 7, 8, 16, 24, 31, 32, 40, 64, 65, 80, 96, 128, 160, 192, 256)
EDGES = (
    1,
    2,
    3,
    7,
    8,
    15,
    16,
    17,
    31,
    32,
    33,
    47,
    48,
    49,
    63,
    64,
    65,
    95,
    96,
    97,
    127,
    128,
    129,
    191,
    200,
    257,
)


def generate(geometry: int, data: int) -> Case:
    """The case of two seeds: always the same one."""
    rng = Random(geometry)
    dtype = rng.choice(FLOATS)
    heads = rng.choice(HEADS)
    packed = _packed(rng) if rng.random() < 0.35 else None
    dim = rng.choice(DIMS)
    batch = rng.choice((1, 1, 2, 3))
    dims = (dim, dim if rng.random() < 0.6 else rng.choice(DIMS))
    lens = _affordable(_length(rng), _length(rng), batch * heads[0] * max(dims), dtype)
    data_kind: Data = rng.choice(("randn", "randn", "randn", *get_args(Data)))
    return Case(
        id=f"seed:{geometry}:{data}",
        dtype=dtype,
        batch=batch,
        heads=heads,
        lens=lens,
        dims=dims,
        terms=_terms(rng, packed is not None, data_kind == "large"),
        rules=_rules(rng, packed is not None),
        scale=rng.choice((None, None, None, 1.0, 0.05)),
        dropout_p=rng.choice((0.0, 0.0, 0.0, 0.0, 0.2, 0.7)),
        sinks=rng.choice((None, None, None, None, *get_args(Sinks))),
        packed=packed,
        data=data_kind,
        layouts=tuple(_layout(rng) for _ in range(4)) if rng.random() < 0.6 else (CONTIGUOUS,),
        table_dtype=rng.choice((None, "float32", dtype)),
        table_layout=rng.choice((CONTIGUOUS, Layout(gap=2, step=2), Layout(reverse=(0,), shift=5))),
        data_seed=data,
    )


def generated(count: int, seed: int) -> Iterator[Case]:
    """`count` cases; the same `seed` gives the same."""
    for i in range(count):
        yield generate(seed * 1_000_003 + i, seed)


def parse(text: str) -> Case:
    """The case that a repro text names. Raises InvalidCall if it names none."""
    kind, _, rest = text.partition(":")
    try:
        if kind == "table":
            name, *changes = rest.split(":")
            case = by_id(name)
        elif kind == "seed":
            geometry, data, *changes = rest.split(":")
            case = generate(int(geometry), int(data))
        else:
            raise KeyError(kind)
        return _changed(case, changes)
    except (KeyError, ValueError) as error:
        raise InvalidCall(
            "repro",
            repr(text),
            "table:CASE or seed:GEOMETRY:DATA, then :FIELD=VALUE for changes",
            f"{type(error).__name__}: {error}",
        ) from error


def repro(case: Case) -> str:
    """The text that names a case."""
    return case.id if case.id.startswith("seed:") else f"table:{case.id}"


def _changed(case: Case, changes: list[str]) -> Case:
    for change in changes:
        name, _, value = change.partition("=")
        if name not in _CHANGEABLE:
            raise ValueError(f"{name!r} is none of {', '.join(_CHANGEABLE)}")
        given = value if isinstance(getattr(case, name), str) else literal_eval(value)
        case = replace(case, id=f"{case.id}:{change}", **{name: given})
    return case


_CHANGEABLE = (
    "dtype",
    "batch",
    "heads",
    "lens",
    "dims",
    "scale",
    "dropout_p",
    "sinks",
    "data",
    "table_dtype",
)


def _length(rng: Random) -> int:
    if rng.random() < 0.04:
        return 0
    return rng.choice(EDGES) if rng.random() < 0.7 else rng.randint(1, 300)


def _affordable(q_len: int, k_len: int, factor: int, dtype: str) -> tuple[int, int]:
    """Lengths whose truth takes well under a second; the widest float has no fast products."""
    most = 2_000_000 if dtype == "float64" else 10_000_000
    while q_len * k_len * factor > most:
        q_len, k_len = (q_len // 2, k_len) if q_len > k_len else (q_len, k_len // 2)
    return q_len, k_len


def _packed(rng: Random) -> Packed:
    count = rng.randint(1, 6)
    q, k = (tuple(rng.choice((0, 1, 3, 16, 17, 33, 64, 65, 90)) for _ in range(count)) for _ in "qk")
    used = tuple(rng.randint(0, n) for n in k) if rng.random() < 0.4 else None
    return Packed(q, k, used, rng.choice((0, 0, 5)), rng.choice((0, 0, 11)))


def _terms(rng: Random, packed: bool, large: bool) -> tuple[Term, ...]:
    """In the order in which a call applies them. Large scores leave the range of a user's exp and log."""
    terms: list[Term] = []
    if rng.random() < 0.25 and not large:
        terms.append(rng.choice(list(SCORES.values())))
    if rng.random() < 0.15:
        terms.append(Softcap(rng.choice((0.7, 5.0, 50.0))))
    if rng.random() < 0.2:
        terms.append(Alibi(per_batch=rng.random() < 0.5))
    if rng.random() < 0.25:
        # What a packed call's bias would span along queries and keys is not one number.
        patterns = [p for p in BIASES if not packed or not set(p) & {"q", "k"}]
        terms.append(Biases(tuple(rng.choice(patterns) for _ in range(rng.randint(1, 3)))))
    return tuple(terms)


def _rules(rng: Random, packed: bool) -> tuple[Rule, ...]:
    rules: list[Rule] = []
    if rng.random() < 0.4:
        rules.append(Causal())
    if rng.random() < 0.25:
        rules.append(Window(*(rng.choice((None, 0, 1, 5, 20, 64, 300)) for _ in range(2))))
    if rng.random() < 0.35:
        if packed or rng.random() < 0.7:
            rules.append(rng.choice(list(MASKS.values())))
        else:
            rules.append(Dense(rng.choice(BIASES), rng.choice((0.05, 0.5, 0.9))))
    return tuple(rules)


def _layout(rng: Random) -> Layout:
    axes = [0, 1, 2, 3]
    order = axes[:]
    if rng.random() < 0.5:
        rng.shuffle(order)
    return Layout(
        order=tuple(order),
        gap=rng.choice((0, 0, 1, 8)),
        step=rng.choice((1, 1, 1, 2)),
        reverse=tuple(a for a in axes if rng.random() < 0.12),
        expand=tuple(a for a in axes if rng.random() < 0.04),
        junk=rng.random() < 0.3,
        shift=rng.choice((0, 0, 0, 2, 5, 15)),
    )
