"""What a compiled kernel is specialised for, and the layout of its argument block.

A `Spec` holds everything that changes the code and nothing else: lengths, strides and addresses are read at
run time from one block of 64-bit words, so that one kernel serves every batch and length.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Dot = Literal["number", "pair", "tiles"]
Part = Literal["forward", "decode", "backward", "backward_dq", "backward_dkv"]
ARRAYS: Mapping[Part, tuple[str, ...]] = {
    "forward": ("q", "k", "v", "out"),
    "decode": ("q", "k", "v", "out"),
    "backward": ("q", "k", "v", "out", "dout", "dq", "dk", "dv"),
    "backward_dq": ("q", "k", "v", "out", "dout", "dq"),
    "backward_dkv": ("q", "k", "v", "out", "dout", "dk", "dv"),
}


# Keys of one split of a decode, and the queries of a sequence that may be decoded.
SPLIT_KEYS = 1024
DECODE_QUERIES = 8


def partial_bytes(rows: int, dim_v: int, size: int) -> int:
    """Shared memory of one split: O, then m, then l of every row; `dim_v` padded to vectors."""
    return rows * (dim_v + 2) * size


@dataclass(frozen=True, slots=True)
class RegisterTile:
    """Up to `rows` x `columns` vectors of accumulators, at most `accumulators` of them."""

    rows: int
    columns: int
    accumulators: int

    def cut(self, vectors: int) -> list[tuple[int, int, int]]:
        """(first vector, how many, rows) of tiles that cover `vectors`, as even as can be. Rows are halved
        until the accumulators suffice, so that whole tiles cover every multiple of `rows`."""
        count = -(-vectors // self.columns)
        cuts: list[tuple[int, int, int]] = []
        first = 0
        for i in range(count):
            width = -(-(vectors - first) // (count - i))
            rows = self.rows
            while rows * width > self.accumulators:
                rows //= 2
            cuts.append((first, width, rows))
            first += width
        return cuts


@dataclass(frozen=True, slots=True)
class TableCode:
    """One table: element type, number of axes, whether its gradient is accumulated, the axis, if any, along
    which the bounds of blocks are known, and the axes of rows and of keys, if tiles of it can be read and
    added whole (see staging)."""

    dtype: str
    rank: int
    gradient: bool = False
    bounded_axis: int | None = None
    staged: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Spec:
    """`dense` names the arrays whose head_dim is contiguous. Tile sizes: `query_vectors` vectors of queries
    by `block_k` keys; `dot` is the form of the products' operands (see form) and `tile` their register
    tile. `decode_rows` counts the rows of a decode's row group; a backward that has it is for the
    sequences that were decoded. `dtype` is that of q."""

    part: Part
    dtype: str
    dtype_kv: str
    dtype_out: str
    head_dim: int
    head_dim_v: int
    score: str | None
    mask: str | None
    factor: str | None
    tables: tuple[TableCode, ...]
    dropout: bool
    sinks: bool
    dlse: bool
    dense: frozenset[str]
    query_vectors: int
    block_k: int
    dot: Dot
    tile: RegisterTile
    bounds_block: int
    decode_rows: int = 0
    ahead: frozenset[str] = frozenset()
    paged: bool = False

    @property
    def key(self) -> str:
        """All fields as text, in a fixed order."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        fields["dense"], fields["ahead"] = sorted(self.dense), sorted(self.ahead)
        return repr(fields)


COMMON = (
    "counter", "num_tasks", "tasks", "scratch", "sequences", "heads_q", "group",
    "num_q_blocks", "acc_keys", "splits", "decoded_rows", "partials", "arrivals", "scale", "keep_scale",
    "drop_threshold", "seed_low", "seed_high", "sinks", "sinks_stride", "dsinks",
    "block_table", "block_table_stride", "page_size",
    "lse", "lse_batch", "lse_head", "lse_token",
    "stats", "stats_plane", "stats_batch", "stats_head", "stats_token",
    "dlse", "dlse_batch", "dlse_head", "dlse_token",
)  # fmt: skip


# One task of a backward: half-open ranges of batch entries, key heads, query blocks and keys, and the number
# of the partial sums that its table gradients go to.
TASK_WORDS = (
    "batch_begin", "batch_end", "head_begin", "head_end", "block_begin", "block_end", "key_begin", "key_end",
    "partial",
)  # fmt: skip


def argument_names(spec: Spec) -> tuple[str, ...]:
    """The words of the argument block, in order."""
    names = list(COMMON)
    for array in ARRAYS[spec.part]:
        names += [array] + [f"{array}_{axis}" for axis in ("batch", "token", "head", "dim")]
    for i, table in enumerate(spec.tables):
        names.append(f"table{i}")
        names += [f"table{i}_stride{axis}" for axis in range(table.rank)]
        names += [f"table{i}_extent{axis}" for axis in range(table.rank)]
        if table.bounded_axis is not None:
            names.append(f"bounds{i}")
            names += [f"bounds{i}_stride{axis}" for axis in range(table.rank)]
        if table.gradient:
            names += [f"grad{i}", f"grad{i}_partial"]
            names += [f"grad{i}_stride{axis}" for axis in range(table.rank)]
    return tuple(names)


# Words on either side of the tasks' counter that keep its cache line free of anything else.
_APART = 16


class ArgumentBlock:
    """Makes argument blocks: words that stay the same from call to call are set once, in a template.

    Behind a block's arguments lie the counter of the tasks and the addresses of the threads' scratch.
    """

    def __init__(self, spec: Spec, fixed: Mapping[str, int | float]) -> None:
        self.index = {name: i for i, name in enumerate(argument_names(spec))}
        self._counter = len(self.index) + _APART
        self._scratch = self._counter + _APART
        self._template = (ctypes.c_int64 * self._scratch)()
        for name, value in fixed.items():
            if isinstance(value, float):
                value = struct.unpack("<q", struct.pack("<d", value))[0]
            self._template[self.index[name]] = value

    def fill(
        self, values: Mapping[str, int], scratch: tuple[int, ...]
    ) -> tuple[ctypes.Array[ctypes.c_int64], int]:
        """A block of its own for one call, and its address. `scratch` has an address for each thread."""
        words = bytes(self._template) + bytes(8 * len(scratch))
        block = (ctypes.c_int64 * (self._scratch + len(scratch))).from_buffer_copy(words)
        address = ctypes.addressof(block)
        index = self.index
        for name, value in values.items():
            block[index[name]] = value
        block[self._scratch :] = scratch
        block[index["counter"]] = address + 8 * self._counter
        block[index["scratch"]] = address + 8 * self._scratch
        return block, address
