"""What the emulator finds wrong with a kernel."""

from __future__ import annotations


class EmulationError(Exception):
    """The kernel does something that the hardware leaves undefined, or that Gluon refuses."""


class Race(EmulationError):
    """Two accesses to the same bytes of shared memory, one of them a write, that nothing orders."""


class MissingFence(EmulationError):
    """The asynchronous proxy touches what was stored by threads, with no proxy fence in between."""


class Deadlock(EmulationError):
    """No partition can go on and nothing is in flight."""


class BarrierMisuse(EmulationError):
    """Arrivals, bytes or phases of a barrier that do not fit each other."""


class InFlight(EmulationError):
    """A result is used, or a partition ends, while an asynchronous operation has not been waited for."""


class Mismatch(EmulationError):
    """Shapes, element types or layouts that Gluon's own type rules refuse."""


class OutOfBounds(EmulationError):
    """An address outside the tensor, or a 32-bit integer that overflows."""


class Unknown(EmulationError):
    """The emulator does not model this operation."""
