"""One call on one backend from numpy arrays, forward and backward: for tests that need no poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from anyflash.contract.backends import where
from anyflash.contract.device import Elsewhere, spans
from anyflash.contract.poison import numpy_dtype
from anyflash.core.dtypes import accumulate, kind
from anyflash.core.view import View
from anyflash.dispatch.plan import run_backward, run_forward
from anyflash.semantics.describe import describe, describe_program
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem


@dataclass(slots=True)
class Outcome:
    """Arrays of one call. `tables` are gradients in slot order; gradients are None without `dout`."""

    problem: Problem
    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray | None = None
    dk: np.ndarray | None = None
    dv: np.ndarray | None = None
    tables: Sequence[np.ndarray | None] = ()
    dsinks: np.ndarray | None = None


def view_of(array: np.ndarray, writable: bool = False) -> View:
    """A look at a numpy array."""
    return View(
        array.ctypes.data, array.shape, array.strides, array.dtype.name, writable=writable, owner=array
    )


def prepare(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    layout: str = "bshd",
    cu_seqlens_q: np.ndarray | None = None,
    cu_seqlens_k: np.ndarray | None = None,
    seqused_k: np.ndarray | None = None,
    sinks: np.ndarray | None = None,
    seed: int = 0,
    **keywords: Any,
) -> tuple[Problem, Operands]:
    """The problem and operands of a call with the keywords of `anyflash.attention`."""
    if cu_seqlens_q is not None:
        layout = "thd"
    made = describe_program(
        q.shape,
        k.shape,
        lambda _, array: array.dtype.name,
        layout=layout,
        sequences=None if cu_seqlens_q is None else len(cu_seqlens_q) - 1,
        sinks=sinks,
        **keywords,
    )
    look = lambda array: None if array is None else view_of(array)
    return describe(
        made.program,
        view_of(q),
        view_of(k),
        view_of(v),
        layout=layout,
        tables=tuple(view_of(table) for table in made.tables),
        names=made.names,
        needs_grad=tuple(kind(table.dtype.name) == "float" for table in made.tables),
        sinks=look(sinks),
        cu_seqlens_q=look(cu_seqlens_q),
        cu_seqlens_k=look(cu_seqlens_k),
        seqused_k=look(seqused_k),
        seed=seed,
    )


def attend(
    backend: str,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    *,
    dout: np.ndarray | None = None,
    dlse: np.ndarray | None = None,
    **call: Any,
) -> Outcome:
    """Run a call in canonical axes forward, and backward if `dout` is given; `call` is as for `prepare`."""
    problem, operands = prepare(q, k, v, **call)
    return execute(backend, problem, operands, dout, dlse)


def execute(
    backend: str,
    problem: Problem,
    operands: Operands,
    dout: np.ndarray | None = None,
    dlse: np.ndarray | None = None,
) -> Outcome:
    """Run a prepared call."""
    own, statistic = numpy_dtype(problem.dtype_out), numpy_dtype(accumulate(problem.dtype))
    out, lse = np.empty(problem.out_shape, own), np.empty(problem.lse_shape, statistic)
    stats = np.empty((2, *problem.lse_shape), statistic)
    results = Results(view_of(out, True), view_of(lse, True), view_of(stats, True))
    with _at(backend, operands, results) as send:
        run_forward(problem, send(operands), send(results), backend)
    if dout is None:
        return Outcome(problem, out, lse)
    dq, dk, dv = (np.empty(s, own) for s in (problem.q_shape, problem.k_shape, problem.v_shape))
    tables = tuple(np.empty(t.shape, statistic) if t.needs_grad else None for t in problem.tables)
    dsinks = np.empty(problem.heads_q, statistic) if problem.program.sinks else None
    grads = Gradients(
        view_of(dq, True),
        view_of(dk, True),
        view_of(dv, True),
        tuple(None if t is None else view_of(t, True) for t in tables),
        None if dsinks is None else view_of(dsinks, True),
    )
    saved = Saved(view_of(out), view_of(stats), view_of(dout), None if dlse is None else view_of(dlse))
    with _at(backend, operands, saved, grads) as send:
        run_backward(problem, send(operands), send(saved), send(grads), backend)
    return Outcome(problem, out, lse, dq, dk, dv, tables, dsinks)


@contextmanager
def _at(backend: str, *bundles: Any) -> Iterator[Callable[[Any], Any]]:
    """Where the backend works: a function that moves views there, and the memory as it is afterwards."""
    device = where(backend)
    if device.kind == "cpu":
        yield lambda bundle: bundle
        return
    copies = Elsewhere(device, spans(*bundles))
    yield copies.send
    copies.take_back()
