"""Philox4x32 with 7 rounds (Salmon et al., SC 2011) for a vector of query rows: the dropout of
`semantics.rng`.

Counter (k >> 2, row, head, batch), key (seed low, seed high); the four words are those of keys k, k+1, k+2,
k+3 for k divisible by 4.
"""

from __future__ import annotations

from anyflash.kernels.llvm.ir import I32, I64, Builder, Value, lanes_of, vec

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def words(
    b: Builder, group: Value, rows: Value, head: Value, batch: Value, key: tuple[Value, Value]
) -> list[Value]:
    """Four vectors of 32-bit words; `rows` is a vector, all else scalar, all i32."""
    lanes = lanes_of(rows.type)
    counter = [b.splat(x, lanes) for x in (group, rows, head, batch)]
    low, high = key
    for i in range(ROUNDS):
        if i:
            low, high = low + _signed(_WEYL[0]), high + _signed(_WEYL[1])
        first_high, first_low = _multiply(b, counter[0], _MULTIPLIERS[0])
        second_high, second_low = _multiply(b, counter[2], _MULTIPLIERS[1])
        counter = [second_high ^ counter[1] ^ low, second_low, first_high ^ counter[3] ^ high, first_low]
    return counter


def _multiply(b: Builder, x: Value, factor: int) -> tuple[Value, Value]:
    """High and low 32 bits of the unsigned product."""
    wide = b.cast("zext", x, I64) * factor
    return b.cast("trunc", wide >> 32, I32), b.cast("trunc", wide, I32)


def _signed(x: int) -> int:
    return x - (1 << 32) if x >= 1 << 31 else x


def kept(b: Builder, word: Value, threshold: Value) -> Value:
    """word >= threshold, unsigned: vector of i1."""
    lanes = lanes_of(word.type)
    limit = b.splat(threshold, lanes)
    return b.value(f"icmp uge {word.type} {word.name}, {limit.name}", vec("i1", lanes))
