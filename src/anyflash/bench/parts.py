"""Where the CPU kernel's time goes, by leaving out one part at a time.

Each variant is the real kernel, emitted with one part replaced by nothing: what it saves is what that part
costs beside the others. Parts overlap in the machine, so the savings need not add up to the whole. One
thread, processor time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np

from anyflash.backends import cpu
from anyflash.core.dtypes import accumulate
from anyflash.core.view import View
from anyflash.kernels.llvm import engine, launch, layout
from anyflash.kernels.llvm.form import Form, PairForm
from anyflash.kernels.llvm.frame import Frame
from anyflash.kernels.llvm.spec import Spec
from anyflash.kernels.llvm.target import Target
from anyflash.semantics.arrays import numpy_dtype
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem


@dataclass(frozen=True)
class Part:
    """`leave_out` yields while the emitter lacks the part."""

    name: str
    leave_out: Callable[[], Any]


def _no_product(which: int) -> Callable[[], Any]:
    """The `which`-th product that a kernel emits contracts nothing."""

    @contextmanager
    def leave_out() -> Iterator[None]:
        emitted, inside = itertools.count(), [False]

        def replace(whole: Callable[..., None]) -> Callable[..., None]:
            def product(
                self: Form, a: Any, y: Any, rows: Any, vectors: int, depth: Any, start: Any, finish: Any
            ) -> None:
                # One form's product may be written with another's: only the outer one is a product of the
                # kernel.
                if inside[0]:
                    return whole(self, a, y, rows, vectors, depth, start, finish)
                inside[0] = True
                whole(self, a, y, rows, vectors, 0 if next(emitted) == which else depth, start, finish)
                inside[0] = False
                return None

            return product

        with ExitStack() as stack:
            for form in (Form, PairForm):
                stack.enter_context(mock.patch.object(form, "product", replace(form.product)))
            yield

    return leave_out


@contextmanager
def _no_exponentials() -> Iterator[None]:
    with mock.patch.object(Frame, "exp", lambda self, x, log2_l=None: x):
        yield


@contextmanager
def _no_packing() -> Iterator[None]:
    nothing = lambda *args, **kwargs: None
    with mock.patch.object(layout, "pack_rows", nothing), mock.patch.object(layout, "transpose", nothing):
        yield


FORWARD = (
    Part("S = K Q", _no_product(0)),
    Part("O = V P", _no_product(1)),
    Part("exponentials", _no_exponentials),
    Part("packing and turning", _no_packing),
)
BACKWARD = (
    Part("S = K Q", _no_product(0)),
    Part("dP = V dO", _no_product(1)),
    Part("dV = P dO", _no_product(2)),
    Part("dK = dS Q", _no_product(3)),
    Part("dQ = K dS", _no_product(4)),
    Part("exponentials", _no_exponentials),
    Part("packing and turning", _no_packing),
)


def measure(problem: Problem, repeats: int = 5) -> dict[str, dict[str, float]]:
    """{"forward": {"whole": ns a score, part: ns that leaving it out saves, ...}, "backward": ...}.

    A score is one (query, key) pair of one head. The variants' results are meaningless and are thrown away.
    """
    case = _Case(problem)
    found: dict[str, dict[str, float]] = {}
    for direction, parts in (("forward", FORWARD), ("backward", BACKWARD)):
        runs = {"whole": case.prepared(direction, nullcontext)}
        runs |= {part.name: case.prepared(direction, part.leave_out) for part in parts}
        # In turn, so that all variants see the same machine.
        times: dict[str, float] = dict.fromkeys(runs, float("inf"))
        for _ in range(repeats):
            for name, run in runs.items():
                times[name] = min(times[name], _processor_time(run))
        scores = problem.batch * problem.heads_q * problem.seqlen_q * problem.seqlen_k
        whole = times.pop("whole")
        found[direction] = {"whole": whole * 1e9 / scores}
        found[direction] |= {name: (whole - without) * 1e9 / scores for name, without in times.items()}
    return found


class _Case:
    """Arrays of one problem without tables, and runs of its kernels with a part left out."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        rng = np.random.default_rng(0)
        kind = numpy_dtype(problem.dtype)
        shapes = (problem.q_shape, problem.k_shape, problem.v_shape, problem.out_shape)
        self.q, self.k, self.v, self.dout = (
            view(rng.standard_normal(shape).astype(kind), problem.dtype) for shape in shapes
        )
        statistic = accumulate(problem.dtype)
        self.out = view(np.zeros(problem.out_shape, kind), problem.dtype)
        self.lse = view(np.zeros(problem.lse_shape, statistic), statistic)
        self.stats = view(np.zeros((2, *problem.lse_shape), statistic), statistic)
        self.grads = [view(np.zeros(shape, kind), problem.dtype) for shape in shapes[:3]]

    def prepared(self, direction: str, leave_out: Callable[[], Any]) -> Callable[[], None]:
        """Compiles the variant and gives its run."""
        config = cpu.BACKEND.configure(self.problem)
        operands = Operands(self.q, self.k, self.v)

        def run() -> None:
            with mock.patch.object(cpu, "_threads", return_value=1):
                if direction == "forward":
                    results = Results(self.out, self.lse, self.stats)
                    cpu.BACKEND.forward(self.problem, config, operands, results)
                else:
                    saved = Saved(self.out, self.stats, self.dout)
                    cpu.BACKEND.backward(self.problem, config, operands, saved, Gradients(*self.grads))

        with leave_out(), mock.patch.object(launch, "compiled", _compiled_apart):
            run()
        return run


def _compiled_apart(spec: Spec, target: Target) -> launch.Code:
    """As launch.compiled, found again by the code itself: a variant has the key of the real kernel."""
    kernel = engine.compile_module(launch.emitted(spec, target), target, None, [spec.part, *launch.SIZES])
    return launch.Code(kernel.addresses[spec.part], *(kernel.integer(size) for size in launch.SIZES))


def view(array: np.ndarray, dtype: str) -> View:
    return View(array.ctypes.data, array.shape, array.strides, dtype, owner=array)


def _processor_time(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
