"""What makes Triton's interpreter compute what a GPU would: for tests, never for work.

As shipped (3.6 to 3.9) it multiplies the 16 bits of a bfloat16 as if they were an integer, cuts a float32
off where it should round it, and in 3.6 cannot loop up to a bound that is a one-element array under numpy
2.4. Here products are summed in float64, so that a product and its transpose agree as they do on a tensor
core, casts round to even, bounds are numbers. Every other operation on a bfloat16 is refused, since it
would be wrong in silence: kernels hold to that.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from anyflash.semantics.arrays import numpy_dtype

_done = False
# Where 8-bit floats end; what lies beyond becomes this on a device.
_GREATEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def mend() -> None:
    """Put the mended functions in the interpreter of this process. Twice is once."""
    global _done
    if _done:
        return
    _done = True
    import triton.language as tl
    import triton.runtime.interpreter as interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    own_cast, own_binary, own_unary = builder.cast_impl, builder.binary_op, builder.unary_op
    own_fp_to_fp = builder.create_fp_to_fp
    own_patch = interpreter._patch_lang_tensor

    def is_bfloat16(operand: Any) -> bool:
        return bool(operand.dtype.scalar == tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, acc: Any, input_precision: Any, imprecise: Any) -> Any:
        x, y = (widened(t.data) if is_bfloat16(t) else of_eight_bits(t) for t in (a, b))
        with np.errstate(all="ignore"):
            found = np.matmul(x.astype(np.float64), y.astype(np.float64)).astype(acc.data.dtype) + acc.data
        return handle(found.astype(acc.data.dtype), acc.dtype.scalar)

    def narrow_type(dtype: Any) -> Any:
        """numpy's type of an 8-bit float that anyflash stores, else None."""
        names = {tl.float8e4nv: "float8_e4m3fn", tl.float8e5: "float8_e5m2"}
        return numpy_dtype(names[dtype.scalar]) if dtype.scalar in names else None

    def of_eight_bits(operand: Any) -> Any:
        kind = narrow_type(operand.dtype)
        return operand.data if kind is None else operand.data.view(kind).astype(np.float32)

    def fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        before, after = narrow_type(source.dtype), narrow_type(target)
        if before is None and after is None:
            return own_fp_to_fp(self, source, target, rounding)
        if before is not None:
            source = handle(of_eight_bits(source), tl.float32)
        if after is None:
            return self.cast_impl(source, target)
        wide = source.data.astype(np.float32)
        top = np.float32(_GREATEST[after.name])
        held = np.where(np.isfinite(wide), np.clip(wide, -top, top), wide).astype(after)
        return handle(held.view(np.uint8), target.scalar)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == tl.bfloat16 and after == tl.float32:
            return handle(widened(source.data), tl.float32)
        if before == tl.float32 and after == tl.bfloat16:
            return handle(narrowed(source.data), tl.bfloat16)
        return own_cast(self, source, target)

    def binary_op(self: Any, a: Any, b: Any, operation: Any) -> Any:
        if is_bfloat16(a) or is_bfloat16(b):
            raise NotImplementedError(f"{operation} on bfloat16 in the interpreter: cast to float32 first")
        with np.errstate(all="ignore"):
            return own_binary(self, a, b, operation)

    def unary_op(self: Any, a: Any, operation: Any) -> Any:
        if is_bfloat16(a):
            raise NotImplementedError(f"{operation} on bfloat16 in the interpreter: cast to float32 first")
        with np.errstate(all="ignore"):
            return own_unary(self, a, operation)

    def patch_tensor(tensor: Any, *scope: Any) -> Any:
        result = own_patch(tensor, *scope)

        def as_index(self: Any) -> int:
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        # Newer versions undo their patches through a scope.
        if scope:
            scope[0].set_attr(tensor, "__index__", as_index)
        else:
            tensor.__index__ = as_index
        return result

    builder.create_dot, builder.cast_impl, builder.create_fp_to_fp = create_dot, cast_impl, fp_to_fp
    builder.binary_op, builder.unary_op = binary_op, unary_op
    interpreter._patch_lang_tensor = patch_tensor


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrowed(values: np.ndarray) -> np.ndarray:
    """float32 as bfloat16 bits, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16)).reshape(np.shape(values))
