"""What generated source calls beside Triton's own functions."""

from __future__ import annotations

import triton
import triton.language as tl

# Twice the 32-bit range: sums and differences of two saturated numbers stay exact.
_LIMIT = tl.constexpr(2**31)


@triton.jit
def indices(EXTENT: tl.constexpr):
    """0 to EXTENT - 1."""
    return tl.arange(0, EXTENT)


@triton.jit
def clamped(index, extent):
    """A table's index, held inside the axis, in 64 bits for the address."""
    return tl.maximum(tl.minimum(whole(index), extent - 1), 0)


@triton.jit
def whole(a):
    """An integer in 64 bits, also from a literal."""
    return (a + tl.full([], 0, tl.int64)).to(tl.int64)


@triton.jit
def scalar(a):
    """A float, also from a literal."""
    return a + tl.full([], 0.0, tl.float32)


@triton.jit
def truth(a):
    """A bool, also from a literal."""
    return a & tl.full([], True, tl.int1)


@triton.jit
def saturated(a):
    return tl.maximum(tl.minimum(whole(a), _LIMIT), -_LIMIT)


@triton.jit
def floor_div(a, b):
    """Rounded towards minus infinity; 0 for a division by 0."""
    divisor = tl.where(b == 0, 1, b)
    quotient = a // divisor
    remainder = a - quotient * divisor
    down = (remainder != 0) & ((remainder < 0) != (divisor < 0))
    return tl.where(b == 0, 0, tl.where(down, quotient - 1, quotient))


@triton.jit
def floor_mod(a, b):
    """a - b * floor_div(a, b); 0 for a division by 0."""
    divisor = tl.where(b == 0, 1, b)
    remainder = a - (a // divisor) * divisor
    down = (remainder != 0) & ((remainder < 0) != (divisor < 0))
    return tl.where(b == 0, 0, tl.where(down, remainder + divisor, remainder))


@triton.jit
def minimum(a, b):
    """The smaller; NaN if either is."""
    return tl.where(a != a, a, tl.where(b < a, b, tl.where(b != b, b, a)))


@triton.jit
def maximum(a, b):
    """The larger; NaN if either is."""
    return tl.where(a != a, a, tl.where(b > a, b, tl.where(b != b, b, a)))


@triton.jit
def tanh(x):
    """Odd, within (-1, 1) inclusive; a Taylor series below 1/4, where 1 - u would cancel."""
    u = tl.exp(-2.0 * tl.abs(x))
    large = (1.0 - u) / (1.0 + u)
    x2 = x * x
    series = -1382.0 / 155925.0
    series = series * x2 + 62.0 / 2835.0
    series = series * x2 - 17.0 / 315.0
    series = series * x2 + 2.0 / 15.0
    series = series * x2 - 1.0 / 3.0
    series = series * x2 + 1.0
    return tl.where(tl.abs(x) < 0.25, series * x, tl.where(x < 0, -large, large))
