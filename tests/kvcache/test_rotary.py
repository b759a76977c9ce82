"""Rotary embedding while appending, against the rotation written as complex numbers."""

from __future__ import annotations

import doctest

import ml_dtypes
import numpy as np
import pytest

import anyflash as af
from anyflash.contract.backends import present
from anyflash.core.errors import Unsupported
from anyflash.semantics import rotary as module

B, T, HQ, HK, D, S, POSITIONS = 3, 4, 4, 2, 12, 40, 64
LENS = np.array([0, 5, 30], np.int32)
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}
R = np.random.default_rng(0)
Q, K, V = (R.standard_normal((B, T, heads, D)) for heads in (HQ, HK, HK))
CACHE_K, CACHE_V = R.standard_normal((2, B, S, HK, D))


def tables(pairs, dtype=np.float64):
    angle = np.arange(POSITIONS)[:, None] / 100.0 ** (np.arange(pairs) / pairs)
    return np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)


def turned(x, positions, cos, sin, interleaved):
    """(batch, tokens, heads, dim) turned as complex numbers; positions (batch, tokens)."""
    n = cos.shape[1]
    wide = x.astype(np.complex128)
    phase = (cos.astype(float) + 1j * sin.astype(float))[positions][:, :, None]
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(n), slice(n, 2 * n))
    z = (wide[..., first] + 1j * wide[..., second]) * phase
    result = x.astype(np.float64)
    result[..., first], result[..., second] = z.real, z.imag
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pairs", [1, 4, 6])
def test_appended_keys_and_queries(pairs, interleaved, dtype):
    kind = DTYPES[dtype]
    cos, sin = tables(pairs, kind)
    q, k, v, cache_k, cache_v = (x.astype(kind) for x in (Q, K, V, CACHE_K, CACHE_V))
    cache = af.KVCache(cache_k.copy(), cache_v.copy(), LENS)
    out = af.attention_kvcache(
        q, cache, k, v, causal=True, rotary=(cos, sin), rotary_interleaved=interleaved, backend="reference"
    )
    positions = LENS[:, None] + np.arange(T)
    expected_k = turned(k, positions, cos, sin, interleaved)
    expected_q = turned(q, positions, cos, sin, interleaved).astype(kind)
    for b in range(B):
        stored = cache.k[b, LENS[b] : LENS[b] + T].astype(np.float64)
        # Three operations in the accumulator's type, and one rounding.
        work = np.finfo(np.float64 if dtype == "float64" else np.float32).eps
        limit = 3 * work + float(ml_dtypes.finfo(kind).eps)
        assert (np.abs(stored - expected_k[b]) <= limit * np.abs(expected_k[b]).max()).all()
        same = cache_k[b].copy()
        same[LENS[b] : LENS[b] + T] = cache.k[b, LENS[b] : LENS[b] + T]
        assert (cache.k[b] == same).all()
        assert (cache.v[b, LENS[b] : LENS[b] + T] == v[b]).all()
    plain = af.attention_kvcache(
        expected_q, af.KVCache(cache.k, cache.v, LENS + T), causal=True, backend="reference"
    )
    bound = 64 * float(ml_dtypes.finfo(kind).eps) * np.abs(plain.astype(float)).max()
    assert np.abs(out.astype(float) - plain.astype(float)).max() <= bound


def test_given_positions():
    """Of each new key; the queries have those of the last ones, or their own if nothing is appended."""
    cos, sin = tables(4)
    given = R.integers(0, POSITIONS, (B, T))
    cache = af.KVCache(CACHE_K.copy(), CACHE_V.copy(), LENS)
    out = af.attention_kvcache(
        Q[:, :2], cache, K, V, rotary=(cos, sin), rotary_positions=given, backend="reference"
    )
    keys = turned(K, given, cos, sin, False)
    queries = turned(Q[:, :2], given[:, T - 2 :], cos, sin, False)
    for b in range(B):
        assert np.allclose(cache.k[b, LENS[b] : LENS[b] + T], keys[b], rtol=1e-15, atol=1e-15)
        one = slice(b, b + 1)
        n = LENS[b] + T
        alone = af.attention(queries[one], cache.k[one, :n], cache.v[one, :n], backend="reference")
        assert np.allclose(out[one], alone, rtol=1e-13, atol=1e-13)
    again = af.attention_kvcache(
        Q[:, :2],
        af.KVCache(cache.k, cache.v, LENS + T),
        rotary=(cos, sin),
        rotary_positions=given[:, T - 2 :],
        backend="reference",
    )
    assert (again == out).all()


def test_given_positions_packed():
    cos, sin = tables(4)
    given = R.integers(0, POSITIONS, B * T).astype(np.int32)
    starts_q, starts_k = (np.array(n, np.int32) for n in ([0, 1, 5, 7], [0, 2, 8, 12]))
    cache = af.KVCache(CACHE_K.copy(), CACHE_V.copy(), LENS)
    q, k, v = (x.reshape(B * T, -1, D) for x in (Q, K, V))
    af.attention_kvcache(
        q[:7], cache, k, v, cu_seqlens_q=starts_q, cu_seqlens_k=starts_k, rotary=(cos, sin),
        rotary_positions=given, backend="reference",
    )  # fmt: skip
    keys = turned(k[None], given[None], cos, sin, False)[0]
    for b in range(B):
        rows = slice(starts_k[b], starts_k[b + 1])
        assert np.allclose(cache.k[b, LENS[b] :][: len(keys[rows])], keys[rows], rtol=1e-15, atol=1e-15)


def test_nothing_appended_turns_the_queries_alone():
    cos, sin = tables(4)
    cache = af.KVCache(CACHE_K.copy(), CACHE_V.copy(), np.full(B, S))
    out = af.attention_kvcache(Q, cache, rotary=(cos, sin), causal=True, backend="reference")
    queries = turned(Q, np.broadcast_to(np.arange(S - T, S), (B, T)), cos, sin, False)
    expected = af.attention(queries, CACHE_K, CACHE_V, causal=True, backend="reference")
    assert np.allclose(out, expected, rtol=1e-13, atol=1e-13)
    assert (cache.k == CACHE_K).all()


def test_packed_and_padded():
    """Positions are slots: left padding counts. Packed queries are turned as dense ones are, bit for bit."""
    cos, sin = tables(4)
    pad = np.array([0, 2, 30])
    dense = af.KVCache(CACHE_K.copy(), CACHE_V.copy(), LENS, leftpad=pad)
    packed = af.KVCache(CACHE_K.copy(), CACHE_V.copy(), LENS, leftpad=pad)
    starts = np.arange(B + 1, dtype=np.int32) * T
    call = {"causal": True, "rotary": (cos, sin), "backend": "reference"}
    out = af.attention_kvcache(Q, dense, K, V, **call)
    rows = [x.reshape(B * T, -1, D) for x in (Q, K, V)]
    again = af.attention_kvcache(rows[0], packed, *rows[1:], cu_seqlens_q=starts, **call)
    assert (out.reshape(again.shape) == again).all()
    assert (dense.k == packed.k).all()


@pytest.mark.parametrize("backend", present())
def test_backends_turn_alike(backend):
    """What is appended does not depend on the backend."""
    cos, sin = tables(6, np.float32)
    q, k, v = (x.astype(np.float32) for x in (Q, K, V))
    caches = []
    for name in ("reference", backend):
        cache = af.KVCache(CACHE_K.astype(np.float32), CACHE_V.astype(np.float32), LENS)
        try:
            af.attention_kvcache(q, cache, k, v, causal=True, rotary=(cos, sin), backend=name)
        except Unsupported as why:
            pytest.skip(str(why))
        caches.append(cache)
    assert (caches[0].k == caches[1].k).all()


def test_many_rows_are_turned_in_parts():
    cos, sin = tables(4)
    x = R.standard_normal((1500, 8, D))
    positions = R.integers(0, POSITIONS, 1500)
    parts = list(module.rotated(x, positions, cos, sin, False))
    assert len(parts) > 1
    whole = np.concatenate([part for _, part in parts])
    assert np.allclose(whole, turned(x[:, None], positions[:, None], cos, sin, False)[:, 0], rtol=1e-14)


def test_examples():
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
