"""What a backend is."""

from __future__ import annotations

from typing import Any, Protocol

from anyflash.core.device import Device
from anyflash.core.view import View
from anyflash.semantics.cache import CacheCall
from anyflash.semantics.operands import Gradients, Operands, Results, Saved
from anyflash.semantics.problem import Problem


class Backend(Protocol):
    """One way to run a Problem. A module-level `BACKEND` in each file of this folder is one instance.

    name        as given to `backend=`
    rank        lower is preferred; None is never chosen unless named
    accepts     "memory": views with addresses; other kinds later ("jax", "mlx")
    """

    name: str
    rank: int | None
    accepts: str

    def available(self) -> str | None:
        """None, or why this backend cannot work on this machine."""
        ...

    def decline(self, problem: Problem, device: Device) -> list[str]:
        """Why this backend cannot run `problem` on `device`; empty if it can. Imports, compiles nothing."""
        ...

    def configure(self, problem: Problem) -> Any:
        """The configuration (a printable value) for this problem on this machine."""
        ...

    def forward(self, problem: Problem, config: Any, operands: Operands, results: Results) -> None:
        """Write every element of `results`."""
        ...

    def backward(
        self, problem: Problem, config: Any, operands: Operands, saved: Saved, grads: Gradients
    ) -> None:
        """Write every element of `grads`."""
        ...

    def append(self, problem: Problem, config: Any, call: CacheCall, turned: View | None) -> Operands:
        """Write the new keys and values of a call over a KV cache into the cache, turned by its rotary
        embedding, and the queries, turned, to `turned`: C-contiguous in canonical axes, None without rotary.

        Returns the operands of the attention that follows: the call's, with the turned queries, and
        `seqused_k` where that was not given. On a device the host waits for nothing, launches depend on
        shapes alone, and whatever the integers say nothing outside the cache is written.
        """
        ...

    def restate(self, problem: Problem, config: Any, lse: View, stats: View) -> None:
        """Write the `stats` of rows whose `lse` is given, for a backward that takes it as it is.

        It may be of more keys than the problem has: attention in parts, merged. `stats` is the backend's own
        (its units are not said); lse is in the accumulator's type, -inf for rows without keys.
        """
        ...

    def explain(self, problem: Problem, config: Any) -> dict[str, Any]:
        """Facts for `anyflash.explain`: tile sizes, instruction set, threads, scratch bytes."""
        ...
