"""Which probabilities of a tile stay: the numbers of semantics/rng.py, bit for bit.

    words = philox4x32(seed, (key // 4, row, head, batch))      7 rounds
    a pair stays if word key % 4 >= threshold

Four neighbouring keys share a counter, but no thread holds four: in wgmma's layout it holds pairs of keys,
and of transposed scores one key. So words are computed in a layout of their own, `counters`, in which each
thread has whole counters and no two threads the same one; then single bits change places, inside a warp,
by shuffles of packed bytes: no shared memory, no barrier. The other ways cost twice (pairs) or four times
(single keys) the arithmetic.

Of the 14 products of 32 x 32 bits that a counter takes 9 are left for each: the first two rounds and half of
the third read the key or the row alone, and are computed along their axis. In all a counter is 9 products,
11 xors of three numbers and 4 comparisons, a pair a quarter of that and 1 / 8 shuffle, 1 / 4 TRANSPOSED.

Registers: a counter's words live until they are compared; what stays is 1 byte a pair.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from anyflash.kernels.gluon.hopper import here

# As signed numbers of 32 bits; arithmetic wraps around.
_KEY_STEPS = gl.constexpr((0x9E3779B9 - 2**32, 0xBB67AE85 - 2**32))
_LEAST = gl.constexpr(-(2**31))


@gluon.constexpr_function
def counters(ROWS, KEYS, TRANSPOSED):
    """The layout of (ROWS, KEYS / 4) counters: wgmma's of scores, but that a thread has keys 1 and 2, the
    words of a counter, and lanes that had them get other bits.

    wgmma's has in a thread key 1, row 8 and keys 8, 16, ..., in lanes keys 2 and 4 and rows 1, 2 and 4; or
    TRANSPOSED in a thread row 1, key 8 and rows 8, 16, ..., in lanes rows 2 and 4 and keys 1, 2 and 4. Lanes
    get key 8 here, or rows 1 and 8.
    """
    if TRANSPOSED:
        registers = [[0, 2]] + [[1 << bit, 0] for bit in range(4, ROWS.bit_length() - 1)]
        lanes = [[2, 0], [4, 0], [1, 0], [8, 0], [0, 1]]
        warps = [[0, 4], [0, 8]]
    else:
        registers = [[8, 0]] + [[0, 1 << bit] for bit in range(2, KEYS.bit_length() - 3)]
        lanes = [[0, 2], [0, 1], [1, 0], [2, 0], [4, 0]]
        warps = [[16, 0], [32, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [ROWS, KEYS // 4])


@gluon.constexpr_function
def halfway(ROWS, KEYS):
    """Between `counters` and wgmma's transposed layout: the lowest bit of the key has its place. One bit at a
    time is shuffled; two would go through shared memory."""
    registers = [[1, 0], [0, 2], [0, 8]] + [[1 << bit, 0] for bit in range(4, ROWS.bit_length() - 1)]
    lanes = [[2, 0], [4, 0], [0, 1], [8, 0], [0, 4]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 16], [0, 32]], [], [ROWS, KEYS])


@gluon.jit
def product(a, FACTOR: gl.constexpr):
    """High and low word of a product of unsigned numbers of 32 bits."""
    wide = (a.to(gl.int64) & 0xFFFFFFFF) * FACTOR
    return (wide >> 32).to(gl.int32), wide.to(gl.int32)


@gluon.jit
def words(c0, c1, c2, c3, seed):
    """Philox4x32 with 7 rounds. The counters' words are spread over axes only as far as they differ."""
    key0 = gl.zeros_like(c2) + seed[0]
    key1 = gl.zeros_like(c2) + seed[1]
    for _ in gl.static_range(7):
        high0, low0 = product(c0, 0xD2511F53)
        high1, low1 = product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += _KEY_STEPS[0]
        key1 += _KEY_STEPS[1]
    return c0, c1, c2, c3


@gluon.jit
def kept(first_row, first_k, at, seed, threshold,
         ROWS: gl.constexpr, KEYS: gl.constexpr, TRANSPOSED: gl.constexpr):  # fmt: skip
    """Which pairs of a tile stay, (ROWS, KEYS), or TRANSPOSED (KEYS, ROWS), in some layout."""
    COUNTERS: gl.constexpr = counters(ROWS, KEYS, TRANSPOSED)
    # (1, KEYS / 4), (ROWS, 1)
    group = gl.expand_dims(first_k // 4 + gl.arange(0, KEYS // 4, layout=gl.SliceLayout(0, COUNTERS)), 0)
    row = gl.expand_dims(first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, COUNTERS)), 1)
    nothing = gl.zeros_like(group)
    w0, w1, w2, w3 = words(group, row, nothing + at[1], nothing + at[0], seed)
    # An unsigned comparison: both sides moved down by half of the range.
    least = threshold ^ _LEAST
    first = gl.join((w0 ^ _LEAST) >= least, (w2 ^ _LEAST) >= least)
    second = gl.join((w1 ^ _LEAST) >= least, (w3 ^ _LEAST) >= least)
    stays = gl.reshape(gl.join(first, second), [ROWS, KEYS])
    if TRANSPOSED:
        stays = gl.permute(gl.convert_layout(stays, halfway(ROWS, KEYS)), (1, 0))
    return stays


@gluon.jit
def dropped(p, first_row, first_k, at, dropout, TRANSPOSED: gl.constexpr, MARK: gl.constexpr):
    """p, 64 rows by keys, or TRANSPOSED 64 keys by rows, in wgmma's layout of 4 warps: 0 where a pair is
    dropped, or MARK, -p. MARK is for p >= 0 that is needed whole as well.

    first_k is a multiple of 4, `at` (batch, head, ...), `dropout` (seed's low and high half, threshold,
    scale of what stays), all but the last the bits of unsigned numbers.
    """
    LAYOUT: gl.constexpr = p.type.layout
    ROWS: gl.constexpr = p.shape[1 if TRANSPOSED else 0]
    KEYS: gl.constexpr = p.shape[0 if TRANSPOSED else 1]
    seed_low, seed_high, threshold, keep_scale = dropout
    # Else the keys of all rounds would be kept in registers from the kernel's start on.
    seed = here(seed_low), here(seed_high)
    stays = kept(first_row, first_k, at, seed, threshold, ROWS, KEYS, TRANSPOSED)
    return gl.where(gl.convert_layout(stays, LAYOUT), p, -p if MARK else 0.0)
