"""What generated source calls beside Gluon's own functions: kernels/triton/elementary.py in this dialect."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Twice the 32-bit range: sums and differences of two saturated numbers stay exact.
_LIMIT = gl.constexpr(2**31)


@gluon.jit
def indices(EXTENT: gl.constexpr):
    """0 to EXTENT - 1, spread over the partition's threads."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.arange(0, EXTENT, layout=layout)


@gluon.jit
def clamped(index, extent):
    """A table's index, held inside the axis, in 64 bits for the address."""
    return gl.maximum(gl.minimum(whole(index), extent - 1), 0)


@gluon.jit
def whole(a):
    """An integer in 64 bits, also from a literal."""
    return (a + gl.full([], 0, gl.int64)).to(gl.int64)


@gluon.jit
def scalar(a):
    """A float, also from a literal."""
    return a + gl.full([], 0.0, gl.float32)


@gluon.jit
def truth(a):
    """A bool, also from a literal."""
    return a & gl.full([], True, gl.int1)


@gluon.jit
def saturated(a):
    return gl.maximum(gl.minimum(whole(a), _LIMIT), -_LIMIT)


@gluon.jit
def floor_div(a, b):
    """Rounded towards minus infinity; 0 for a division by 0."""
    divisor = gl.where(b == 0, 1, b)
    quotient = a // divisor
    remainder = a - quotient * divisor
    down = (remainder != 0) & ((remainder < 0) != (divisor < 0))
    return gl.where(b == 0, 0, gl.where(down, quotient - 1, quotient))


@gluon.jit
def floor_mod(a, b):
    """a - b * floor_div(a, b); 0 for a division by 0."""
    divisor = gl.where(b == 0, 1, b)
    remainder = a - (a // divisor) * divisor
    down = (remainder != 0) & ((remainder < 0) != (divisor < 0))
    return gl.where(b == 0, 0, gl.where(down, remainder + divisor, remainder))


@gluon.jit
def minimum(a, b):
    """The smaller; NaN if either is."""
    return gl.where(a != a, a, gl.where(b < a, b, gl.where(b != b, b, a)))


@gluon.jit
def maximum(a, b):
    """The larger; NaN if either is."""
    return gl.where(a != a, a, gl.where(b > a, b, gl.where(b != b, b, a)))


@gluon.jit
def tanh(x):
    """Odd, within (-1, 1) inclusive; a Taylor series below 1/4, where 1 - u would cancel."""
    u = gl.exp(-2.0 * gl.abs(x))
    large = (1.0 - u) / (1.0 + u)
    x2 = x * x
    series = -1382.0 / 155925.0
    series = series * x2 + 62.0 / 2835.0
    series = series * x2 - 17.0 / 315.0
    series = series * x2 + 2.0 / 15.0
    series = series * x2 - 1.0 / 3.0
    series = series * x2 + 1.0
    return gl.where(gl.abs(x) < 0.25, series * x, gl.where(x < 0, -large, large))
