"""Products of few rows with rows of keys, both along head_dim: S[r, j] = Q[r, :] . K[j, :].

head_dim runs along the lanes, so K is read as it lies, once, in the user's dtype. Each (row, key) has a
vector of partial sums; those of `lanes` keys become one vector of scores by `sums_of_lanes`, pairwise
exchanges that cost two shuffles and an addition a vector.

Registers: rows x keys accumulators, `keys` vectors of K, one of Q; `keys` is as large as the accumulators
allow. Which lane adds up what depends on the vector length alone, never on rows or keys.

While a tile is read, the lines of the next one are asked for: the machine's own look-ahead ends with each
page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from anyflash.kernels.llvm.ir import BYTES, Builder, Scalar, Value, lanes_of, vec
from anyflash.kernels.llvm.layout import convert
from anyflash.kernels.llvm.spec import RegisterTile

_LINE = 64


@dataclass(frozen=True)
class KeyRows:
    """Rows in memory, padded to whole vectors: `pointer` of row 0, bytes from row to row, element type."""

    pointer: Value
    stride: Scalar
    element: str


Upcoming = Callable[[Value], list[tuple[Value, Scalar, int]]]
"""upcoming(j) -> of each array to be read next: the address of its row j, bytes from row to row, bytes of a
row."""


def keys_at_once(tile: RegisterTile, lanes: int) -> int:
    keys = 1
    while 2 * keys <= lanes and 2 * keys * tile.rows <= tile.accumulators:
        keys *= 2
    return keys


def row_products(
    b: Builder,
    q: KeyRows,
    k: KeyRows,
    num_keys: Scalar,
    columns: int,
    lanes: int,
    *,
    tile: RegisterTile,
    spare: Value,
    store: Callable[[int, Value, Value], None],
    upcoming: Upcoming = lambda j: [],
) -> None:
    """store(row, j, S[row, j : j + lanes]) for `tile.rows` rows and every group of lanes among the keys.

    q holds numbers of the accumulator's type. `columns` and `num_keys` are whole vectors. `spare` takes rows
    x lanes vectors.
    """
    vector, step = vec(q.element, lanes), lanes * BYTES[q.element]
    k_step, keys = lanes * BYTES[k.element], keys_at_once(tile, lanes)
    chunks = columns // lanes
    unroll = 2 if chunks % 2 == 0 else 1

    def sums(key: Value, ahead: list[tuple[Value, Scalar, int]]) -> list[list[Value]]:
        """Of `keys` keys from `key` on: [row][key] partial sums. `ahead` as from `upcoming`, of these
        keys."""
        acc = [[b.var(vector, b.const(0.0, vector)) for _ in range(keys)] for _ in range(tile.rows)]
        k_rows = [b.at(k.pointer, (key + x) * k.stride) for x in range(keys)]
        lines = [
            b.at(row, x * stride)
            for row, stride, size in ahead
            if size >= chunks * k_step
            for x in range(keys)
        ]
        with b.loop(0, chunks, unroll) as first:
            for u in range(unroll):
                c = first + u if u else first
                if u * k_step % _LINE == 0:
                    for line in lines:
                        b.prefetch(b.at(line, c * k_step))
                loaded = [
                    convert(b, b.load(vec(k.element, lanes), b.at(row, c * k_step)), q.element)
                    for row in k_rows
                ]
                for r in range(tile.rows):
                    q_row = b.load(vector, b.at(b.at(q.pointer, r * q.stride), c * step), BYTES[q.element])
                    for x in range(keys):
                        acc[r][x].set(b.fma(q_row, loaded[x], acc[r][x].get()))
        return [[x.get() for x in row] for row in acc]

    with b.loop(0, num_keys, lanes) as first:
        coming = upcoming(first)
        if keys == lanes:
            rows = sums(first, coming)
        else:
            with b.loop(0, lanes, keys) as j:
                of_these = [(b.at(row, j * stride), stride, size) for row, stride, size in coming]
                for r, row in enumerate(sums(first + j, of_these)):
                    for x, value in enumerate(row):
                        b.store(value, b.at(spare, (j + (r * lanes + x)) * step), BYTES[q.element])
            rows = [
                [b.load(vector, b.at(spare, (r * lanes + x) * step), BYTES[q.element]) for x in range(lanes)]
                for r in range(tile.rows)
            ]
        for r, row in enumerate(rows):
            store(r, first, sums_of_lanes(b, row))


def columns_of_products(
    b: Builder,
    q: KeyRows,
    k: KeyRows,
    num_keys: Value,
    columns: int,
    lanes: int,
    *,
    tile: RegisterTile,
    spare: Value,
    by_row: Value,
    target: Value,
    target_stride: int,
    rows: int,
) -> None:
    """The same products as target[key, row], of the first `rows` rows. `by_row` takes tile.rows rows of
    `num_keys` numbers."""
    size = BYTES[q.element]
    row_bytes = num_keys * size

    def store(r: int, j: Value, x: Value) -> None:
        b.store(x, b.at(b.at(by_row, row_bytes * r), j * size), size)

    row_products(b, q, k, num_keys, columns, lanes, tile=tile, spare=spare, store=store)
    with b.loop(0, num_keys) as j:
        for r in range(rows):
            score = b.load(q.element, b.at(b.at(by_row, row_bytes * r), j * size), size)
            b.store(score, b.at(b.at(target, j * target_stride), r * size), size)


def sums_of_lanes(b: Builder, vectors: list[Value]) -> Value:
    """The vector whose lane i is the sum of all lanes of vectors[i]; as many vectors as lanes."""
    lanes = lanes_of(vectors[0].type)
    assert len(vectors) == lanes
    distance = 1
    while distance < lanes:
        low = [i if not i & distance else lanes + i - distance for i in range(lanes)]
        high = [i + distance if not i & distance else lanes + i for i in range(lanes)]
        vectors = [
            b.shuffle(x, y, low) + b.shuffle(x, y, high)
            for x, y in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        distance *= 2
    return vectors[0]
