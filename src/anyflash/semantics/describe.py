"""From the views of one call to its Problem and Operands; every user error is raised on this way.

`describe_program` (keywords.py) turns keyword arguments into a Program and needs shapes and dtypes only, so
that a framework can call it while tracing; `describe` takes the program and the views and is where values are
read, if they lie in host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anyflash.core.dtypes import FLOATS8, accumulate
from anyflash.core.errors import InvalidCall, Unsupported
from anyflash.core.view import View
from anyflash.semantics.addressing import Varlen, read_lengths
from anyflash.semantics.checks import check_layout, check_rank, problem_of
from anyflash.semantics.keywords import Described, describe_program
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem, Program

__all__ = [
    "Described",
    "check_backward",
    "check_devices",
    "check_forward",
    "describe",
    "describe_program",
    "named",
]

_MAX_KEPT = 4096
_problems: dict[tuple[Any, ...], Problem] = {}


def describe(
    program: Program | str,
    q: View,
    k: View,
    v: View,
    *,
    layout: str = "bshd",
    tables: Sequence[View] = (),
    names: Sequence[str] = (),
    needs_grad: Sequence[bool] = (),
    sinks: View | None = None,
    cu_seqlens_q: View | None = None,
    cu_seqlens_k: View | None = None,
    seqused_k: View | None = None,
    seed: int = 0,
) -> tuple[Problem, Operands]:
    """What is asked (hashable, without arrays) and the arrays of the question, in canonical axes.

    program       a Program or its text
    q, k, v       views in `layout`: "bshd", "bhsd", or "thd" with cu_seqlens
    tables        in slot order; `names` says which argument each came from, for messages
    needs_grad    per table: is its gradient wanted
    cu_seqlens_*  (sequences + 1,) int32 or int64, from 0, ascending. In host memory they are read and
                  checked here; on a device only their shapes are, and the Problem's lengths are bounds
    seqused_k     (sequences,) how many keys of each sequence exist
    seed          of dropout

    Raises InvalidCall; nothing has been computed or written by then.
    """
    lengths: Varlen | None = None
    if cu_seqlens_q is not None or cu_seqlens_k is not None or seqused_k is not None:
        check_layout(layout, True)
        check_rank("q", q.shape, layout)
        check_rank("k", k.shape, layout)
        check_devices(q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, seqused_k=seqused_k)
        lengths, cu_seqlens_q, cu_seqlens_k, seqused_k = read_lengths(
            cu_seqlens_q, cu_seqlens_k, seqused_k, q.shape[0], k.shape[0]
        )
    key = (
        program,
        layout,
        q.dtype,
        q.shape,
        k.dtype,
        k.shape,
        v.dtype,
        v.shape,
        lengths,
        seqused_k is not None,
        sinks and (sinks.dtype, sinks.shape),
        tables and tuple([(table.dtype, table.shape) for table in tables]),
        needs_grad and tuple(needs_grad),
    )
    problem = _problems.get(key)
    if problem is None:
        problem = _new_problem(program, layout, q, k, v, tables, names, needs_grad, sinks, lengths, seqused_k)
        if len(_problems) >= _MAX_KEPT:
            _problems.clear()
        _problems[key] = problem
    device = q.device
    if k.device is not device or v.device is not device or tables or sinks is not None:
        check_devices(q, k=k, v=v, sinks=sinks, **named(tables, names))
    if layout == "bhsd":
        q, k, v = q.permute((0, 2, 1, 3)), k.permute((0, 2, 1, 3)), v.permute((0, 2, 1, 3))
    return problem, Operands(q, k, v, tuple(tables), sinks, cu_seqlens_q, cu_seqlens_k, seqused_k, seed)


def _new_problem(
    program: Program | str,
    layout: str,
    q: View,
    k: View,
    v: View,
    tables: Sequence[View],
    names: Sequence[str],
    needs_grad: Sequence[bool],
    sinks: View | None,
    lengths: Varlen | None,
    seqused_k: View | None,
) -> Problem:
    if lengths is None:
        check_layout(layout, False)
    parsed = Program.parse(program) if isinstance(program, str) else program
    if parsed.sinks != (sinks is not None):
        raise InvalidCall(
            "sinks",
            "None" if sinks is None else f"shape {sinks.shape}",
            "an array" if parsed.sinks else "None",
            "The program says whether sinks join the denominator",
        )
    return problem_of(
        parsed, layout, q, k, v, tables, names, needs_grad, sinks, lengths, seqused_k is not None
    )


def named(tables: Sequence[View], names: Sequence[str]) -> dict[str, View]:
    """Each table under the argument that it came from."""
    return {names[i] if i < len(names) else f"table {i}": table for i, table in enumerate(tables)}


def check_devices(q: View, **others: View | None) -> None:
    """Raises InvalidCall, naming the argument, unless all lie where q does."""
    for argument, view in others.items():
        if view is not None and view.device != q.device:
            raise InvalidCall(
                argument,
                f"on device {view.device}",
                f"{q.device}, the device of q",
                "All arrays of a call lie on one device",
            )


def check_forward(problem: Problem, results: Results) -> None:
    """Raises InvalidCall unless `results` can be written with the forward of `problem`."""
    lse_shape = problem.lse_shape
    _check_output("out", results.out, problem.out_shape, problem.dtype_out)
    _check_output("lse", results.lse, lse_shape, accumulate(problem.dtype))
    _check_output("stats", results.stats, (2, *lse_shape), accumulate(problem.dtype))


def check_backward(problem: Problem, saved: Saved, grads: Gradients) -> None:
    """Raises InvalidCall unless `grads` can be written with the backward of `problem` from `saved`, and
    Unsupported for 8-bit floats."""
    if problem.dtype_kv in FLOATS8:
        raise Unsupported(
            f"the gradient of attention in {problem.dtype_kv}",
            {"all": ["8-bit floats have a forward only"]},
            "Train in a wider dtype, or call it under torch.no_grad",
        )
    lse_shape, statistic = problem.lse_shape, accumulate(problem.dtype)
    _check_array("out", saved.out, problem.out_shape, problem.dtype)
    _check_array("stats", saved.stats, (2, *lse_shape), statistic)
    _check_array("dout", saved.dout, problem.out_shape, problem.dtype)
    if saved.dlse is not None:
        _check_array("dlse", saved.dlse, lse_shape, statistic)
    _check_output("dq", grads.dq, problem.q_shape, problem.dtype)
    _check_output("dk", grads.dk, problem.k_shape, problem.dtype)
    _check_output("dv", grads.dv, problem.v_shape, problem.dtype)
    if len(grads.tables) != len(problem.tables):
        raise InvalidCall("dtables", f"{len(grads.tables)} given", f"{len(problem.tables)}, one a table")
    for i, (spec, grad) in enumerate(zip(problem.tables, grads.tables, strict=True)):
        if (grad is not None) != spec.needs_grad:
            raise InvalidCall(
                f"dtables[{i}]",
                "None" if grad is None else f"shape {grad.shape}",
                "an array" if grad is None else "None",
            )
        if grad is not None:
            _check_output(f"dtables[{i}]", grad, spec.shape, statistic)
    if (grads.dsinks is not None) != problem.program.sinks:
        raise InvalidCall(
            "dsinks", "None" if grads.dsinks is None else "an array", "one exactly if there are sinks"
        )
    if grads.dsinks is not None:
        _check_output("dsinks", grads.dsinks, (problem.heads_q,), statistic)


def _check_array(argument: str, view: View, shape: tuple[int, ...], dtype: str) -> None:
    if view.shape != shape or view.dtype != dtype:
        raise InvalidCall(argument, f"shape {view.shape} of {view.dtype}", f"shape {shape} of {dtype}")


def _check_output(argument: str, view: View, shape: tuple[int, ...], dtype: str) -> None:
    _check_array(argument, view, shape, dtype)
    if not view.writable:
        raise InvalidCall(argument, f"shape {view.shape}, read-only", "a writable array")
