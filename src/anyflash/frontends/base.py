"""What a frontend is, and the straight line through one for arrays that have memory.

A frontend knows how one framework spells arrays and nothing about kernels. `forward` and `backward` here take
a `Request` from views to written results; a frontend that differentiates (torch) calls them inside its own
operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from anyflash.core.dtypes import accumulate
from anyflash.core.view import View
from anyflash.dispatch import plan
from anyflash.semantics.addressing import to_canonical
from anyflash.semantics.describe import describe
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem

if TYPE_CHECKING:
    from anyflash.frontends.cache import CacheRequest


@dataclass(slots=True)
class Request:
    """One call after its keywords became a program: arrays of one framework in the user's layout.

    `program` is a Program's text. `tables` are in slot order and `names` says which argument each came from.
    `seed` None asks the frontend to draw one where the program has `dropout`.
    """

    program: str
    q: Any
    k: Any
    v: Any
    layout: str = "bshd"
    tables: Sequence[Any] = ()
    names: Sequence[str] = ()
    sinks: Any = None
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    seqused_k: Any = None
    dropout: bool = False
    seed: int | None = None
    backend: str | None = None


class Frontend(Protocol):
    """One framework. A module-level `FRONTEND` in each file of this folder is one instance; the file is named
    after the framework's module with an underscore behind it, and is imported only once that module is."""

    name: str

    def owns(self, kind: type) -> bool:
        """Are objects of this type arrays of the framework?"""
        ...

    def dtype(self, array: Any) -> str:
        """The element type's name; works on traced arrays. Raises InvalidCall for one that anyflash lacks."""
        ...

    def view(self, array: Any) -> View:
        """Where the array lies. `ptr` is None while the framework traces."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: str, like: Any) -> tuple[Any, View]:
        """A new row-major array on the device of `like`, and its view."""
        ...

    def integers(self, values: NDArray[np.int32], like: Any) -> Any:
        """A new array of these values on the device of `like`, which the host does not wait for."""
        ...

    def attend(self, request: Request) -> tuple[Any, Any]:
        """(out, lse) of the request, differentiable where the framework differentiates."""
        ...

    def attend_cache(self, request: CacheRequest) -> tuple[Any, Any]:
        """(out, lse) over a KV cache, to which what is new is appended first."""
        ...

    def merge(self, out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, layout: str) -> tuple[Any, Any]:
        """Combine two partial results over disjoint keys."""
        ...


class Forward(NamedTuple):
    """Arrays of a finished forward; `stats` is what a backward of the same request needs beside `out`."""

    out: Any
    lse: Any
    stats: Any


class Backward(NamedTuple):
    """Arrays of a finished backward; `tables[i]` is None where no gradient was asked for."""

    dq: Any
    dk: Any
    dv: Any
    tables: tuple[Any, ...]
    dsinks: Any


def describe_request(
    frontend: Frontend, request: Request, needs_grad: Sequence[bool] = ()
) -> tuple[Problem, Operands]:
    """View every array of the request and describe it. `needs_grad` is per table."""
    view = frontend.view
    sinks, cu_q, cu_k, used = request.sinks, request.cu_seqlens_q, request.cu_seqlens_k, request.seqused_k
    return describe(
        request.program,
        view(request.q),
        view(request.k),
        view(request.v),
        layout=request.layout,
        tables=tuple([view(table) for table in request.tables]) if request.tables else (),
        names=request.names,
        needs_grad=needs_grad,
        sinks=None if sinks is None else view(sinks),
        cu_seqlens_q=None if cu_q is None else view(cu_q),
        cu_seqlens_k=None if cu_k is None else view(cu_k),
        seqused_k=None if used is None else view(used),
        seed=request.seed or 0,
    )


def forward(frontend: Frontend, request: Request) -> Forward:
    """Describe, plan and run the request; a request without a seed uses 0."""
    problem, operands = describe_request(frontend, request)
    made = plan.plan(problem, operands.q.device, request.backend)
    return execute(frontend, made, operands, request.layout, request.q)


def execute(frontend: Frontend, made: plan.Plan, operands: Operands, layout: str, like: Any) -> Forward:
    """Run a plan into new arrays in `layout`."""
    problem = made.problem
    statistic = accumulate(problem.dtype)
    out, out_view = frontend.empty(to_canonical(layout, problem.out_shape), problem.dtype_out, like)
    lse, lse_view = frontend.empty(problem.lse_shape, statistic, like)
    stats, stats_view = frontend.empty((2, *problem.lse_shape), statistic, like)
    out_view = out_view if layout != "bhsd" else out_view.permute((0, 2, 1, 3))
    plan.execute_forward(made, operands, Results(out_view, lse_view, stats_view))
    return Forward(out, lse, stats)


def backward(
    frontend: Frontend,
    request: Request,
    out: Any,
    stats: Any,
    dout: Any,
    dlse: Any = None,
    needs_grad: Sequence[bool] = (),
) -> Backward:
    """Gradients of a request whose forward gave `out` and `stats`. dq, dk, dv have the user's layout;
    gradients of tables and sinks are in the accumulator's type. `needs_grad` is per table."""
    problem, operands = describe_request(frontend, request, needs_grad)
    chosen = plan.plan(problem, operands.q.device, request.backend)
    layout, like = request.layout, request.q
    statistic = accumulate(problem.dtype)

    def rows(view: View) -> View:
        return view.permute((0, 2, 1, 3)) if layout == "bhsd" else view

    dq, dq_view = frontend.empty(to_canonical(layout, problem.q_shape), problem.dtype, like)
    dk, dk_view = frontend.empty(to_canonical(layout, problem.k_shape), problem.dtype, like)
    dv, dv_view = frontend.empty(to_canonical(layout, problem.v_shape), problem.dtype, like)
    tables = [
        frontend.empty(spec.shape, statistic, like) if spec.needs_grad else (None, None)
        for spec in problem.tables
    ]
    dsinks, dsinks_view = (
        frontend.empty((problem.heads_q,), statistic, like) if problem.program.sinks else (None, None)
    )
    saved = Saved(
        rows(frontend.view(out)),
        frontend.view(stats),
        rows(frontend.view(dout)),
        None if dlse is None else frontend.view(dlse),
    )
    grads = Gradients(
        rows(dq_view), rows(dk_view), rows(dv_view), tuple([view for _, view in tables]), dsinks_view
    )
    plan.execute_backward(chosen, operands, saved, grads)
    return Backward(dq, dk, dv, tuple([array for array, _ in tables]), dsinks)
