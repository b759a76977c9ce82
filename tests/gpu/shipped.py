"""What is shipped, as calls: which launches each makes on each architecture, without a GPU.

A launch is caught where launch.py makes it, so its kernel, tiles and arguments are those of a real call. The
calls below make every kernel launch, with every row of schedule's tables, in each type that changes the code.

Run as a program it compiles launches on several processes and prints one JSON object: name -> figures.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import anyflash as af
from anyflash.contract import direct
from anyflash.contract.poison import numpy_dtype
from anyflash.core.errors import Unsupported
from anyflash.kernels.triton import launch, launch_backward, offline
from anyflash.kernels.triton.offline import Launch
from anyflash.semantics.operands import Gradients, Results, Saved

BATCH, LENGTH, HEADS = 4, 4096, 16
PARTS = ("forward", "backward_dkv", "backward_dq")
CAREFUL = tuple(f"{part} careful" for part in PARTS)
Keywords = dict[str, Any]
# The target on which a part of what is shipped still has every kernel and variant.
WHOLE = "sm_90"


@dataclass(frozen=True)
class Call:
    """dims: of q and k, and of v. `keywords` makes the call's, from nothing. `keep`: names of the launches
    that are looked at, where others of its launches are those of another call. `refused`: architectures with
    no room for its backward."""

    dims: tuple[int, int]
    keywords: Callable[[], Keywords] = field(default=lambda: {"causal": True})
    dtype: str = "bfloat16"
    packed: bool = False
    lengths: str = "int32"
    restated: bool = False
    float32: str = "ieee"
    keep: tuple[str, ...] | None = PARTS
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cached:
    """A call over a cache: `rows` queries of each sequence, `page` None for a dense cache; `appended`: they
    come with as many new keys, turned."""

    dims: tuple[int, int]
    rows: int
    group: int
    page: int | None = 16
    dtype: str = "bfloat16"
    appended: bool = False
    keep: tuple[str, ...] | None = None


def _everything() -> Keywords:
    return {
        "causal": True,
        "window": (256, None),
        "softcap": 30.0,
        "alibi_slopes": np.ones(HEADS, np.float32),
        "sinks": np.zeros(HEADS, np.float32),
        "dropout_p": 0.1,
        "seed": 5,
    }


def _bias(*shape: int) -> Callable[[], Keywords]:
    return lambda: {"bias": np.empty(shape, np.float32)}


def _relative() -> Keywords:
    places = np.zeros(2 * LENGTH, np.float32)
    return {"score": lambda s, at: s + af.table(places)[at.q - at.k + LENGTH]}


CALLS: dict[str, Call | Cached] = {
    "causal 64": Call((64, 64), keep=None),
    "causal 96": Call((96, 96)),
    "causal 128": Call((128, 128)),
    "causal 256": Call((256, 256)),
    "causal 576": Call((576, 576)),
    "plain 128": Call((128, 128), dict),
    "causal 192 of 128": Call((192, 128)),
    "everything 128": Call((128, 128), _everything, keep=None),
    "packed 128": Call((128, 128), packed=True, keep=("fill_rest", "zero", *PARTS)),
    "packed by int64 64": Call((64, 64), packed=True, lengths="int64"),
    "float32 64": Call((64, 64), dtype="float32"),
    "tf32 64": Call((64, 64), dtype="float32", float32="tf32"),
    "tf32 128": Call((128, 128), dtype="float32", float32="tf32"),
    "tf32 256": Call((256, 256), dtype="float32", float32="tf32"),
    "float32 576": Call((576, 576), dtype="float32", float32="tf32", refused=("sm_89", "sm_120")),
    "bias 64": Call((64, 64), _bias(1, HEADS, LENGTH, LENGTH), keep=("owned",)),
    "bias of keys 64": Call((64, 64), _bias(BATCH, 1, 1, LENGTH), keep=("owned", "add_splits")),
    "relative 64": Call((64, 64), _relative, keep=("scatter", "settle", "add_bounds")),
    "restated 64": Call((64, 64), restated=True, keep=("stats_of_lse",)),
    # Of attention over a cache itself test_compiled_decode.py has the budgets.
    "one row over pages 128": Cached((128, 128), 1, 8, appended=True, keep=("append",)),
}


def launches(name: str, arch: str) -> dict[str, Launch]:
    """The launches of a call, by names that tell them apart."""
    given = CALLS[name]
    found: dict[str, Launch] = {}
    for made in _launches(given, arch):
        if given.keep is not None and made.name not in given.keep:
            continue
        again = sum(key.split(" #")[0] == made.name for key in found)
        if again and made.name == "zero":
            continue
        found[f"{made.name} #{again + 1}" if again else made.name] = made
    return found


def _launches(given: Call | Cached, arch: str) -> Sequence[Launch]:
    with offline.recorded(arch) as found:
        if isinstance(given, Cached):
            _over_a_cache(given)
        else:
            kept = os.environ.get("ANYFLASH_FLOAT32")
            os.environ["ANYFLASH_FLOAT32"] = given.float32
            try:
                _dense_or_packed(given, arch)
            finally:
                os.environ["ANYFLASH_FLOAT32"] = kept or ""
    return found


def _over_a_cache(given: Cached) -> None:
    dtype, heads = numpy_dtype(given.dtype), HEADS // given.group
    page = given.page or LENGTH
    pages = LENGTH // page
    k, v = (np.empty((BATCH * pages, page, heads, dim), dtype) for dim in given.dims)
    q = np.empty((BATCH, given.rows, HEADS, given.dims[0]), dtype)
    table = None if given.page is None else np.arange(BATCH * pages, dtype=np.int32).reshape(BATCH, pages)
    cache = af.KVCache(k, v, np.full(BATCH, LENGTH // 2, np.int32), table)
    new: tuple[Any, ...] = ()
    keywords: Keywords = {}
    if given.appended:
        new = tuple(np.empty((BATCH, given.rows, heads, dim), dtype) for dim in given.dims)
        angles = np.empty((LENGTH, given.dims[0] // 2), np.float32)
        keywords = {"rotary": (angles, angles)}
    af.attention_kvcache(q, cache, *new, causal=True, backend="triton", **keywords)


def _dense_or_packed(given: Call, arch: str) -> None:
    dtype, view = numpy_dtype(given.dtype), direct.view_of
    lead = (BATCH * LENGTH,) if given.packed else (BATCH, LENGTH)
    dim, dim_v = given.dims
    q, k, v, dout = (np.empty((*lead, HEADS, width), dtype) for width in (dim, dim, dim_v, dim_v))
    keywords = given.keywords()
    if given.packed:
        ends = np.arange(BATCH + 1, dtype=given.lengths) * (LENGTH - 7)
        keywords |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "seqused_k": np.diff(ends) - 5}
    problem, operands = direct.prepare(q, k, v, **keywords)
    out, dq, dk, dv = (np.empty(x.shape, dtype) for x in (dout, q, k, v))
    lse, stats = np.empty(problem.lse_shape, np.float32), np.empty((2, *problem.lse_shape), np.float32)
    tables = [view(np.empty(t.shape, np.float32), True) if t.needs_grad else None for t in problem.tables]
    sinks = view(np.empty(HEADS, np.float32), True) if problem.program.sinks else None
    launch.forward(problem, operands, Results(view(out, True), view(lse, True), view(stats, True)))
    if given.restated:
        launch_backward.restate(problem, view(lse), view(stats, True))
    with pytest.raises(Unsupported, match="shared memory") if arch in given.refused else nullcontext():
        launch_backward.backward(
            problem,
            operands,
            Saved(view(out), view(stats), view(dout), view(lse)),
            Gradients(view(dq, True), view(dk, True), view(dv, True), tuple(tables), sinks),
        )


def names(targets: Sequence[str], everything: bool) -> list[str]:
    """What is compiled: all of it, or a part: the main kernels in every configuration on every target, and
    everything else on one."""
    found, seen = [], set[Any]()
    for arch in targets:
        for call, given in CALLS.items():
            for name, made in launches(call, arch).items():
                news = _news(arch, given, made) - seen
                if everything or news:
                    seen |= news
                    found.append(f"{arch} {call}: {name}")
    return found


def _news(arch: str, given: Call | Cached, made: Launch) -> set[Any]:
    """What a launch shows that another need not show again."""
    constants = made.constants
    tiles = tuple(constants.get(name) for name in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
    news: set[Any] = set()
    if made.name in PARTS and given.dtype == "bfloat16":
        news.add((arch, made.name, tiles))
    if arch == WHOLE:
        changing = ("DROPOUT", "PACKED", "SINKS", "DLSE", "ADD", "BY_ROW", "BY_K", "PRECISION")
        variant = tuple(constants.get(name) for name in changing)
        lengths = given.lengths if isinstance(given, Call) else None
        news.add((made.name, tiles, variant, lengths, bool(constants.get("REST"))))
    return news


@cache
def _kept(call: str, arch: str) -> dict[str, Launch]:
    return launches(call, arch)


def compile_one(name: str) -> dict[str, int]:
    place, kernel = name.split(": ")
    arch, call = place.split(" ", 1)
    made = _kept(call, arch)[kernel]
    return offline.compiled(made.kernel, arch, *made.arguments, **made.constants).as_dict()


def all_of(wanted: Sequence[str], processes: int = 2) -> dict[str, dict[str, int]]:
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return dict(zip(wanted, pool.map(compile_one, wanted), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="+", help="architectures")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--within", type=Path, help="a JSON file of names: those alone")
    parser.add_argument("--names", action="store_true", help="print the names alone")
    given = parser.parse_args()
    wanted = [name for name in names(given.targets, given.all) if given.only in name]
    if given.within:
        chosen = json.loads(given.within.read_text())
        wanted = [name for name in wanted if name in chosen]
    json.dump(wanted if given.names else all_of(wanted), sys.stdout, indent=1)


if __name__ == "__main__":
    main()
