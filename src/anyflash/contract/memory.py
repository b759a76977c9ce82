"""The operands and results of a case, each in poisoned memory of its own, and the call described over
them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from anyflash.contract.cases import Case
from anyflash.contract.poison import CONTIGUOUS, Layout, Poisoned, numpy_dtype
from anyflash.contract.truth import Truth, seed
from anyflash.contract.values import Values, cumulative
from anyflash.core.dtypes import accumulate, kind
from anyflash.core.view import View
from anyflash.semantics.descale import FACTORS, Descale
from anyflash.semantics.describe import describe, describe_program
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem

Alter = Callable[[Problem, Operands], tuple[Problem, Operands]]


class Memory:
    """One set of buffers: contiguous and clean, or with the case's layouts and NaN wherever nothing may
    look."""

    def __init__(
        self,
        case: Case,
        values: Values,
        truth: Truth | None = None,
        alter: Alter | None = None,
        whole: bool = False,
    ) -> None:
        """With `truth`, rows that must not matter hold NaN and the layouts are those of the case.

        `alter` replaces the described call: it is how the suite is tested itself. `whole`: arrays are shifted
        by whole elements alone, as in the memory of a GPU, where others do not occur.
        """
        self.case, self.whole = case, whole
        self.laid_out = truth is not None
        self.statistic = accumulate(case.dtype)
        dead = (truth.dead_q, truth.dead_k, truth.dead_v) if truth is not None else (None,) * 3
        q, k, v = (
            self._input(array, i, rows)
            for i, (array, rows) in enumerate(zip((values.q, values.k, values.v), dead, strict=True))
        )
        self.dout = self._input(values.dout, 3, dead[0])
        self.dlse = Poisoned.of(values.dlse, self.statistic)
        self.tables = {
            name: Poisoned.of(t, t.dtype.name, self._laid(case.table_layout, t.dtype.itemsize))
            for name, t in values.tables.items()
        }
        self.factors: dict[str, Any] = {}
        for name, factor in values.descale.items():
            if isinstance(factor, float):
                self.factors[name] = factor
            else:
                self.tables[name] = Poisoned.of(factor, "float32")
                self.factors[name] = self.tables[name].array
        self.inputs = {"q": q, "k": k, "v": v, **self.tables}
        packed: dict[str, View] = {}
        if case.packed is not None:
            lengths = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), cumulative(case.packed), strict=True))
            if case.packed.used_k is not None:
                lengths["seqused_k"] = np.array(case.packed.used_k, np.int64)
            for name, array in lengths.items():
                self.inputs[name] = Poisoned.of(array, "int32")
                packed[name] = self.inputs[name].view
        if values.sinks is not None:
            self.inputs["sinks"] = Poisoned.of(values.sinks, values.sinks.dtype.name)
        self._describe(q, k, v, values, packed, alter)
        self.results: dict[str, Poisoned] = {}
        self.grads: dict[str, Poisoned] = {}

    def _describe(
        self,
        q: Poisoned,
        k: Poisoned,
        v: Poisoned,
        values: Values,
        packed: dict[str, View],
        alter: Alter | None,
    ) -> None:
        case = self.case
        keywords: dict[str, object] = {}
        for piece in (*case.terms, *case.rules):
            for name, value in piece.arguments(lambda table: self.tables[table].array).items():
                keywords[name] = _both_masks(keywords[name], value) if name in keywords else value
        layout = "bshd" if case.packed is None else "thd"
        made = describe_program(
            q.view.shape,
            k.view.shape,
            lambda _, array: array.dtype.name,
            layout=layout,
            sequences=None if case.packed is None else len(case.packed.lens_q),
            scale=case.scale,
            sinks=values.sinks,
            dropout_p=case.dropout_p,
            descale=self._descale(k.view),
            **keywords,
        )
        self.slots = [self._owner_of(array) for array in made.tables]
        views = [self._table_view(array) for array in made.tables]
        sinks = self.inputs.get("sinks")
        self.problem, self.operands = describe(
            made.program,
            q.view,
            k.view,
            v.view,
            layout=layout,
            tables=tuple(views),
            names=made.names,
            needs_grad=tuple(case.differentiable and kind(view.dtype) == "float" for view in views),
            sinks=None if sinks is None else sinks.view,
            seed=seed(case),
            **packed,
        )
        if alter is not None:
            self.problem, self.operands = alter(self.problem, self.operands)

    def _descale(self, k: View) -> Descale | None:
        factors = tuple(self.factors.get(name) for name in FACTORS)
        return Descale(*factors, k.shape[-2], self.case.dtype, self.case.dtype) if self.factors else None

    def _laid(self, layout: Layout, itemsize: int) -> Layout:
        if not self.laid_out:
            return CONTIGUOUS
        return replace(layout, shift=layout.shift // itemsize * itemsize) if self.whole else layout

    def _input(self, values: np.ndarray, i: int, dead: np.ndarray | None) -> Poisoned:
        layout = self._laid(self.case.layout(i), numpy_dtype(self.case.dtype).itemsize)
        if i == 3:
            layout = replace(layout, expand=())
        if dead is not None and not layout.expand:
            values = values.copy()
            values[dead] = np.nan
        return Poisoned.of(values, self.case.dtype, layout)

    def _output(self, shape: tuple[int, ...], dtype: str, i: int) -> Poisoned:
        layout = self._laid(self.case.layout(i), numpy_dtype(self.case.dtype).itemsize)
        layout = replace(layout, expand=())
        return Poisoned(shape, dtype, layout, output=True)

    def _owner_of(self, array: np.ndarray) -> str:
        for name, table in self.tables.items():
            if table.holds(array.ctypes.data):
                return name
        raise LookupError("describe_program returned a table that no argument holds")

    def _table_view(self, array: np.ndarray) -> View:
        return View(
            array.ctypes.data, array.shape, array.strides, array.dtype.name, writable=False, owner=array
        )

    def new_results(self) -> Results:
        """Fresh outputs of a forward."""
        shape, statistic = self.problem.lse_shape, self.statistic
        self.results = {
            "out": self._output(self.problem.out_shape, self.problem.dtype_out, 3),
            "lse": Poisoned(shape, statistic, output=True),
            "stats": Poisoned((2, *shape), statistic, output=True),
        }
        return Results(*(made.view for made in self.results.values()))

    def new_gradients(self) -> tuple[Saved, Gradients]:
        """Inputs and fresh outputs of a backward, after a forward wrote `results`."""
        for made in self.results.values():
            made.become_input()
        problem, dtype = self.problem, self.case.dtype
        self.grads = {
            "dq": self._output(problem.q_shape, dtype, 0),
            "dk": self._output(problem.k_shape, dtype, 1),
            "dv": self._output(problem.v_shape, dtype, 2),
        }
        tables: list[View | None] = []
        for name, spec in zip(self.slots, problem.tables, strict=True):
            if spec.needs_grad:
                self.grads[name] = Poisoned(spec.shape, self.statistic, output=True)
            tables.append(self.grads[name].view if spec.needs_grad else None)
        if problem.program.sinks:
            self.grads["dsinks"] = Poisoned((problem.heads_q,), self.statistic, output=True)
        dsinks = self.grads.get("dsinks")
        saved = Saved(self.results["out"].view, self.results["stats"].view, self.dout.view, self.dlse.view)
        views = (self.grads[name].view for name in ("dq", "dk", "dv"))
        return saved, Gradients(*views, tuple(tables), None if dsinks is None else dsinks.view)

    def damage(self) -> list[str]:
        """What was written where it should not be, or not written where it should."""
        return [f"{name}: {said}" for name, made in self._everything().items() if (said := made.damage())]

    def buffers(self) -> list[np.ndarray]:
        """All memory as it is now, margins included, as bytes."""
        return [made.raw for made in self._everything().values()]

    def _everything(self) -> dict[str, Poisoned]:
        return {"dout": self.dout, "dlse": self.dlse, **self.inputs, **self.results, **self.grads}


def _both_masks(first: object, second: object) -> object:
    """Two mask functions as one, as a user would combine them."""
    if not (callable(first) and callable(second)):
        raise TypeError("only mask functions combine; an array stands alone")
    return lambda at: first(at) & second(at)
