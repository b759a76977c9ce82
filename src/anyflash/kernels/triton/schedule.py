"""Tile sizes, warps and stages by device and head_dim: tables, no search at run time. What was tuned on a
device (tuned.py) comes first.

What bounds a choice: a block of rows keeps acc (BLOCK_M x DIM_V words) and a tile of scores (BLOCK_M x
BLOCK_N) in registers, of which a thread has 255; q and the stages of k and v lie in shared memory: (BLOCK_M
* DIM + stages * BLOCK_N * (DIM + DIM_V)) * itemsize bytes of the device's limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anyflash.kernels.triton import tuned

Part = Literal["forward", "backward_dkv", "backward_dq"]
PARTS: tuple[Part, ...] = ("forward", "backward_dkv", "backward_dq")


@dataclass(frozen=True, slots=True)
class Tiles:
    """One kernel's configuration."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.block_m} x {self.block_n}, {self.warps} warps, {self.stages} stages"


# Bytes of shared memory that one block of threads may have.
SHARED_BYTES = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx90a": 65_536,
    "gfx942": 65_536,
}
_SMALLEST = 65_536
# Interpreted tiles are small, so that short sequences have several.
INTERPRETED = Tiles(32, 32, 4, 1)

# (greatest width, both pieces together) -> candidates, the preferred first; the first that fits is taken. The
# preferred ones spill no register on sm_90: tests/gpu/budgets.json has what each takes. None is tuned on a
# device yet.
_TABLES: dict[Part, tuple[tuple[int, tuple[Tiles, ...]], ...]] = {
    "forward": (
        (64, (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 1), Tiles(64, 32, 4, 1))),
        (128, (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 1), Tiles(64, 32, 4, 1))),
        (256, (Tiles(128, 32, 8, 2), Tiles(64, 32, 8, 1), Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1))),
        (1024, (Tiles(32, 32, 8, 1), Tiles(16, 32, 4, 1), Tiles(16, 16, 4, 1))),
    ),
    "backward_dkv": (
        (64, (Tiles(32, 128, 8, 2), Tiles(32, 64, 4, 1), Tiles(32, 32, 4, 1))),
        (128, (Tiles(32, 64, 8, 2), Tiles(32, 64, 8, 1), Tiles(32, 32, 4, 1))),
        (256, (Tiles(32, 32, 8, 1), Tiles(16, 32, 4, 1), Tiles(16, 16, 4, 1))),
        (1024, (Tiles(16, 16, 8, 1), Tiles(16, 16, 4, 1))),
    ),
    "backward_dq": (
        (64, (Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 1), Tiles(32, 32, 4, 1))),
        (128, (Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 1), Tiles(32, 32, 4, 1))),
        (256, (Tiles(32, 64, 8, 1), Tiles(32, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 16, 4, 1))),
        (1024, (Tiles(16, 32, 8, 1), Tiles(16, 16, 4, 1))),
    ),
}
# The forward where 8-bit floats are made float16, which takes registers.
_WIDENED: tuple[tuple[int, tuple[Tiles, ...]], ...] = (
    (128, (Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 1))),
    *_TABLES["forward"][2:],
)

# Rows that are others where those above spill: by family of architectures, part and greatest width.
_ELSEWHERE: dict[tuple[str, Part, int], tuple[Tiles, ...]] = {
    ("gfx", "backward_dkv", 64): (Tiles(32, 64, 8, 1),),
    ("gfx", "backward_dkv", 128): (Tiles(16, 32, 4, 1),),
    ("sm_100", "forward", 256): (Tiles(64, 32, 8, 1),),
}

# float32 has twice the bytes in shared memory, and without tf32 no tensor core: each thread then holds what
# it multiplies, so tiles are small.
_FLOAT32_TABLES: dict[Part, tuple[tuple[int, tuple[Tiles, ...]], ...]] = {
    "forward": (
        (64, (Tiles(64, 32, 8, 1), Tiles(32, 32, 4, 1))),
        (128, (Tiles(32, 32, 8, 1), Tiles(16, 32, 4, 1))),
        (256, (Tiles(32, 16, 8, 1), Tiles(16, 16, 4, 1))),
        (1024, (Tiles(16, 16, 8, 1),)),
    ),
    "backward_dkv": (
        (64, (Tiles(32, 32, 8, 1), Tiles(16, 16, 4, 1))),
        (128, (Tiles(32, 32, 8, 1), Tiles(16, 16, 4, 1))),
        (256, (Tiles(16, 16, 8, 1), Tiles(16, 16, 4, 1))),
        (1024, (Tiles(16, 16, 8, 1),)),
    ),
    "backward_dq": (
        (64, (Tiles(32, 32, 8, 1), Tiles(16, 16, 4, 1))),
        (128, (Tiles(32, 32, 8, 1), Tiles(16, 16, 4, 1))),
        (256, (Tiles(16, 16, 8, 1), Tiles(16, 16, 4, 1))),
        (1024, (Tiles(16, 16, 8, 1),)),
    ),
}

Rows = Literal["few", "some", "many"]
# Rows (query tokens times heads of a group) of a sequence over a cache: more than the first, at most the
# second. Which tiles a sequence has follows from its own rows alone, so that its result does. The keys of few
# and some rows are cut into segments; many rows fill a device by themselves.
ROWS: dict[Rows, tuple[int, int]] = {"few": (0, 16), "some": (16, 128), "many": (128, 2**31 - 1)}


@dataclass(frozen=True, slots=True)
class Cut:
    """How keys are shared out: at most `segments` (a power of two), of at least `keys` keys each."""

    segments: int
    keys: int

    def __str__(self) -> str:
        return f"at most {self.segments} segments of {self.keys} keys or more"


_CUTS: dict[Rows, Cut] = {"few": Cut(32, 256), "some": Cut(16, 512), "many": Cut(1, 1)}
_INTERPRETED_CUTS: dict[Rows, Cut] = {"few": Cut(8, 64), "some": Cut(4, 64), "many": Cut(1, 1)}
# Words of other segments' acc that a thread may hold while it adds them up, and segments at once.
_HELD, _AT_ONCE, _THREADS_A_WARP = 64, 8, 32
# Words that a vector of a segment's sums is aligned to.
_ALIGNED = 16
# A dense call of few or some rows is one over a cache from so many keys on.
DECODE_KEYS = 1024
_INTERPRETED_DECODE: dict[Rows, Tiles] = {
    "few": Tiles(16, 32, 4, 1),
    "some": Tiles(32, 32, 4, 1),
    "many": Tiles(32, 32, 4, 1),
}
_DECODE_TABLES: dict[Rows, tuple[tuple[int, tuple[Tiles, ...]], ...]] = {
    "few": (
        (128, (Tiles(16, 64, 4, 3), Tiles(16, 64, 4, 2), Tiles(16, 64, 4, 1), Tiles(16, 32, 4, 1))),
        (256, (Tiles(16, 32, 4, 2), Tiles(16, 32, 4, 1), Tiles(16, 16, 4, 1))),
        (1024, (Tiles(16, 32, 8, 2), Tiles(16, 16, 4, 2), Tiles(16, 16, 4, 1))),
    ),
    "some": (
        (128, (Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 1))),
        (256, (Tiles(32, 32, 8, 2), Tiles(32, 32, 4, 1), Tiles(32, 16, 4, 1))),
        (1024, (Tiles(32, 32, 8, 2), Tiles(16, 16, 4, 1))),
    ),
    "many": (
        (128, (Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 1), Tiles(64, 32, 4, 1))),
        (256, (Tiles(64, 32, 8, 2), Tiles(32, 32, 4, 1), Tiles(32, 16, 4, 1))),
        (1024, (Tiles(32, 32, 8, 1), Tiles(16, 16, 4, 1))),
    ),
}
# Where 8-bit floats of a cache are widened.
_WIDENED_DECODE: dict[Rows, tuple[tuple[int, tuple[Tiles, ...]], ...]] = {
    "few": ((128, (Tiles(16, 32, 4, 2), Tiles(16, 32, 4, 1))), *_DECODE_TABLES["few"][1:]),
    "some": ((128, (Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 1))), *_DECODE_TABLES["some"][1:]),
    "many": ((128, (Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 1))), *_DECODE_TABLES["many"][1:]),
}


def cut(rows: Rows, arch: str) -> Cut:
    return (_INTERPRETED_CUTS if arch == "interpreter" else _CUTS)[rows]


def decode_tiles(rows: Rows, arch: str, dim: int, dim_v: int, itemsize: int, widened: bool = False) -> Tiles:
    """The configuration of the kernel of sequences over a cache, by how many rows they have."""
    if arch == "interpreter":
        return _INTERPRETED_DECODE[rows]
    table, name = _DECODE_TABLES[rows], f"decode_{rows}"
    if widened:
        table, name = _WIDENED_DECODE[rows], f"{name}_widened"
    return _fitting(table, name, "forward", arch, dim, dim_v, itemsize)


def limit(arch: str) -> int:
    """Bytes of shared memory that one block of threads may have."""
    return SHARED_BYTES.get(arch, _SMALLEST)


def decode_constants(
    rows: Rows, arch: str, dim: int, dim_v: int, itemsize: int, greatest: int, widened: bool = False
) -> dict[str, int]:
    """All constants of the kernel that follow from the device, the dims and the `greatest` number of rows.

    CHUNK segments are added up at once, and KEPT rows of each lie in memory behind HEAD words.
    """
    chosen, shared_out = decode_tiles(rows, arch, dim, dim_v, itemsize, widened), cut(rows, arch)
    (wide, rest), (wide_v, rest_v) = split(dim), split(dim_v)
    found = {
        "DIM": dim,
        "WIDE": wide,
        "REST": rest,
        "DIM_V": dim_v,
        "WIDE_V": wide_v,
        "REST_V": rest_v,
        "BLOCK_M": chosen.block_m,
        "BLOCK_N": chosen.block_n,
        "STAGES": chosen.stages,
        "SPLIT": shared_out.segments > 1,
        "SEGMENTS": shared_out.segments,
        "LEAST": max(shared_out.keys // chosen.block_n, 1),
        "WAITS": arch.startswith("gfx"),
        "num_warps": chosen.warps,
        "num_stages": chosen.stages,
    }
    fit = _HELD * _THREADS_A_WARP * chosen.warps // (chosen.block_m * (2 + wide_v + rest_v))
    kept = min(chosen.block_m, 1 << (greatest - 1).bit_length())
    chunk = min(_AT_ONCE, 1 << max(fit.bit_length() - 1, 0))
    return found | {"CHUNK": chunk, "KEPT": kept, "HEAD": max(2 * kept, _ALIGNED)}


def segment_words(constants: dict[str, int]) -> int:
    """What a segment of a block of rows leaves: m, l and acc."""
    return constants["HEAD"] + constants["KEPT"] * (constants["WIDE_V"] + constants["REST_V"])


def split(dim: int, least: int = 16) -> tuple[int, int]:
    """The two pieces of a row of `dim` elements: a power of two, and the smallest that covers the rest."""
    wide = max(least, 1 << (dim.bit_length() - 1))
    rest = dim - wide
    return (wide, 0) if rest <= 0 else (wide, max(least, 1 << (rest - 1).bit_length()))


def classes(part: Part) -> tuple[int, ...]:
    """The greatest widths of the rows of a part's table."""
    return tuple(most for most, _ in _TABLES[part])


def padded(dim: int) -> int:
    return sum(split(dim))


def tiles(part: Part, arch: str, dim: int, dim_v: int, itemsize: int, widened: bool = False) -> Tiles:
    """The configuration of a kernel on a device of architecture `arch` ("sm_90", "gfx942", "interpreter");
    `widened` where its 8-bit floats are made float16."""
    if arch == "interpreter":
        return INTERPRETED
    if widened:
        return _fitting(_WIDENED, f"{part}_widened", part, arch, dim, dim_v, itemsize)
    tables = _FLOAT32_TABLES if itemsize == 4 else _TABLES
    return _fitting(tables[part], part, part, arch, dim, dim_v, itemsize)


def _fitting(
    table: tuple[tuple[int, tuple[Tiles, ...]], ...],
    name: str,
    part: Part,
    arch: str,
    dim: int,
    dim_v: int,
    itemsize: int,
) -> Tiles:
    """What was tuned as `name`, or else the first candidate that has room in the device's shared memory."""
    width, width_v = padded(dim), padded(dim_v)
    most, candidates = next(row for row in table if max(width, width_v) <= row[0])
    if found := tuned.entries(arch).get(tuned.key(name, most, itemsize)):
        return Tiles(*found)
    if itemsize == 2:
        family = "gfx" if arch.startswith("gfx") else arch
        candidates = _ELSEWHERE.get((family, name, most), candidates)  # type: ignore[arg-type]
    for candidate in candidates:
        if shared_bytes(part, candidate, width, width_v, itemsize) <= limit(arch):
            return candidate
    return candidates[-1]


def too_small(tiles: Tiles, part: Part, arch: str, dim: int, dim_v: int, itemsize: int) -> str | None:
    """Why a device's shared memory has no room for these tiles, or None.

    Only a backward can be too large: every row of the forward's table ends with tiles that have room
    everywhere, and on AMD operands go through registers.
    """
    if arch == "interpreter" or arch.startswith("gfx") or part == "forward":
        return None
    wanted = shared_bytes(part, tiles, padded(dim), padded(dim_v), itemsize)
    return (
        f"takes {wanted} bytes of shared memory, a block has {limit(arch)}" if wanted > limit(arch) else None
    )


def shared_bytes(part: Part, tiles: Tiles, dim: int, dim_v: int, itemsize: int) -> int:
    """An upper estimate: what stays for the whole block, and every stage of what moves past it."""
    if part == "forward":
        return itemsize * (tiles.block_m * dim + tiles.stages * tiles.block_n * (dim + dim_v))
    still, moving = (
        (tiles.block_n, tiles.block_m) if part == "backward_dkv" else (tiles.block_m, tiles.block_n)
    )
    scores = tiles.block_m * tiles.block_n
    return itemsize * ((still + tiles.stages * moving) * (dim + dim_v) + 2 * scores)
