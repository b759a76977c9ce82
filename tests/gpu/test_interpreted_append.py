"""The kernel that writes into a KV cache and turns queries, under Triton's interpreter, against what the host
does: the same bits, from integers that the host does not read, and nothing written elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="needs triton: nox -s 'systems(triton39)'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1: nox -s 'systems(triton39)'", allow_module_level=True)

import numpy as np
import triton

from anyflash.contract.poison import CONTIGUOUS, Layout, Poisoned
from anyflash.core.view import View
from anyflash.kernels.triton.device import interpreted
from anyflash.kernels.triton.launch_append import append
from anyflash.semantics import addressing
from anyflash.semantics.arrays import as_numpy
from anyflash.semantics.cache import CacheCall, Integers, describe_cache, write
from anyflash.semantics.operands import Operands
from anyflash.semantics.problem import Program
from anyflash.semantics.rotary import Rotary

HEADS, KV_HEADS, DIM, DIM_V, POSITIONS = 4, 2, 12, 20, 70
LENS, PAD = (0, 5, 33, 17), (0, 2, 33, 1)


@dataclass(frozen=True)
class Form:
    """A call: `new` and `queries` a sequence, a number or one for each, which packs them; `pairs` 0 is no
    rotary; `page_size` None is a dense cache, `chosen` one with more entries than sequences."""

    id: str
    dtype: str = "float32"
    new: int | tuple[int, ...] | None = 2
    queries: int | tuple[int, ...] = 2
    page_size: int | None = 16
    pairs: int = 4
    interleaved: bool = False
    angles: str = "float32"
    leftpad: bool = False
    positions: bool = False
    chosen: bool = False
    lengths: bool = True
    layout: str = "bshd"
    index: str = "int32"
    memory: Layout = CONTIGUOUS


FORMS = (
    Form("decode", new=1, queries=1),
    Form("plain", pairs=0, leftpad=True),
    Form("bfloat16", "bfloat16", interleaved=True, angles="bfloat16", page_size=3, index="int64"),
    Form("float16", "float16", pairs=6, angles="float64", page_size=1, leftpad=True),
    Form("bfloat16 packed", "bfloat16", (3, 0, 1, 9), (1, 0, 1, 9), page_size=64, leftpad=True),
    Form("packed positions", new=(3, 0, 4, 9), queries=(1, 0, 4, 2), positions=True, index="int64"),
    Form("positions", new=3, queries=2, positions=True, interleaved=True, pairs=1),
    Form("positions of queries", new=None, queries=3, positions=True),
    Form("queries alone", new=None, queries=(0, 3, 4, 5), interleaved=True),
    Form("nothing but lengths", new=None, pairs=0, leftpad=True),
    Form("all slots", new=None, lengths=False, page_size=None),
    Form("dense", page_size=None, layout="bhsd", memory=Layout(gap=3, step=2)),
    Form("chosen", page_size=None, chosen=True, leftpad=True, index="int64"),
    Form("backwards", memory=Layout(reverse=(0, 1, 3)), page_size=3, leftpad=True),
)


def array(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: str, memory: Layout, output: bool
) -> Poisoned:
    made = Poisoned.of(rng.standard_normal(shape), dtype, memory)
    made.output = output
    made.view.writable = output
    return made


class Call:
    """The arrays of one form in poisoned memory."""

    def __init__(self, form: Form, **integers: Any) -> None:
        rng, batch = np.random.default_rng(3), len(LENS)
        self.form = form
        swap = lambda shape: (shape[0], shape[2], shape[1], shape[3]) if form.layout == "bhsd" else shape
        packed = isinstance(form.queries, tuple)
        self.layout = "thd" if packed else form.layout

        def rows(count: Any, heads: int, dim: int) -> tuple[int, ...]:
            return (sum(count) + 3, heads, dim) if packed else swap((batch, count, heads, dim))

        memory = form.memory.without_first_axis() if packed else form.memory
        self.q = array(rng, rows(form.queries, HEADS, DIM), form.dtype, memory, False)
        self.new = None
        if form.new is not None:
            dims = (DIM, DIM_V)
            self.new = [array(rng, rows(form.new, KV_HEADS, dim), form.dtype, memory, False) for dim in dims]
        size = form.page_size or 44
        columns = -(-44 // size) if form.page_size else 1
        pages = batch * columns + (3 if form.page_size or form.chosen else 0)
        self.cache = [
            array(rng, swap((pages, size, KV_HEADS, dim)), form.dtype, form.memory, True)
            for dim in (DIM, DIM_V)
        ]
        cumulate = lambda counts: np.cumsum([0, *counts]) if isinstance(counts, tuple) else None
        given = {
            "cu_seqlens_q": cumulate(form.queries),
            "cu_seqlens_k": cumulate(form.new),
            "seqlens": np.array(LENS) if form.lengths else None,
            "block_table": rng.permutation(pages)[: batch * columns].reshape(batch, -1)
            if form.page_size
            else None,
            "leftpad": np.array(PAD) if form.leftpad else None,
            "batch_idx": np.array([5, 0, 6, 2]) if form.chosen else None,
            "rotary_positions": self._positions(rng) if form.positions else None,
        } | integers
        self.integers = {
            name: None if values is None else Poisoned.of(values, form.index)
            for name, values in given.items()
        }
        self.rotary = None
        if form.pairs:
            angles = [array(rng, (POSITIONS, form.pairs), form.angles, Layout(), False) for _ in range(2)]
            # Position 0 does not turn.
            angles[0].array[0], angles[1].array[0] = 1, 0
            for made in angles:
                made.seal()
            self.rotary = Rotary(angles[0].view, angles[1].view, form.interleaved)

    def _positions(self, rng: np.random.Generator) -> np.ndarray[Any, Any]:
        of = self.q if self.new is None else self.new[0]
        return rng.integers(0, POSITIONS, of.array.shape[:-2])

    def describe(self) -> CacheCall:
        views = {name: None if made is None else made.view for name, made in self.integers.items()}
        return describe_cache(
            Program(), self.q.view, *(made.view for made in self.cache),
            *(() if self.new is None else (made.view for made in self.new)),
            integers=Integers(**views), layout=self.layout, rotary=self.rotary,
        )  # fmt: skip

    def turned(self, call: CacheCall) -> Poisoned | None:
        return None if self.rotary is None else Poisoned(call.problem.q_shape, self.form.dtype, output=True)

    def damages(self) -> list[str]:
        every = [self.q, *self.cache, *(self.new or ()), *(m for m in self.integers.values() if m)]
        return [damage for made in every if (damage := made.damage())]


def run(call: Call, doing: Any) -> tuple[CacheCall, Operands, Poisoned | None]:
    described = call.describe()
    turned = call.turned(described)
    return described, doing(described, None if turned is None else turned.view), turned


def kernel(call: CacheCall, turned: View | None) -> Operands:
    assert interpreted()
    return append(call.problem, call, turned)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.id)
def test_same_bits_as_the_host(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Call(form)
    _, wanted, host_turned = run(host, write)
    own = Call(form)
    monkeypatch.setattr(addressing, "readable", lambda view: False)
    described, found, turned = run(own, kernel)
    assert described.placement is None
    for mine, other in zip(own.cache, host.cache, strict=True):
        np.testing.assert_array_equal(bits(mine.array), bits(other.array))
    if turned is not None and host_turned is not None:
        np.testing.assert_array_equal(bits(turned.array), bits(host_turned.array))
        assert turned.damage() is None
        assert found.q is turned.view
    assert found.seqused_k is not None and wanted.seqused_k is not None
    np.testing.assert_array_equal(as_numpy(found.seqused_k), as_numpy(wanted.seqused_k))
    assert own.damages() == []
    assert described.problem.seqlen_k >= wanted.longest_k


@pytest.mark.parametrize("form", FORMS[:2], ids=lambda form: form.id)
def test_read_lengths_go_to_the_kernel_too(form: Form) -> None:
    host, own = Call(form), Call(form)
    run(host, write)
    described, found, _ = run(own, kernel)
    assert found.seqused_k is described.operands.seqused_k
    for mine, other in zip(own.cache, host.cache, strict=True):
        np.testing.assert_array_equal(bits(mine.array), bits(other.array))


FAR = 2**31 - 1
# A form, its integers, and how many slots are then written; None: two sequences may claim one slot.
WRONG: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "beyond the capacity": ("decode", {"seqlens": np.array([48, 10**6, FAR, 47])}, 1),
    "negative": (
        "plain",
        {"seqlens": np.array([-1, -(2**31), 3, 0]), "leftpad": np.array([-5, 9, FAR, -FAR])},
        8,
    ),
    "no such page": ("decode", {"block_table": np.full((4, 3), 14) + np.arange(4)[:, None] * 10**8}, 1),
    "pages below 0": ("bfloat16", {"block_table": np.full((4, 15), -(2**40))}, 0),
    "no such entry": ("chosen", {"batch_idx": np.array([7, -1, 2**50, -(2**50)])}, 0),
    "descending": (
        "bfloat16 packed",
        {"cu_seqlens_k": np.array([9, 3, FAR, -4, 2]), "cu_seqlens_q": np.array([FAR, -1, 5, 2, 40])},
        None,
    ),
    "positions": ("positions", {"rotary_positions": np.array([[-1, 70, FAR]] * 4)}, 12),
    "positions and lengths": (
        "packed positions",
        {"cu_seqlens_q": np.array([0, 7, 7, 7, 7]), "rotary_positions": np.full(19, -(2**60))},
        16,
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_integers_lead_nowhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addressing, "readable", lambda view: False)
    id_, integers, written = WRONG[name]
    call = Call(next(form for form in FORMS if form.id == id_), **integers)
    before = [bits(made.array).copy() for made in call.cache]
    _, found, turned = run(call, kernel)
    assert call.damages() == []
    for made in (*call.cache, *(() if turned is None else (turned,))):
        # What lies around an array is NaN: had it been read, it would be here.
        assert np.isfinite(made.array.astype(np.float32)).all()
    for made, old in zip(call.cache, before, strict=True):
        changed = (bits(made.array) != old).any((2, 3))
        assert written is None or changed.sum() == written
    if name == "positions and lengths" and turned is not None:
        # All are held at 0, where nothing turns; a number from beside the array would turn.
        np.testing.assert_array_equal(turned.array, call.q.array)
    assert found.seqused_k is not None
    counts = as_numpy(found.seqused_k)
    assert (counts >= 0).all()
    assert (counts <= found.longest_k).all()


@pytest.mark.skipif(triton.__version__ < "3.9", reason="slow, and the same with the newer Triton")
def test_no_access_outside() -> None:
    """Behind, or before, every array lies a page that cannot be touched."""
    paths = [str(Path(__file__).parents[1]), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "-m", "gpu.fenced_calls"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")
