"""What a row of the adoption page is: a system, a workload, and the attentions it is run with."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Role = Literal["eager", "best", "ours"]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Requirement:
    """A distribution that a row needs, and the command that installs it."""

    package: str
    how_to_install: str

    def installed(self) -> str | None:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


class Needed(Protocol):
    """What a row needs: a `Requirement`, or a system's source (`adapters.checkout.Checkout`)."""

    @property
    def package(self) -> str: ...

    @property
    def how_to_install(self) -> str: ...

    def installed(self) -> str | None:
        """Its version, or None if it is not here."""
        ...


@dataclass(frozen=True, slots=True)
class Result:
    """What one step produced, by name. Gradients are judged apart from outputs."""

    outputs: Arrays
    gradients: Arrays


@dataclass(frozen=True, slots=True)
class Variant:
    """One attention under which the workload runs.

    role      "eager": the system's plain attention; "best": its fastest own one here; "ours"
    context   puts the attention in place; entered outside every measurement
    """

    role: Role
    label: str
    context: Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Reach:
    """How large a problem fits in a given memory, where the claim is of that.

    unit     what a size counts: "residues"
    limit    bytes that a step may add to its input
    sizes    ascending; tried one after another until one passes the limit
    prepare  makes the input of that size, and gives a step on it under that role's attention
    """

    unit: str
    limit: int
    sizes: Sequence[int]
    prepare: Callable[[Role, int], Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Workload:
    """A built row: model and input are in memory.

    description  what runs, with the sizes that the input turned out to have
    dtype        of the computation; its rounding enters the tolerance
    step         one measured unit of work: takes the variant's role, gives what it produced
    reference    the same in float64, with an attention of the system's own
    train        optional, where the claim is about training: takes the role and a number of steps, trains
                 from the same initial weights on the same real text, and gives the loss before each step
    reach        optional, where the claim is about the size that fits in memory
    """

    description: str
    dtype: str
    step: Callable[[Role], Result]
    reference: Callable[[], Result]
    variants: tuple[Variant, ...]
    train: Callable[[Role, int], Sequence[float]] | None = None
    reach: Reach | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the page.

    build    loads the model and its input; `build(True)` smaller ones, for a quick run
    module   where the row is defined, for the process that measures it; the registry knows
    """

    name: str
    system: str
    title: str
    requires: tuple[Needed, ...]
    build: Callable[[bool], Workload]
    module: str = ""

    def absent(self) -> list[Needed]:
        return [r for r in self.requires if r.installed() is None]
