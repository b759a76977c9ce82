"""Tiles of v turned in shared memory, for products of 8-bit floats.

wgmma reads operands of 8 bits along k alone: of p . v that is along the keys, and v lies along its columns.

    turned[d, place(key)] = v[key, d]       place(16 a + 8 b + 2 t + c) = 16 a + 4 t + 2 b + c

A thread of a consumer holds scores of the keys 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t of every 16, and wgmma's left
operand of 8 bits has the places 4 t to 4 t + 3 in that thread. So with keys in this order P stays where it is
(`narrow`, `operand`); no thread hands anything to another.

Memory is moved as matrices of 8 x 8 pairs of bytes: ldmatrix gives a thread the pair of columns 2 i, 2 i + 1
of the keys 2 t and 2 t + 1, another of keys 8 + 2 t and 9 + 2 t. Two byte permutations make of these the
four places of column 2 i and the four of column 2 i + 1, which stmatrix puts away. For 16 bytes a thread
that is one ldmatrix, 4 byte permutations, one stmatrix.

Registers, in words a thread: PART * DIM / 512 at once, and as many again.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function

from anyflash.kernels.gluon.hopper import byte_planes, four_e4m3, seen_as

# Keys at once.
PART = gl.constexpr(32)


@constexpr_function
def _pairs_layout(keys: int, pairs: int) -> gl.DistributedLinearLayout:
    """Of (keys, pairs of columns), as ldmatrix leaves matrices of 8 x 8 that it turns. The last two bits of
    the columns go by warp."""
    bits = [1 << i for i in range((pairs - 1).bit_length())]
    *held, third, fourth = bits[3:]
    rows = [1 << i for i in range(4, (keys - 1).bit_length())]
    return gl.DistributedLinearLayout(
        [[1, 0], [8, 0], *([row, 0] for row in rows), *([0, bit] for bit in held)],
        [[2, 0], [4, 0], *([0, bit] for bit in bits[:3])],
        [[0, third], [0, fourth]],
        [],
        [keys, pairs],
    )


@constexpr_function
def turned_layout(keys: int) -> gl.NVMMASharedLayout:
    """Of (DIM, keys) 8-bit floats."""
    return gl.NVMMASharedLayout(min(keys, 128), 8)


@constexpr_function
def _of_pairs(width: int) -> gl.NVMMASharedLayout:
    """Of rows of `width` bytes, seen as pairs."""
    return gl.NVMMASharedLayout(min(width, 128), 16)


@gluon.jit
def turn(tile, turned, KEYS: gl.constexpr, DIM: gl.constexpr):
    """v of (.., KEYS, DIM) bytes to (DIM, KEYS), both in shared memory. One warpgroup."""
    TILE: gl.constexpr = _of_pairs(DIM)
    TURNED: gl.constexpr = _of_pairs(KEYS)
    LOADED: gl.constexpr = _pairs_layout(PART, DIM // 2)
    given = seen_as(tile, gl.int16, [KEYS, DIM // 2], TILE)
    made = seen_as(turned, gl.int16, [DIM, KEYS // 2], TURNED)
    for i in gl.static_range(KEYS // PART):
        # (PART, DIM / 2) pairs
        pairs = given.slice(i * PART, PART, 0).load(LOADED)
        # a, 2 t + c, pair, b
        pairs = gl.permute(gl.reshape(pairs, [PART // 16, 2, 8, DIM // 2]), (0, 2, 3, 1))
        low, high = gl.split(pairs)
        even, odd = byte_planes(low, high)
        # pair, even or odd, a, 2 t + b
        columns = gl.reshape(gl.permute(gl.join(even, odd), (2, 3, 0, 1)), [DIM, PART // 2])
        made.slice(i * PART // 2, PART // 2, 1).store(columns)


@gluon.jit
def narrow(p, KEYS: gl.constexpr):
    """p (64, KEYS) in e4m3: (64, KEYS / 4) words of four neighbours in the order of `turn`.

    Words, and not bytes, go round a loop: bytes would be taken apart for it and put together again.
    """
    p = gl.permute(gl.reshape(p, [64, KEYS // 16, 2, 4, 2]), (0, 1, 3, 4, 2))
    low, high = gl.split(p)
    first, second = gl.split(low)
    third, fourth = gl.split(high)
    return gl.reshape(four_e4m3(first, second, third, fourth), [64, KEYS // 4])


@gluon.jit
def operand(words, KEYS: gl.constexpr, LAYOUT: gl.constexpr):
    """What `narrow` makes of p, as (64, KEYS) in e4m3, a left operand of layout LAYOUT."""
    low = gl.join(words.to(gl.int8), (words >> 8).to(gl.int8))
    high = gl.join((words >> 16).to(gl.int8), (words >> 24).to(gl.int8))
    p = gl.reshape(gl.permute(gl.join(low, high), (0, 1, 3, 2)), [64, KEYS])
    return gl.convert_layout(p.to(gl.float8e4nv, bitcast=True), LAYOUT)
