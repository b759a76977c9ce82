"""Vector exponentials, logarithm and tanh as polynomials.

Calls into libm would go lane by lane, so each function is written out. With x = n + f, |f| <= 1/2:

    exp2(x) = 2**n * P(f)             P interpolates 2**f
    ln(x) = e ln 2 + ln(1 + f)        x = 2**e (1 + f), 1 + f in [sqrt(1/2), sqrt(2)); with t = f / (2 + f)
                                      ln(1 + f) = f - (h - t (h + R)), h = f**2 / 2, R = 2 t**2 / 3 + ...
    tanh(x) = sign(x) (1 - u) / (1 + u), u = exp(-2 |x|), and x - x**3/3 + ... where |x| is small

Errors are under 1.25 units of the last place, those of tanh under 3. NaN stays NaN, exp2(-inf) is 0.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from functools import cache

from anyflash.kernels.llvm.ir import (
    BYTES,
    DOUBLE,
    FLOAT,
    I32,
    I64,
    Builder,
    Value,
    element_of,
    lanes_of,
    mangle,
    vec,
)

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
_MANTISSA = {FLOAT: 23, DOUBLE: 52}
_BIAS = {FLOAT: 127, DOUBLE: 1023}
_INT = {FLOAT: I32, DOUBLE: I64}
_DEGREE = {FLOAT: 6, DOUBLE: 12}


@cache
def _exp2_coefficients(degree: int) -> tuple[float, ...]:
    """2**f on [-1/2, 1/2], interpolated; lowest power first, in exact rational arithmetic.

    At Chebyshev nodes if the degree is even: 0 is one of them, so that 2**0 is exactly 1. If it is odd, 0 is
    a double node, and the squares of the others are those of Chebyshev's polynomial with its least root at 0.
    """
    n = degree + 1
    if degree % 2 == 0:
        nodes = [math.cos(math.pi * (2 * i + 1) / (2 * n)) / 2 if 2 * i != degree else 0.0 for i in range(n)]
    else:
        least = math.cos(math.pi / n)
        squares = [(math.cos(math.pi * (2 * i + 1) / n) + least) / (1 + least) for i in range(n // 2 - 1)]
        nodes = [0.0, *(sign * math.sqrt(y) / 2 for y in squares for sign in (1, -1))]
    matrix = [[Fraction(x) ** p for p in range(n)] + [_exact_exp2(x)] for x in nodes]
    if degree % 2:
        matrix.append([Fraction(p == 1) for p in range(n)] + [_exact_ln2()])
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(matrix[r][i]))
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        for r in range(n):
            if r != i:
                ratio = matrix[r][i] / matrix[i][i]
                matrix[r] = [a - ratio * c for a, c in zip(matrix[r], matrix[i], strict=True)]
    return tuple(float(matrix[i][n] / matrix[i][i]) for i in range(n))


def _exact_exp2(x: float) -> Fraction:
    """2**x to far below double rounding, as a Fraction."""
    y = Fraction(x) * _exact_ln2()
    term = total = Fraction(1)
    for k in range(1, 28):
        term = term * y / k
        total += term
    return total.limit_denominator(10**40)


@cache
def _exact_ln2() -> Fraction:
    return sum((Fraction(1, k * 2**k) for k in range(1, 90)), Fraction(0))


def exp2(b: Builder, x: Value, degree: int | None = None) -> Value:
    """2**x. `degree` may be lowered where the result is rounded to 8 bits anyway."""
    element, lanes = element_of(x.type), lanes_of(x.type)
    # The clamp keeps -inf - -inf from making NaN of -inf. Where there is no scalef, a whole part of -127
    # (-1023) has exponent bits 0, so all that would be denormal becomes exactly 0.
    scalef = lanes * BYTES[element] == 64
    lowest = {True: {FLOAT: -200.0, DOUBLE: -1200.0}, False: {FLOAT: -127.0, DOUBLE: -1023.0}}[scalef][
        element
    ]
    x = b.max(b.const(lowest, x.type), x)
    whole = b.call(x.type, f"llvm.roundeven.{mangle(x.type)}", x)
    fraction = x - whole
    coefficients = _exp2_coefficients(degree or _DEGREE[element])
    result = b.const(coefficients[-1], x.type)
    for c in coefficients[-2::-1]:
        result = b.fma(result, fraction, b.const(c, x.type))
    if scalef:
        return ldexp(b, result, whole)
    return result * power_of_two(b, _whole_number(b, whole), element)


def _whole_number(b: Builder, x: Value) -> Value:
    """fptosi; frozen, so that a NaN input gives some integer rather than poison."""
    integer = b.cast("fptosi", x, _INT[element_of(x.type)])
    return b.value(f"freeze {integer.type} {integer.name}", integer.type)


def power_of_two(b: Builder, exponent: Value, element: str) -> Value:
    """2**exponent for an integer vector within the normal range, by building the exponent bits."""
    bits = (exponent + _BIAS[element]) << _MANTISSA[element]
    return b.bitcast(bits, vec(element, lanes_of(exponent.type)))


def ldexp(b: Builder, value: Value, exponent: Value) -> Value:
    """value * 2**exponent for a whole exponent within twice the normal range."""
    element, lanes = element_of(value.type), lanes_of(value.type)
    if element == FLOAT and lanes == 16:
        return b.value(
            f"call {value.type} @llvm.x86.avx512.mask.scalef.ps.512({value.type} {value.name}, {value.type} "
            f"{exponent.name}, {value.type} {value.name}, i16 -1, i32 4)",
            value.type,
        )
    if element == DOUBLE and lanes == 8:
        return b.value(
            f"call {value.type} @llvm.x86.avx512.mask.scalef.pd.512({value.type} {value.name}, {value.type} "
            f"{exponent.name}, {value.type} {value.name}, i8 -1, i32 4)",
            value.type,
        )
    # Two factors, each a normal number, so that a denormal result is rounded once.
    whole = _whole_number(b, exponent)
    first = b.binary("ashr", whole, 1)
    for part in (first, whole - first):
        value = value * power_of_two(b, part, element)
    return value


def exp(b: Builder, x: Value) -> Value:
    """e**x, with the product x * log2(e) in two parts so that large arguments keep their digits."""
    element = element_of(x.type)
    limit = 89.0 if element == FLOAT else 710.0
    clamped = b.max(b.const(-105.0 if element == FLOAT else -746.0, x.type), b.min(b.const(limit, x.type), x))
    whole = b.call(x.type, f"llvm.roundeven.{mangle(x.type)}", clamped * LOG2_E)
    high = _round_to(LN_2, element, 12 if element == FLOAT else 32)
    rest = b.fma(whole, -high, clamped)
    rest = b.fma(whole, -float(_exact_ln2() - Fraction(high)), rest)
    coefficients = _exp2_coefficients(_DEGREE[element])
    fraction = rest * LOG2_E
    result = b.const(coefficients[-1], x.type)
    for c in coefficients[-2::-1]:
        result = b.fma(result, fraction, b.const(c, x.type))
    result = ldexp(b, result, whole)
    return b.select(b.compare("ge", x, limit), b.const(math.inf, x.type), result)


def _round_to(x: float, element: str, bits: int) -> float:
    return math.ldexp(round(math.ldexp(x, bits)), -bits)


def log2(b: Builder, x: Value) -> Value:
    """log2 of x >= 0: -inf at 0, inf at inf, NaN below 0."""
    e, f, rest = _split_log(b, x)
    element = element_of(x.type)
    # (f - ln) - rest is what rounding left of ln(1 + f).
    high = _round_to(LOG2_E, element, 11 if element == FLOAT else 26)
    ln = f - rest
    low = b.fma(ln, float(1 / _exact_ln2() - Fraction(high)), b.binary("mul", (f - ln) - rest, LOG2_E))
    return _special_log(b, x, b.fma(ln, high, e) + low)


def log(b: Builder, x: Value) -> Value:
    """Natural logarithm, with the values of log2 where x is not positive and finite."""
    e, f, rest = _split_log(b, x)
    element = element_of(x.type)
    high = _round_to(LN_2, element, 12 if element == FLOAT else 32)
    low = float(_exact_ln2() - Fraction(high))
    return _special_log(b, x, b.fma(e, high, f - (rest - e * low)))


def _split_log(b: Builder, x: Value) -> tuple[Value, Value, Value]:
    """(e, f, rest) with x = 2**e (1 + f), 1 + f in [sqrt(1/2), sqrt(2)), and ln(1 + f) = f - rest."""
    element, lanes = element_of(x.type), lanes_of(x.type)
    integer = vec(_INT[element], lanes)
    tiny = 2.0**-126 if element == FLOAT else 2.0**-1022
    lift = 2.0 ** (_MANTISSA[element] + 2)
    small = b.compare("lt", x, tiny)
    normal = b.select(small, x * lift, x)
    # Adding the distance from sqrt(1/2) to 1 carries into the exponent just when z >= sqrt(2).
    bits = b.bitcast(normal, integer)
    shifted = bits - _bits(math.sqrt(0.5), element)
    exponent = b.binary("ashr", shifted, _MANTISSA[element])
    f = b.bitcast(bits - (exponent << _MANTISSA[element]), x.type) - 1.0
    e = b.to_float(exponent, element) - b.select(
        small, b.const(float(_MANTISSA[element] + 2), x.type), b.const(0.0, x.type)
    )
    t = f / (f + 2.0)
    t2 = t * t
    terms = 6 if element == FLOAT else 11
    series = b.const(2.0 / (2 * terms + 1), x.type)
    for i in range(terms - 1, 0, -1):
        series = b.fma(series, t2, b.const(2.0 / (2 * i + 1), x.type))
    half = f * f * 0.5
    return e, f, half - t * b.fma(series, t2, half)


def _special_log(b: Builder, x: Value, result: Value) -> Value:
    result = b.select(b.compare("eq", x, 0.0), b.const(-math.inf, x.type), result)
    result = b.select(b.compare("eq", x, math.inf), x, result)
    invalid = b.value(f"fcmp ult {x.type} {x.name}, {b.const(0.0, x.type).name}", vec("i1", lanes_of(x.type)))
    return b.select(invalid, b.const(math.nan, x.type), result)


def _bits(value: float, element: str) -> int:
    if element == FLOAT:
        return struct.unpack("<i", struct.pack("<f", value))[0]
    return struct.unpack("<q", struct.pack("<d", value))[0]


def tanh(b: Builder, x: Value) -> Value:
    """Odd, within (-1, 1) inclusive; a short series near 0, where 1 - u would cancel."""
    magnitude = b.abs(x)
    u = exp2(b, magnitude * (-2 * LOG2_E))
    large = (b.const(1.0, x.type) - u) / (u + 1.0)
    x2 = x * x
    # tanh(x) / x for |x| < 1/4: Taylor coefficients 2^2n (2^2n - 1) B_2n / (2n)!
    coefficients = (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835, -1382 / 155925, 21844 / 6081075,
                    -929569 / 638512875, 6404582 / 10854718875, -443861162 / 1856156927625)  # fmt: skip
    count = 6 if element_of(x.type) == FLOAT else 10
    series = b.const(coefficients[count - 1], x.type)
    for c in coefficients[count - 2 :: -1]:
        series = b.fma(series, x2, b.const(c, x.type))
    signed = b.call(x.type, f"llvm.copysign.{mangle(x.type)}", large, x)
    return b.select(b.compare("lt", magnitude, 0.25), series * x, signed)
