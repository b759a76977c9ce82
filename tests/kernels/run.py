"""Runs a case on one instruction set, in any memory layout, on any number of threads, and judges what comes
out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import pytest

from anyflash.backends import cpu
from anyflash.backends.cpu import Config, CpuBackend
from anyflash.core.dtypes import accumulate
from anyflash.core.view import View
from anyflash.frontends.numpy_ import FRONTEND
from anyflash.kernels.llvm import schedule, target
from anyflash.semantics import reference
from anyflash.semantics.arrays import numpy_dtype
from anyflash.semantics.operands import Gradients, Results, Saved
from kernels import plain
from kernels.cases import Array, Case, draw
from kernels.memory import Block, place

# A result may err by this times what plain attention in the same arithmetic errs, in the worst of its orders.
FACTOR = 3.0
ORDERS = 3
TARGETS = tuple(
    name for name in ("avx2", "avx512", "avx512bf16", "amx-emulated", "neon") if target.why_not(name) is None
)
_BACKEND = CpuBackend()


def targets_for(dtype: str) -> tuple[str, ...]:
    """Targets whose code for this dtype differs."""
    seen: dict[tuple[int, str], str] = {}
    for name in TARGETS:
        found = target.get_target(name)
        seen.setdefault((found.vector_bytes, schedule.dot(found, dtype)), name)
    return tuple(seen.values())


COMBINATIONS = tuple(
    (dtype, name)
    for dtype, names in (
        ("float32", ("avx512", "neon")), ("bfloat16", ("avx512bf16",)), ("bfloat16", ("amx-emulated",)),
        ("float32", ("avx2",)), ("float64", ("avx512", "neon")), ("float16", ("avx2", "neon")),
        ("float64", ("avx2",)), ("bfloat16", ("avx2", "neon")), ("float16", ("avx512",)),
    )
    for name in names
    if name in TARGETS
)  # fmt: skip
"""(dtype, target) whose code differs in kind, on this machine."""


def in_pairs(case: Case, target_name: str) -> bool:
    """Whether the products of the longest sequence take pairs of bfloat16."""
    problem = draw(case).problem
    if problem.group * problem.seqlen_q <= schedule.decode_rows(problem):
        return False
    return schedule.dot(target.get_target(target_name), case.dtype) != "number"


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Have calls use `count` threads, however small they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYFLASH_NUM_THREADS", str(count))
        patch.setattr(cpu, "_ALONE", 0)
        yield


def run(
    case: Case,
    target_name: str,
    *,
    layout: str = "plain",
    threads: int = 1,
    backward: bool = True,
    backend: CpuBackend = _BACKEND,
) -> dict[str, Array]:
    """Results by name: out, lse, stats, dq, dk, dv, table0 .., dsinks. No byte beside a result may change."""
    given = draw(case)
    problem = given.problem
    config = Config(target_name, schedule.decode_rows(problem))
    kind, statistic = numpy_dtype(problem.dtype), numpy_dtype(accumulate(problem.dtype))
    blocks: dict[str, Block] = {}

    def put(name: str, array: Array) -> View:
        if layout == "as given" and name in given.arrays:
            return FRONTEND.view(array)
        blocks[name] = place(array, "plain" if layout == "as given" else layout)
        return FRONTEND.view(blocks[name].array)

    def fresh(name: str, shape: tuple[int, ...], dtype: np.dtype) -> View:
        return put(name, np.full(shape, np.nan, dtype))

    operands = given.operands(put)
    results = Results(
        fresh("out", problem.out_shape, kind),
        fresh("lse", problem.lse_shape, statistic),
        fresh("stats", (2, *problem.lse_shape), statistic),
    )
    names = ["out", "lse", "stats"]
    with threads_set(threads):
        backend.forward(problem, config, operands, results)
        if backward:
            saved = Saved(
                results.out, results.stats, put("dout", given.arrays["dout"]),
                put("dlse", given.arrays["dlse"]) if case.dlse else None,
            )  # fmt: skip
            grads = Gradients(
                fresh("dq", problem.q_shape, kind),
                fresh("dk", problem.k_shape, kind),
                fresh("dv", problem.v_shape, kind),
                tuple(
                    fresh(f"table{i}", t.shape, statistic) if t.needs_grad else None
                    for i, t in enumerate(problem.tables)
                ),
                None if given.sinks is None else fresh("dsinks", (problem.heads_q,), statistic),
            )
            backend.backward(problem, config, operands, saved, grads)
            names += ["dq", "dk", "dv", "dsinks"] + [f"table{i}" for i in range(len(problem.tables))]
    for name, block in blocks.items():
        assert block.intact(), f"{case.name} on {target_name}: bytes beside {name} changed"
    return {name: blocks[name].array.copy() for name in names if name in blocks}


@lru_cache(maxsize=256)
def expected(case: Case, pairs: bool) -> tuple[Mapping[str, Array], tuple[Mapping[str, Array], ...]]:
    """The truth, and the results of plain attention in several orders.

    The truth is the reference's. Where the results are float64 too, its own rounding would count, so there it
    is the formula in a wider float, and the reference is one of the orders.
    """
    given = draw(case)
    forward = reference.forward(*given.reference_arguments)
    dlse = given.arrays["dlse"] if case.dlse else None
    backward = reference.backward(*given.reference_arguments, given.arrays["dout"], dlse)
    exact: dict[str, Array] = {
        "out": forward.out, "lse": forward.lse, "dq": backward.dq, "dk": backward.dk, "dv": backward.dv,
    }  # fmt: skip
    exact |= {f"table{i}": t for i, t in enumerate(backward.dtables) if t is not None}
    if backward.dsinks is not None:
        exact["dsinks"] = backward.dsinks
    plains = [plain.attention(given, seed, pairs) for seed in range(ORDERS)]
    if case.dtype == "float64":
        plains, exact = [*plains, exact], plain.attention(given, ORDERS, False, np.longdouble)
    return exact, tuple(plains)


def ratios(case: Case, target_name: str, got: Mapping[str, Array]) -> dict[str, float]:
    """The greatest error of each result over what it may be; infinite where NaN and infinities differ."""
    exact, plains = expected(case, in_pairs(case, target_name))
    return {
        name: ratio(got[name], truth, [p[name] for p in plains])
        for name, truth in exact.items()
        if name in got
    }


@np.errstate(all="ignore")
def ratio(got: Array, truth: Array, plains: list[Array]) -> float:
    if not truth.size:
        return 0.0
    wide = got.astype(truth.dtype)
    rounded = truth.astype(got.dtype).astype(truth.dtype)
    special = ~np.isfinite(rounded)
    same = np.where(np.isnan(rounded), np.isnan(wide), wide == rounded)
    if not same[special].all() or not np.isfinite(wide[~special]).all():
        return np.inf
    finite = np.where(special, 0, truth)
    work = plains[0].dtype
    slack = max(_error(p, finite, special) for p in plains)
    # What rounding to the type of the sums costs at the very least.
    slack = max(slack, float(np.spacing(np.abs(finite).max().astype(work))))
    allowed = FACTOR * slack + 0.5 * np.spacing(np.abs(finite).astype(got.dtype)).astype(truth.dtype)
    return float((np.where(special, 0, np.abs(wide - finite)) / allowed).max())


def _error(plain_result: Array, finite: Array, special: Array) -> float:
    error = np.abs(plain_result.astype(finite.dtype) - finite)
    return float(np.where(special | ~np.isfinite(error), 0, error).max())


def check(case: Case, target_name: str, **options) -> dict[str, Array]:
    """Run and judge; the results."""
    got = run(case, target_name, **options)
    found = ratios(case, target_name, got)
    wrong = {name: value for name, value in found.items() if not value <= 1}
    assert not wrong, f"{case.id} on {target_name} {options}: error over what is allowed: {wrong}"
    return got


def same_bits(a: Mapping[str, Array], b: Mapping[str, Array]) -> list[str]:
    """Names of results that differ in any bit."""
    return [name for name in a if a[name].tobytes() != b[name].tobytes()]


Check = Callable[..., dict[str, Array]]
