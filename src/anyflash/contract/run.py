"""One case on one backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from anyflash.contract import truth as truths
from anyflash.contract.backends import (
    WEIGHTS,
    WITHIN_BOUNDS,
    declined,
    multiplies_tf32,
    poisoned_scratch,
    sum_bits,
    where,
)
from anyflash.contract.cases import Case
from anyflash.contract.criteria import (
    FORWARD_FACTOR,
    GRADIENT_FACTOR,
    LSE_SIZE,
    OUTPUT_SIZE,
    Verdict,
    judge,
)
from anyflash.contract.device import Elsewhere
from anyflash.contract.memory import Alter, Memory
from anyflash.contract.values import Values, draw
from anyflash.dispatch.plan import run_backward, run_forward

DIRECTIONS = ("forward", "backward")


@dataclass(slots=True)
class Report:
    """What came of a case; it passed if `failures` is empty. `declined`: why a backend did not run it."""

    case: Case
    backend: str
    failures: list[str] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The greatest error over its bound."""
        return max((v.ratio for v in self.verdicts), default=0.0)


def run(
    case: Case, backend: str, directions: Sequence[str] = DIRECTIONS, alter: Alter | None = None
) -> Report:
    """Run a case: clean, in poisoned memory, and there once more.

    The clean results are judged against the truth; the others must equal them bit by bit, and no byte outside
    a result may change. `alter` replaces the call that the backend gets.
    """
    report = Report(case, backend)
    backward = "backward" in directions and case.differentiable
    tf32, bits = multiplies_tf32(backend, case.dtype), sum_bits(backend)
    values, truth = known(case, tf32, WEIGHTS.get(backend), bits)
    clean = Memory(case, values, None, alter)
    report.declined = declined(backend, clean.problem)
    if report.declined:
        return report
    first = execute(clean, backend, backward)
    report.failures += [f"clean run: {said}" for said in clean.damage()]
    report.verdicts = assess(case, first, truth, directions)
    report.failures += [v.complaint for v in report.verdicts if v.complaint]
    if report.failures:
        return report
    poisoned = Memory(case, values, truth, alter, where(backend).kind != "cpu")
    for what in ("poisoned memory", "a second run"):
        with poisoned_scratch(backend):
            again = execute(poisoned, backend, backward)
        report.failures += [f"{what}: {said}" for said in poisoned.damage()]
        if backend in WITHIN_BOUNDS:
            verdicts = assess(case, again, truth, directions)
            report.failures += [f"{what}: {v.complaint}" for v in verdicts if v.complaint]
        else:
            report.failures += differences(what, first, again)
    return report


@lru_cache(maxsize=16)
def known(
    case: Case, tf32: bool = False, weights: str | None = None, bits: int | None = None
) -> tuple[Values, truths.Truth]:
    """The numbers and the truth of a case. `tf32`, `weights` and `bits` as for `arithmetic.plain`."""
    values = draw(case)
    return values, truths.find(case, values, tf32=tf32, weights=weights, bits=bits)


def execute(memory: Memory, backend: str, backward: bool = True) -> dict[str, np.ndarray]:
    """Run forward, and backward if wanted, into fresh outputs; copies of all results by name."""
    results = memory.new_results()
    with _at(backend, memory) as send:
        run_forward(memory.problem, send(memory.operands), send(results), backend)
    got = {"out": memory.results["out"].array.copy(), "lse": memory.results["lse"].array.copy()}
    got["stats"] = memory.results["stats"].array.copy()
    if backward:
        damage = memory.damage()
        if not damage:
            saved, grads = memory.new_gradients()
            with _at(backend, memory) as send:
                run_backward(memory.problem, send(memory.operands), send(saved), send(grads), backend)
            got |= {name: made.array.copy() for name, made in memory.grads.items()}
    return got


@contextmanager
def _at(backend: str, memory: Memory) -> Iterator[Callable[[Any], Any]]:
    """Where the backend works: a function that moves views there, and the memory as it is afterwards."""
    device = where(backend)
    if device.kind == "cpu":
        yield lambda bundle: bundle
        return
    copies = Elsewhere(device, memory.buffers())
    yield copies.send
    copies.take_back()


def assess(
    case: Case, got: dict[str, np.ndarray], truth: truths.Truth, directions: Sequence[str]
) -> list[Verdict]:
    """Every result of the wanted directions against the truth."""
    verdicts = []
    for name, array in got.items():
        if name == "stats":  # between a backend's forward and its own backward
            continue
        forward = name in truths.FORWARD
        if ("forward" if forward else "backward") not in directions:
            continue
        factor = FORWARD_FACTOR if forward else GRADIENT_FACTOR
        shape = array.shape
        verdicts.append(
            judge(
                name,
                array,
                truth.exact[name].reshape(shape),
                [plain.reshape(shape) for plain in truth.plain[name]],
                factor,
                LSE_SIZE if name == "lse" else OUTPUT_SIZE,
            )
        )
    return verdicts


def differences(what: str, first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> list[str]:
    """Results that are not the same bits."""
    found = []
    for name, a in first.items():
        b = second.get(name)
        if b is None:
            found.append(f"{what}: {name} is missing")
        elif a.tobytes() != b.tobytes():
            bits = f"u{a.itemsize}"
            unequal = np.ascontiguousarray(a).view(bits) != np.ascontiguousarray(b).view(bits)
            at = tuple(int(i) for i in np.argwhere(unequal)[0])
            found.append(
                f"{what}: {name} differs from the clean run in {int(unequal.sum())} of {a.size} elements; "
                f"element {at} is {b[at]}, was {a[at]}"
            )
    return found
