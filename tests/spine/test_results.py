"""Results and gradients that do not fit are refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from anyflash.core.device import Device
from anyflash.core.errors import InvalidCall
from anyflash.core.view import View
from anyflash.dispatch.plan import run_backward, run_forward
from anyflash.frontends.numpy_ import FRONTEND
from anyflash.semantics.describe import describe, describe_program
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem, Program

Array = np.ndarray[Any, Any]
Q = np.random.default_rng(0).standard_normal((2, 5, 4, 8)).astype(np.float32)
K = np.random.default_rng(1).standard_normal((2, 7, 2, 8)).astype(np.float32)
BIAS = np.random.default_rng(2).standard_normal((4, 1, 7)).astype(np.float32)
SINKS = np.zeros(4, np.float32)
view = FRONTEND.view


def question() -> tuple[Problem, Operands]:
    made = describe_program(Q.shape, K.shape, lambda _, array: FRONTEND.dtype(array), bias=BIAS, sinks=SINKS)
    tables = [view(table) for table in made.tables]
    return describe(
        made.program, view(Q), view(K), view(K), tables=tables, needs_grad=[True], sinks=view(SINKS)
    )


def nans(shape: tuple[int, ...], dtype: str = "float32") -> Array:
    return np.full(shape, np.nan, dtype)


def read_only(shape: tuple[int, ...]) -> Array:
    array = nans(shape)
    array.flags.writeable = False
    return array


def results(problem: Problem) -> dict[str, Array]:
    lse_shape = problem.lse_shape
    return {"out": nans(problem.out_shape), "lse": nans(lse_shape), "stats": nans((2, *lse_shape))}


def gradients(problem: Problem) -> dict[str, Array]:
    return {
        "dq": nans(problem.q_shape),
        "dk": nans(problem.k_shape),
        "dv": nans(problem.v_shape),
        "dtables[0]": nans(problem.tables[0].shape),
        "dsinks": nans((4,)),
    }


def as_gradients(arrays: dict[str, Array]) -> Gradients:
    dq, dk, dv, dtable, dsinks = map(view, arrays.values())
    return Gradients(dq, dk, dv, (dtable,), dsinks)


WRONG: dict[str, Callable[[Array], Array]] = {
    "read-only": lambda array: read_only(array.shape),
    "shape": lambda array: nans((*array.shape, 1)),
    "dtype": lambda array: nans(array.shape, "float64"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("argument", ["out", "lse", "stats"])
def test_forward_writes_nothing(argument: str, wrong: str) -> None:
    problem, operands = question()
    arrays = results(problem)
    arrays[argument] = WRONG[wrong](arrays[argument])
    with pytest.raises(InvalidCall, match=f"^{argument}: ") as caught:
        run_forward(problem, operands, Results(*map(view, arrays.values())), backend="reference")
    assert ("read-only" in str(caught.value)) == (wrong == "read-only")
    assert all(np.isnan(array).all() for array in arrays.values())


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "argument", ["dq", "dk", "dv", "dtables[0]", "dsinks", "out", "stats", "dout", "dlse"]
)
def test_backward_writes_nothing(argument: str, wrong: str) -> None:
    problem, operands = question()
    finished = results(problem)
    run_forward(problem, operands, Results(*map(view, finished.values())), backend="reference")
    saved = {
        "out": finished["out"],
        "stats": finished["stats"],
        "dout": np.ones(problem.out_shape, np.float32),
        "dlse": np.ones(problem.lse_shape, np.float32),
    }
    grads = gradients(problem)
    if argument in saved:
        if wrong == "read-only":
            saved[argument].flags.writeable = False
            run_backward(
                problem, operands, Saved(*map(view, saved.values())), as_gradients(grads), backend="reference"
            )
            assert not any(np.isnan(array).any() for array in grads.values())
            return
        saved[argument] = WRONG[wrong](saved[argument])
    else:
        grads[argument] = WRONG[wrong](grads[argument])
    with pytest.raises(InvalidCall) as caught:
        run_backward(
            problem, operands, Saved(*map(view, saved.values())), as_gradients(grads), backend="reference"
        )
    assert caught.value.argument == argument
    assert all(np.isnan(array).all() for array in grads.values())


def test_gradients_match_the_tables_that_want_one() -> None:
    problem, operands = question()
    saved = Saved(
        *map(view, (*[a for n, a in results(problem).items() if n != "lse"], nans(problem.out_shape)))
    )
    dq, dk, dv, dtable, dsinks = map(view, gradients(problem).values())
    for tables, sinks, argument in (
        ((), dsinks, "dtables"),
        ((None,), dsinks, "dtables[0]"),
        ((dtable,), None, "dsinks"),
    ):
        with pytest.raises(InvalidCall) as caught:
            run_backward(problem, operands, saved, Gradients(dq, dk, dv, tables, sinks), backend="reference")
        assert caught.value.argument == argument


def on_gpu(array: Array) -> View:
    made = view(array)
    made.device = Device("cuda", 0)
    return made


@pytest.mark.parametrize("argument", ["k", "v", "bias", "sinks"])
def test_mixed_devices(argument: str) -> None:
    made = describe_program(Q.shape, K.shape, lambda _, array: FRONTEND.dtype(array), bias=BIAS, sinks=SINKS)
    arrays = {"k": K, "v": K, "bias": made.tables[0], "sinks": SINKS}
    views = {name: on_gpu(array) if name == argument else view(array) for name, array in arrays.items()}
    with pytest.raises(InvalidCall, match=f"^{argument}: on device cuda:0; expected cpu, the device of q"):
        describe(
            made.program,
            view(Q),
            views["k"],
            views["v"],
            tables=[views["bias"]],
            names=made.names,
            sinks=views["sinks"],
        )


def test_mixed_device_of_lengths() -> None:
    packed, lengths = view(Q[0]), np.array([0, 5], np.int32)
    with pytest.raises(InvalidCall, match=r"^cu_seqlens_k: on device cuda:0"):
        describe(
            Program(),
            packed,
            packed,
            packed,
            layout="thd",
            cu_seqlens_q=view(lengths),
            cu_seqlens_k=on_gpu(lengths),
        )


def test_traced_arrays_need_no_memory() -> None:
    """Shapes and dtypes are enough to describe a dense call."""

    def traced(array: Array) -> View:
        return View(None, array.shape, array.strides, "float32")

    problem, operands = describe(Program(), traced(Q), traced(K), traced(K))
    assert problem == describe(Program(), view(Q), view(K), view(K))[0]
    assert operands.q.ptr is None


def test_program_travels_as_text() -> None:
    problem, _ = question()
    made = describe_program(Q.shape, K.shape, lambda _, array: FRONTEND.dtype(array), bias=BIAS, sinks=SINKS)
    tables = [view(table) for table in made.tables]
    again, _ = describe(
        str(made.program), view(Q), view(K), view(K), tables=tables, needs_grad=[True], sinks=view(SINKS)
    )
    assert again == problem


def test_repeated_call_is_looked_up() -> None:
    assert question()[0] is question()[0]
