"""A result depends on its own sequence only: not on the batch around it, the threads, or an earlier call."""

from __future__ import annotations

import threading
from itertools import pairwise

import numpy as np
import pytest

from anyflash.contract.direct import attend
from anyflash.core.dtypes import FLOATS
from anyflash.core.errors import AnyflashError
from anyflash.semantics.lse import merge
from contract.calls import BITWISE, PROGRAMS, assert_same_bits, operands, results, run

THREADS = (1, 2, 3, 16)
ROWS = ("q", "k", "v", "dout", "dlse")
each_backend = pytest.mark.parametrize("backend", BITWISE)
each_program = pytest.mark.parametrize("program", PROGRAMS)
each_dtype = pytest.mark.parametrize("dtype", FLOATS)


def of_batch(found, part):
    """The results of some batch entries; sums over the batch are left out."""
    return {name: array[part] for name, array in found.items() if not name.startswith(("table", "dsinks"))}


@each_backend
@each_program
@each_dtype
def test_alone_as_in_a_batch(backend, program, dtype):
    arrays = operands(dtype, (5, 70), (5, 130))
    together = run(backend, arrays, **PROGRAMS[program])
    for part in (slice(0, 1), slice(2, 3), slice(3, 5)):
        alone = run(backend, {name: arrays[name][part] for name in ROWS}, **PROGRAMS[program])
        assert_same_bits(of_batch(alone, slice(None)), of_batch(together, part), part)


@each_backend
@each_program
def test_packed_as_dense(backend, program):
    """Sequences of different lengths in one packed call, each as in a call of its own."""
    check_packed_as_dense(backend, program, (40, 20, 0, 130, 77), (40, 90, 5, 200, 0))


@each_backend
@each_program
def test_packed_as_dense_with_few_queries(backend, program):
    """Steps of decoding beside chunks of prompts."""
    check_packed_as_dense(backend, program, (40, 1, 3, 8, 2), (40, 90, 100, 1500, 2))


def check_packed_as_dense(backend, program, lens_q, lens_k):
    arrays = operands("float32", (sum(lens_q),), (sum(lens_k),))
    starts_q, starts_k = (np.cumsum((0, *lens)).astype(np.int32) for lens in (lens_q, lens_k))
    lengths = {"cu_seqlens_q": starts_q, "cu_seqlens_k": starts_k}
    packed = run(backend, arrays, **lengths, **PROGRAMS[program])
    for i in range(len(lens_q)):
        part_q, part_k = slice(*starts_q[i : i + 2]), slice(*starts_k[i : i + 2])
        parts = {"q": part_q, "k": part_k, "v": part_k, "dout": part_q}
        own = {name: arrays[name][None, part] for name, part in parts.items()}
        alone = run(backend, {**own, "dlse": arrays["dlse"][None, :, part_q]}, **PROGRAMS[program])
        expected = {
            name: packed[name][part][None]
            for name, part in (("out", part_q), ("dq", part_q), ("dk", part_k), ("dv", part_k))
        }
        expected["lse"] = packed["lse"][None, :, part_q]
        assert_same_bits(
            of_batch(alone, slice(None)), {name: expected[name] for name in of_batch(alone, 0)}, i
        )


@each_backend
@each_program
def test_last_queries_alone(backend, program):
    """A chunk of the last queries sees the same keys at the same positions. (Very few queries are decoded by
    a kernel of their own, whose sums have another order.)"""
    arrays = operands("float32", (2, 150), (2, 150))
    whole = attend(backend, arrays["q"], arrays["k"], arrays["v"], **PROGRAMS[program])
    for rows in (17, 64, 149):
        last = attend(backend, arrays["q"][:, -rows:], arrays["k"], arrays["v"], **PROGRAMS[program])
        assert last.out.tobytes() == whole.out[:, -rows:].tobytes(), rows
        assert last.lse.tobytes() == np.ascontiguousarray(whole.lse[..., -rows:]).tobytes(), rows


@each_backend
@each_program
@each_dtype
def test_number_of_threads(backend, program, dtype, monkeypatch):
    arrays = operands(dtype, (2, 200), (2, 260))
    found = []
    for count in THREADS:
        monkeypatch.setenv("ANYFLASH_NUM_THREADS", str(count))
        sinks = np.linspace(-1, 2, 4).astype(np.float32)
        found.append(run(backend, arrays, sinks=sinks, dropout_p=0.2, seed=5, **PROGRAMS[program]))
    for count, other in zip(THREADS[1:], found[1:], strict=True):
        assert_same_bits(found[0], other, f"with {count} threads")


@each_backend
@pytest.mark.parametrize("program", ["causal", "slopes"])
def test_hundred_runs_beside_other_threads(backend, program, monkeypatch):
    """The same bits every time while other Python threads run other problems."""
    monkeypatch.setenv("ANYFLASH_NUM_THREADS", "4")
    stop, errors = threading.Event(), []

    def noise(seed):
        arrays = operands("float32", (1, 30 + seed), (1, 90), seed=seed)
        while not stop.is_set():
            try:
                run(backend, arrays, **PROGRAMS["window_softcap"])
            except AnyflashError as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=noise, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    try:
        arrays = operands("float32", (2, 100), (2, 140))
        first = run(backend, arrays, **PROGRAMS[program])
        for i in range(100):
            assert_same_bits(first, run(backend, arrays, **PROGRAMS[program]), f"in run {i}")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not errors


@each_backend
@pytest.mark.parametrize("parts", range(1, 9))
def test_keys_in_parts_merge_to_the_whole(backend, parts):
    """Partial results over disjoint keys combine, parts without any key included; rounding aside."""
    arrays = operands("float32", (2, 33), (2, 100))
    q, k, v = (arrays[name] for name in "qkv")
    whole = results(attend(backend, q, k, v))
    edges = np.linspace(0, 100, parts + 1).astype(int)
    edges[len(edges) // 2] = edges[len(edges) // 2 - 1] if parts > 1 else edges[1]
    partial = [attend(backend, q, k[:, a:b], v[:, a:b]) for a, b in pairwise(edges)]
    out, lse = partial[0].out, partial[0].lse
    for other in partial[1:]:
        out, lse = merge(out, lse, other.out, other.lse)
    rounding = (parts + 2) * np.finfo(np.float32).eps
    assert np.abs(lse - whole["lse"]).max() <= rounding * np.abs(whole["lse"]).max()
    assert np.abs(out - whole["out"]).max() <= rounding * np.abs(v).max()
