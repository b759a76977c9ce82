"""Kernels emitted for any target, of this machine or not, and what their assembly says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from anyflash.core.view import View
from anyflash.frontends.numpy_ import FRONTEND
from anyflash.kernels.llvm import engine, launch, schedule
from anyflash.kernels.llvm.spec import ARRAYS, Part, Spec
from anyflash.kernels.llvm.target import get_target
from anyflash.semantics.arrays import numpy_dtype
from kernels.cases import Case, draw


def views(case: Case, part: Part) -> dict[str, View]:
    """Row-major arrays for `part`, by name."""
    given = draw(case)
    problem = given.problem
    shapes = {
        "q": problem.q_shape, "k": problem.k_shape, "v": problem.v_shape, "out": problem.out_shape,
        "dout": problem.out_shape, "dq": problem.q_shape, "dk": problem.k_shape, "dv": problem.v_shape,
    }  # fmt: skip
    kind = numpy_dtype(problem.dtype)
    return {
        name: FRONTEND.view(
            np.ascontiguousarray(given.arrays[name]) if name in given.arrays else np.zeros(shapes[name], kind)
        )
        for name in ARRAYS[part]
    }


def spec_of(case: Case, part: Part, target_name: str) -> Spec:
    """What the launch of this case would compile."""
    problem, target = draw(case).problem, get_target(target_name)
    arrays = views(case, part)
    tables = [FRONTEND.view(t) for t in draw(case).tables]
    statistic = 8 if problem.dtype == "float64" else 4
    strides = {
        i: tuple(int(s) for s in np.zeros(t.shape, f"f{statistic}").strides)
        for i, t in enumerate(problem.tables)
        if t.needs_grad and part in ("backward", "backward_dq")
    }
    codes = schedule.table_codes(problem, part in ("backward", "backward_dq"), tables, strides)
    ahead = schedule.made_ahead(problem, part, target, arrays["k"], arrays["v"])
    return schedule.make_spec(problem, part, target, frozenset(arrays), case.dlse, codes, ahead)


def assembly(case: Case, part: Part, target_name: str) -> str:
    target = get_target(target_name)
    return engine.emit_assembly(launch.emitted(spec_of(case, part, target_name), target), target)


@dataclass(frozen=True)
class Loop:
    """An innermost loop: its instructions, in order, without labels and directives."""

    lines: tuple[str, ...]

    def count(self, pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in self.lines)


_LABEL = re.compile(r"^(\.?L[\w.]+):")
_JUMP = re.compile(r"^\s+(?:j\w+|b(?:\.\w+)?|cbn?z|tbn?z)\s+(?:.*,\s*)?(\.?L[\w.]+)\s*$")


def innermost_loops(text: str) -> Iterator[Loop]:
    """Loops that no other loop lies within: a label and a jump back to it, without another between."""
    lines = [line.split("#")[0].split("//")[0].rstrip() for line in text.splitlines()]
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := _LABEL.match(line))}
    backward = []
    for i, line in enumerate(lines):
        found = _JUMP.match(line)
        start = labels.get(found.group(1)) if found else None
        if start is not None and start < i:
            backward.append((start, i))
    for start, end in backward:
        if not any(
            start <= other and last <= end and (other, last) != (start, end) for other, last in backward
        ):
            body = [line.strip() for line in lines[start + 1 : end + 1]]
            yield Loop(
                tuple(line for line in body if line and not line.startswith(".") and not line.endswith(":"))
            )
