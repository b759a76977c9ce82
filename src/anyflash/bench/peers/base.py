"""What a peer is, and what taking part in a cell means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from anyflash.bench.cells import Cell
from anyflash.bench.inputs import Inputs, Results

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Step:
    """A cell's work by one way: `call` does it, `results` names and reorders what it gave, `context` is
    entered around calls."""

    call: Callable[[], Any]
    results: Callable[[Any], Results]
    context: Context = nullcontext


class Peer(Protocol):
    """One way to compute attention. What can be prepared before a call, such as masks, is not timed.

    name      unique
    family    the column in which it is shown: the best of a family's ways counts
    package   the distribution it comes in
    """

    name: str
    family: str
    package: str

    def lacks(self, cell: Cell) -> str | None:
        """What the cell needs and this way does not offer; None if it can be tried."""
        ...

    def prepare(self, inputs: Inputs) -> Step:
        """May raise what the package raises: the peer is then shown with it."""
        ...


def torch_step(inputs: Inputs, forward: Callable[[], torch.Tensor], context: Context = nullcontext) -> Step:
    """The step of a forward on torch tensors, with its backward if the cell has one."""
    if not inputs.cell.backward:
        return Step(forward, inputs.named, lambda: _without_gradients(context()))
    leaves = list(inputs.leaves.values())

    def both() -> tuple[torch.Tensor, ...]:
        out = forward()
        return (out, *torch.autograd.grad(out, leaves, inputs.dout))

    return Step(both, inputs.named, context)


@contextmanager
def _without_gradients(inner: AbstractContextManager[Any]) -> Iterator[None]:
    with torch.no_grad(), inner:
        yield
