"""Working memory: aligned, apart for each thread, counted, freed, poisoned."""

from __future__ import annotations

import ctypes
import itertools
import math
import struct
import threading
from collections.abc import Iterator

import pytest

from anyflash.core.errors import BackendBroken
from anyflash.kernels.llvm import pool, scratch


@pytest.fixture
def poisoned() -> Iterator[None]:
    scratch.poison(True)
    yield
    scratch.poison(False)


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("nbytes", [0, 1, 64, 100_000])
def test_pieces_are_aligned_and_apart(threads: int, nbytes: int) -> None:
    with pool.lease(threads) as team:
        pieces = sorted([*team.scratch(nbytes), team.shared(nbytes)])
        assert len(pieces) == team.size + 1 == threads + 1
        assert all(piece % scratch.ALIGNMENT == 0 for piece in pieces)
        assert all(b - a >= nbytes for a, b in itertools.pairwise(pieces))
        for piece in pieces:
            ctypes.memset(piece, 1, nbytes)


def test_bytes_are_counted_reused_and_freed() -> None:
    scratch.free_scratch()
    before = scratch.scratch_bytes()
    with pool.lease(2) as team:
        first = team.scratch(100_000)
        held = scratch.scratch_bytes()
        assert 200_000 <= held - before <= 220_000
        scratch.free_scratch()
        assert scratch.scratch_bytes() == held
    with pool.lease(2) as team:
        assert team.scratch(50_000) == first
    scratch.free_scratch()
    assert scratch.scratch_bytes() == before


def test_great_pieces_are_given_back_after_the_call() -> None:
    scratch.free_scratch()
    with pool.lease(1) as team:
        team.shared(scratch.KEEP_BYTES + 1)
        assert scratch.scratch_bytes() > scratch.KEEP_BYTES
    assert scratch.scratch_bytes() == 0


def test_memory_of_a_finished_thread_is_gone() -> None:
    scratch.free_scratch()
    before = scratch.scratch_bytes()

    def use() -> None:
        with pool.lease(1) as team:
            team.scratch(1 << 20)
        assert scratch.scratch_bytes() >= before + (1 << 20)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert scratch.scratch_bytes() == before


def test_a_nested_lease_has_memory_of_its_own() -> None:
    with pool.lease(1) as outer:
        (mine,) = outer.scratch(4096)
        shared = outer.shared(4096)
        with pool.lease(1) as inner:
            assert not {*inner.scratch(1 << 16), inner.shared(1 << 16)} & {mine, shared}
        ctypes.memset(mine, 0, 4096)
        assert outer.shared(4096) == shared


@pytest.mark.usefixtures("poisoned")
def test_poison_is_nan_in_every_type() -> None:
    with pool.lease(2) as team:
        for piece in (*team.scratch(1000), team.shared(1000)):
            content = ctypes.string_at(piece, 1000)
            for kind in "efd":
                assert all(math.isnan(x) for (x,) in struct.iter_unpack("<" + kind, content))
            ctypes.memset(piece, 0, 1000)
        for piece in team.scratch(1000):
            assert ctypes.string_at(piece, 1000) == b"\xff" * 1000


@pytest.mark.usefixtures("poisoned")
def test_writing_behind_the_end_is_noticed() -> None:
    with pytest.raises(BackendBroken, match="wrote behind the memory"), pool.lease(2) as team:
        ctypes.memset(team.scratch(1000)[1] + 1000, 0, 1)
    with pool.lease(2) as team:
        assert team.size == 2
