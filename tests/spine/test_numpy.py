"""numpy arrays through the whole line, on the reference: layouts, strides, dtypes, seeds, results."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import anyflash as af
from anyflash.core.view import contiguous_strides
from anyflash.frontends import base
from anyflash.frontends.numpy_ import FRONTEND
from anyflash.semantics.arrays import as_numpy
from anyflash.semantics.describe import describe_program

Array = np.ndarray[Any, Any]
BATCH, HEADS_Q, HEADS_KV, ROWS, KEYS, DIM, DIM_V = 2, 4, 2, 5, 7, 8, 6
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


def random(*shape: int, dtype: Any = np.float32, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


Q, K = random(BATCH, ROWS, HEADS_Q, DIM), random(BATCH, KEYS, HEADS_KV, DIM)
V = random(BATCH, KEYS, HEADS_KV, DIM_V)


def run(*arrays: Array, **keywords: Any) -> Any:
    return af.attention(*arrays, backend="reference", **keywords)


def textbook(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
    """(out, lse) of plain attention in float64, written with einsum."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, HEADS_Q // HEADS_KV, axis=2) for x in (k, v))
    scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]))
    total = scores.sum(-1)
    return np.einsum("bhqk,bkhd->bqhd", scores / total[..., None], v), np.log(total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype: str) -> None:
    q, k, v = (x.astype(DTYPES[dtype]) for x in (Q, K, V))
    out, lse = run(q, k, v, return_lse=True)
    assert (out.dtype, out.shape, lse.shape) == (
        q.dtype,
        (BATCH, ROWS, HEADS_Q, DIM_V),
        (BATCH, HEADS_Q, ROWS),
    )
    assert lse.dtype == (np.float64 if dtype == "float64" else np.float32)
    expected_out, expected_lse = textbook(q, k, v)
    # Both sum in float64, in orders of their own; then the result is rounded to its dtype.
    sums = (DIM + KEYS) * np.finfo(np.float64).eps
    for found, expected in ((out, expected_out), (lse, expected_lse)):
        limit = sums + float(ml_dtypes.finfo(found.dtype).eps)
        assert np.abs(found.astype(np.float64) - expected).max() <= limit * np.abs(expected).max()


def reversed_memory(array: Array) -> Array:
    return array[::-1, :, ::-1].copy()[::-1, :, ::-1]


def gaps(array: Array) -> Array:
    wide = np.full([2 * n for n in array.shape], np.nan, array.dtype)
    wide[tuple(slice(None, None, 2) for _ in array.shape)] = array
    return wide[tuple(slice(None, None, 2) for _ in array.shape)]


def off_alignment(array: Array) -> Array:
    memory = np.zeros(array.nbytes + 3, np.uint8)
    moved = memory[3:].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


def read_only(array: Array) -> Array:
    array = array.copy()
    array.flags.writeable = False
    return array


class Subclass(np.ndarray):  # type: ignore[type-arg]
    pass


FORMS: dict[str, Callable[[Array], Array]] = {
    "fortran": np.asfortranarray,
    "transposed": lambda a: a.transpose(3, 1, 0, 2).copy().transpose(2, 1, 3, 0),
    "negative strides": reversed_memory,
    "gaps": gaps,
    "off alignment": off_alignment,
    "read-only": read_only,
    "subclass": lambda a: a.view(Subclass),
}


@pytest.mark.parametrize("form", FORMS)
def test_memory_forms(form: str) -> None:
    """The values decide, not where they lie: bit for bit."""
    arrays = [FORMS[form](x) for x in (Q, K, V)]
    for array, original in zip(arrays, (Q, K, V), strict=True):
        assert array.shape == original.shape
        assert (array == original).all()
    out = run(*arrays)
    assert type(out) is np.ndarray
    assert out.flags.c_contiguous
    assert (out == run(Q, K, V)).all()


def test_stretched_memory() -> None:
    q, k = np.broadcast_to(Q[:, :1], Q.shape), np.broadcast_to(K[:1], K.shape)
    assert (run(q, k, V) == run(q.copy(), k.copy(), V)).all()


def test_layouts_agree() -> None:
    out, lse = run(Q, K, V, causal=True, return_lse=True)
    swapped = [np.ascontiguousarray(x.swapaxes(1, 2)) for x in (Q, K, V)]
    out_bhsd, lse_bhsd = run(*swapped, layout="bhsd", causal=True, return_lse=True)
    assert out_bhsd.shape == (BATCH, HEADS_Q, ROWS, DIM_V)
    assert out_bhsd.flags.c_contiguous
    assert (out_bhsd.swapaxes(1, 2) == out).all()
    assert (lse_bhsd == lse).all()


@pytest.mark.parametrize("index", ["int32", "int64"])
def test_packed_is_each_sequence_alone(index: str) -> None:
    lengths_q, lengths_k = (3, 0, 4, 2), (5, 2, 0, 2)
    starts_q, starts_k = (np.cumsum([0, *lengths]).astype(index) for lengths in (lengths_q, lengths_k))
    q, k, v = random(9 + 2, 4, 8), random(9, 2, 8), random(9, 2, 6)
    out, lse = af.attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q=starts_q,
        cu_seqlens_k=starts_k,
        causal=True,
        return_lse=True,
        backend="reference",
    )
    assert (out.shape, lse.shape) == ((11, 4, 6), (4, 11))
    for i in range(4):
        rows, keys = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        alone, alone_lse = run(q[None, rows], k[None, keys], v[None, keys], causal=True, return_lse=True)
        assert (out[rows] == alone[0]).all()
        assert (lse[:, rows] == alone_lse[0]).all()
    assert (out[9:] == 0).all()
    assert (lse[:, 9:] == -np.inf).all()


def test_used_keys_are_the_first_ones() -> None:
    q, k = random(6, 2, 8), random(8, 2, 8)
    starts_q, starts_k = np.array([0, 2, 6], np.int32), np.array([0, 3, 8], np.int32)
    used = np.array([1, 4], np.int32)
    call = {"causal": True, "backend": "reference"}
    out = af.attention_varlen(q, k, k, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, seqused_k=used, **call)
    kept = np.concatenate([k[:1], k[3:7]])
    shorter = np.array([0, 1, 5], np.int32)
    assert (
        out == af.attention_varlen(q, kept, kept, cu_seqlens_q=starts_q, cu_seqlens_k=shorter, **call)
    ).all()


def test_lengths_are_read_at_every_call() -> None:
    """Equal arrays share what was read of them; changed ones do not."""
    q, starts = random(6, 2, 8), np.array([0, 2, 6], np.int32)
    call = {"cu_seqlens_q": starts, "cu_seqlens_k": starts, "backend": "reference"}
    first = af.attention_varlen(q, q, q, **call)
    starts[1] = 4
    second = af.attention_varlen(q, q, q, **call)
    assert (first != second).any()
    starts[1] = 2
    assert (af.attention_varlen(q, q, q, **call) == first).all()


EMPTY = {
    "no batch": ((0, 5, 4, 8), (0, 7, 2, 8)),
    "no rows": ((2, 0, 4, 8), (2, 7, 2, 8)),
    "no keys": ((2, 5, 4, 8), (2, 0, 2, 8)),
}


@pytest.mark.parametrize("case", EMPTY)
def test_empty(case: str) -> None:
    q, k = (np.zeros(shape, np.float32) for shape in EMPTY[case])
    out, lse = run(q, k, k, causal=True, return_lse=True, bias=np.zeros((1, 1, 1, k.shape[1]), np.float32))
    assert out.shape == q.shape
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_dropout_seed() -> None:
    dropped = run(Q, K, V, dropout_p=0.5, seed=3)
    assert (dropped == run(Q, K, V, dropout_p=0.5, seed=3)).all()
    assert (dropped != run(Q, K, V, dropout_p=0.5, seed=4)).any()
    assert (run(Q, K, V, dropout_p=0.0, seed=3) == run(Q, K, V)).all()
    drawn = [run(Q, K, V, dropout_p=0.5) for _ in range(3)]
    assert any((a != b).any() for a, b in pairwise(drawn))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_merge(dtype: str, layout: str) -> None:
    q, k, v = (x.astype(dtype) for x in (Q, K, V))
    if layout == "bhsd":
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    axis = 1 if layout == "bshd" else 2
    parts = [
        run(q, *(x.take(range(*span), axis) for x in (k, v)), layout=layout, return_lse=True)
        for span in ((0, 3), (3, KEYS))
    ]
    out, lse = af.merge(*parts[0], *parts[1], layout=layout)
    whole, whole_lse = run(q, k, v, layout=layout, return_lse=True)
    # Each part was rounded once, and the merge adds a rounding of each share and of the sum.
    limit = 4 * np.finfo(dtype).eps
    assert np.abs(out - whole).max() <= limit * np.abs(v).max()
    assert np.abs(lse - whole_lse).max() <= limit * np.abs(whole_lse).max()


def test_merge_packed() -> None:
    q, starts = random(6, 2, 8), np.array([0, 2, 6], np.int32)
    out, lse = af.attention_varlen(
        q, q, q, cu_seqlens_q=starts, cu_seqlens_k=starts, return_lse=True, backend="reference"
    )
    nothing = np.zeros_like(out), np.full_like(lse, -np.inf)
    merged, merged_lse = af.merge(out, lse, *nothing)
    assert (merged == out).all()
    assert (merged_lse == lse).all()


def test_backward_goes_down_the_line() -> None:
    """The gradient of sum(out) by the line's own backward, against differences of its forward."""
    q, k, v = (x.astype(np.float64) for x in (Q, K, V))
    bias = random(HEADS_Q, 1, KEYS, dtype=np.float64)
    swapped = [x.swapaxes(1, 2) for x in (q, k, v)]
    q_shape, k_shape = swapped[0].shape, swapped[1].shape
    made = describe_program(
        q_shape,
        k_shape,
        lambda _, a: FRONTEND.dtype(a),
        layout="bhsd",
        causal=True,
        bias=bias,
    )
    request = base.Request(
        made.program, *swapped, layout="bhsd", tables=made.tables, names=made.names, backend="reference"
    )
    found = base.forward(FRONTEND, request)
    grads = base.backward(
        FRONTEND, request, found.out, found.stats, np.ones_like(found.out), needs_grad=[True]
    )
    assert [g.shape for g in (grads.dq, grads.dk, grads.dv)] == [x.shape for x in swapped]
    step = float(np.finfo(np.float64).eps) ** (1 / 3)
    for array, grad in ((swapped[0], grads.dq), (swapped[1], grads.dk), (made.tables[0], grads.tables[0])):
        index = tuple(n // 2 for n in array.shape)
        kept = array[index]
        sides = []
        for sign in (1, -1):
            array[index] = kept + sign * step
            sides.append(base.forward(FRONTEND, request).out.sum())
        array[index] = kept
        # A central difference errs by step ** 2 times a third derivative, a few units here.
        assert abs((sides[0] - sides[1]) / (2 * step) - grad[index]) <= 100 * step**2


@pytest.mark.parametrize("dtype", DTYPES)
def test_views(dtype: str) -> None:
    """A view says where numpy's memory lies, whatever its form."""
    base_array = random(3, 4, 6).astype(DTYPES[dtype])
    for array in (base_array, base_array[1:, ::-2], base_array.T, base_array[:0], read_only(base_array)):
        view = FRONTEND.view(array)
        assert view.ptr == array.ctypes.data
        assert (view.shape, view.strides, view.dtype) == (array.shape, array.strides, dtype)
        assert view.writable == array.flags.writeable
        assert np.array_equal(as_numpy(view), array)
    made, view = FRONTEND.empty((2, 3), dtype, base_array)
    assert (made.dtype, view.strides) == (base_array.dtype, contiguous_strides((2, 3), base_array.itemsize))
    assert view.ptr == made.ctypes.data
