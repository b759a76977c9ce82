"""Calls of ours as data, and attention as it is defined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from anyflash.backends.registry import entries
from anyflash.dispatch.plan import execute_backward, execute_forward, plan
from anyflash.frontends.torch_arrays import view
from anyflash.semantics.describe import describe, describe_program
from anyflash.semantics.operands import Gradients, Results, Saved
from anyflash.semantics.rng import dropout_factors

_DROPPED = 0.25


@dataclass(frozen=True)
class Case:
    """Shapes and options of one dense call; arrays are (batch, heads, rows, dim), the last axis of v and out
    dim_v, 0 for dim. `extra`: "plain", "bias", "softcap, ALiBi", "dropout"."""

    dtype: str
    dim: int
    rows: int
    keys: int
    causal: bool
    extra: str = "plain"
    batch: int = 2
    heads: int = 4
    kv_heads: int = 2
    backend: str = "triton"
    dim_v: int = 0

    def __str__(self) -> str:
        kind = "causal" if self.causal else "full"
        dims = f"{self.dim}/{self.dim_v}" if self.dim_v else str(self.dim)
        return f"{self.backend} {self.dtype} {dims} {self.rows}x{self.keys} {kind} {self.extra}"


@dataclass
class Made:
    """A case on a device: our call, the incoming gradient, and the score, mask and dropout's factors of its
    definition."""

    call: Call
    dout: Any
    score: Callable[[Any], Any] | None
    mask: Any
    factors: Any = None


def make(case: Case, device: str, empty: bool = False) -> Made:
    """`empty`: arrays without values, as good as any where nothing is run."""
    new = torch.empty if empty else torch.randn
    dtype = getattr(torch, case.dtype)

    def array(heads: int, rows: int, dim: int) -> Any:
        return new(case.batch, heads, rows, dim, device=device).to(dtype)

    dim_v = case.dim_v or case.dim
    q, k, v = (
        array(case.heads, case.rows, case.dim),
        array(case.kv_heads, case.keys, case.dim),
        array(case.kv_heads, case.keys, dim_v),
    )
    first = case.keys - case.rows
    places = torch.arange(case.rows, device=device)[:, None] + first
    distance = places - torch.arange(case.keys, device=device) if not empty else None
    mask = distance >= 0 if case.causal and distance is not None else None
    keywords: dict[str, Any] = {"causal": case.causal}
    score = None
    if case.extra == "softcap, ALiBi":
        slopes = torch.rand(case.heads, device=device)
        keywords |= {"softcap": 5.0, "alibi_slopes": slopes}
        score = lambda s: 5 * torch.tanh(s / 5) - slopes[:, None, None].to(s.dtype) * distance.abs()
    elif case.extra == "bias":
        bias = new(1, case.heads, case.rows, case.keys, device=device)
        keywords["bias"] = bias
        score = lambda s: s + bias.to(s.dtype)
    factors = None
    if case.extra == "dropout":
        keywords["dropout_p"] = _DROPPED
        if not empty:
            factors = _factors(case).to(device)
    call = Call(q, k, v, case.backend, case.extra != "plain", **keywords)
    return Made(call, array(case.heads, case.rows, dim_v), score, mask, factors)


def _factors(case: Case) -> Any:
    """(batch, heads, rows, keys): dropout's, of seed 0."""
    found = [
        [dropout_factors(_DROPPED, 0, b, h, case.rows, case.keys) for h in range(case.heads)]
        for b in range(case.batch)
    ]
    return torch.tensor(np.array(found))


class Call:
    """One call of ours, prepared: arrays (batch, heads, rows, dim) of any dtype."""

    def __init__(
        self, q: Any, k: Any, v: Any, backend: str, tables_with_gradient: bool = False, **keywords: Any
    ) -> None:
        self.arrays, self.backend = (q, k, v), backend
        made = describe_program(
            q.shape, k.shape, lambda _, t: str(t.dtype).removeprefix("torch."), layout="bhsd",
            sequences=None, **keywords,
        )  # fmt: skip
        self.tables = list(made.tables)
        seed = keywords.get("seed") or 0
        self.problem, self.operands = describe(
            made.program, view(q), view(k), view(v), layout="bhsd",
            tables=tuple(view(t) for t in made.tables), names=made.names,
            needs_grad=tuple(tables_with_gradient and t.is_floating_point() for t in made.tables), seed=seed,
        )  # fmt: skip

    def declined(self) -> list[str]:
        backend = entries()[self.backend].backend
        return [] if backend is None else backend.decline(self.problem, self.operands.q.device)

    def results(self, fill: float = float("nan")) -> tuple[Any, Any, Any]:
        q, _, v = self.arrays
        batch, heads, rows = q.shape[:3]
        out = torch.full((batch, heads, rows, v.shape[3]), fill, dtype=q.dtype, device=q.device)
        lse = torch.full((batch, heads, rows), fill, dtype=torch.float32, device=q.device)
        return out, lse, torch.full((2, *lse.shape), fill, dtype=torch.float32, device=q.device)

    def forward(self, made: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        out, lse, stats = made
        results = Results(_rows(out), view(lse), view(stats))
        execute_forward(plan(self.problem, self.operands.q.device, self.backend), self.operands, results)
        return made

    def gradients(self, fill: float | None = None) -> list[Any]:
        """dq, dk, dv, and those of tables that have one."""
        grads = [torch.empty_like(t) for t in self.arrays]
        grads += [
            torch.empty(t.shape, dtype=torch.float32, device=t.device)
            for t, spec in zip(self.tables, self.problem.tables, strict=True)
            if spec.needs_grad
        ]
        for t in grads if fill is not None else ():
            t.fill_(fill)
        return grads

    def backward(self, made: tuple[Any, Any, Any], dout: Any, fill: float | None = None) -> list[Any]:
        grads = self.gradients(fill)
        saved, views = self._backward_views(made, dout, grads)
        execute_backward(
            plan(self.problem, self.operands.q.device, self.backend), self.operands, saved, views
        )
        return grads

    def _backward_views(self, made: tuple[Any, Any, Any], dout: Any, grads: list[Any]) -> Any:
        out, _, stats = made
        given = iter(grads[3:])
        tables = tuple(view(next(given)) if spec.needs_grad else None for spec in self.problem.tables)
        return Saved(_rows(out), view(stats), _rows(dout)), Gradients(*map(_rows, grads[:3]), tables)

    def launch(self, dout: Any, backward: bool) -> None:
        """Straight to the backend, wherever the arrays are: for launches that are only recorded."""
        backend = entries()[self.backend].backend
        assert backend is not None
        config = backend.configure(self.problem)
        made = self.results(0.0)
        out, lse, stats = made
        backend.forward(self.problem, config, self.operands, Results(_rows(out), view(lse), view(stats)))
        if backward:
            views = self._backward_views(made, dout, self.gradients())
            backend.backward(self.problem, config, self.operands, *views)


def definition(made: Made, dtype: Any) -> list[Any]:
    """out, dq, dk, dv of attention as it is defined, in `dtype`."""
    leaves = [t.detach().to(dtype).clone().requires_grad_() for t in made.call.arrays]
    q, k, v = leaves
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    s = (q @ k.mT) * q.shape[-1] ** -0.5
    s = made.score(s) if made.score else s
    if made.mask is not None:
        s = s.masked_fill(~made.mask, float("-inf"))
    p = s.softmax(-1).to(dtype)
    out = (p if made.factors is None else p * made.factors.to(dtype)) @ v
    return [out.detach(), *torch.autograd.grad(out, leaves, made.dout.to(dtype))]


def _rows(t: Any) -> Any:
    return view(t).permute((0, 2, 1, 3))
