"""8-bit floats: multiplied as they are where tensor cores take them, made float16 elsewhere.

    native    q and k as they lie; p . v with p in e4m3, times 2 ** 8, so that what exceeds 2 ** -14 has its
              three bits of fraction
    widened   bits read as uint8 and made float16, which holds every number of either format; p in float16

Whoever gets e4m3 has them native from sm_89 on. AMD's gfx942 multiplies other 8-bit formats (fnuz), so it
widens. A careful launch widens everywhere, because it puts numbers in place of some values, but rounds p as
the plain launch does: its results are to be the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import triton
import triton.language as tl

from anyflash.core.dtypes import FLOATS8, ITEMSIZE
from anyflash.core.view import View
from anyflash.kernels.triton.device import pointer
from anyflash.semantics.operands import Operands
from anyflash.semantics.problem import Problem

# p lies in [0, 1] and e4m3 ends at 448.
WEIGHT_UNIT = tl.constexpr(256.0)
# An 8-bit product takes at least so many terms at once.
LEAST_TERMS = 32
_FORMATS = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}


@triton.jit
def widened(bits, FORMAT: tl.constexpr):
    """float16 of 8-bit floats given as uint8; exact."""
    wide = bits.to(tl.uint16)
    if FORMAT == "e5m2":
        found = (wide << 8).to(tl.float16, bitcast=True)
    else:
        # Exponents start 8 below those of float16. All ones but the sign is the one NaN.
        magnitude = wide & 0x7F
        small = ((magnitude << 7) | ((wide & 0x80) << 8)).to(tl.float16, bitcast=True)
        found = tl.where(magnitude == 0x7F, float("nan"), small * 256.0).to(tl.float16)
    return found


@triton.jit
def beside(wide, rest, like, REST: tl.constexpr, FORMAT: tl.constexpr):
    """Both pieces of rows of a cache in the type of `like`, which holds every number of either format."""
    if FORMAT != "":
        wide = widened(wide, FORMAT)
        if like.dtype != tl.float16:
            wide = wide.to(tl.float32).to(like.dtype)
        if REST > 0:
            rest = widened(rest, FORMAT)
            if like.dtype != tl.float16:
                rest = rest.to(tl.float32).to(like.dtype)
        else:
            rest = wide
    return wide, rest


@triton.jit
def rounded(weights, FORMAT: tl.constexpr):
    """Weights times WEIGHT_UNIT in e4m3, as float16 where values are."""
    found = (weights * WEIGHT_UNIT).to(tl.float8e4nv)
    if FORMAT != "":
        found = found.to(tl.float16)
    return found


@dataclass(frozen=True, slots=True)
class Narrow:
    """How a call's 8-bit floats are read. `stored` is the dtype of pointers to them, None for their own;
    `format` what `widened` makes of them, "" for nothing; `weights` whether p is rounded to e4m3."""

    stored: str | None = None
    format: str = ""
    weights: bool = False

    def careful(self, dtype: str) -> Narrow:
        """Of the launch behind a plain one."""
        return replace(self, stored="uint8", format=_FORMATS[dtype]) if self.weights else self

    def constants(self) -> dict[str, object]:
        return {"FORMAT": self.format, "NARROW": self.weights}

    def pointers(self, operands: Operands) -> list[Any]:
        """Of q, k and v."""
        return [pointer(view, self.stored) for view in (operands.q, operands.k, operands.v)]

    def itemsize(self, problem: Problem) -> int:
        """Bytes of an element of q, k and v in shared memory."""
        return 2 if self.format else ITEMSIZE[problem.dtype]

    @property
    def least(self) -> int:
        """The smallest piece of a row."""
        return LEAST_TERMS if self.weights else 16


def format_of(dtype: str) -> str:
    """What `widened` makes of the elements of an array, "" for nothing."""
    return _FORMATS.get(dtype, "")


def bits(view: View) -> Any:
    """As `pointer`, 8-bit floats as uint8."""
    return pointer(view, "uint8" if view.dtype in FLOATS8 else None)


def multiplies(arch: str) -> bool:
    """Do the tensor cores of this architecture take e4m3 and e5m2?"""
    return arch == "interpreter" or (arch.startswith("sm_") and int(arch[3:]) >= 89)


def narrow_of(problem: Problem, arch: str) -> Narrow:
    """Of a dense or packed call."""
    if problem.dtype not in FLOATS8:
        return Narrow()
    if multiplies(arch):
        return Narrow(weights=True)
    return Narrow("uint8", _FORMATS[problem.dtype])
