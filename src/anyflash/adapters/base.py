"""What an adapter is, and which versions of its system it was tested with."""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Target:
    """A package and the versions an adapter is tested with: `minimum` <= version < `below`.

    `package` is the distribution's name, `module` what is imported, `how_to_install` the command for a user.
    """

    package: str
    module: str
    minimum: str
    below: str
    how_to_install: str

    def __str__(self) -> str:
        return f"{self.package}>={self.minimum},<{self.below}"

    def installed(self) -> str | None:
        """The installed version, or None. Imports nothing."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def tested(self, version: str) -> bool:
        return _release(self.minimum) <= _release(version) < _release(self.below)

    def absent(self) -> str | None:
        """What a self-check says of a package that is not installed; None if it is."""
        return None if self.installed() else f"{self.package} is not installed: {self.how_to_install}"

    def unusable(self, error: ImportError) -> str:
        """What a self-check says of an installed package that lacks what the adapter imports."""
        return f"{error}; {self.package} {self.installed()} is here, tested is {self}"

    def warn_if_untested(self) -> None:
        """Warn, naming the range, if the installed version lies outside it."""
        version = self.installed()
        if version is not None and not self.tested(version):
            warnings.warn(
                f"{self.package} {version} is outside the range this adapter is tested with ({self}); "
                "call self_check() to see whether it works",
                stacklevel=3,
            )


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers: "2.13.0+cpu" gives (2, 13, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def disagreement(what: str, ours: torch.Tensor, own: torch.Tensor, roundings: int = 64) -> str | None:
    """None if `ours` is `own` up to `roundings` roundings of its greatest value; else what to say of it."""
    import torch

    difference = float((ours - own).detach().abs().max())
    bound = roundings * torch.finfo(own.dtype).eps * float(own.detach().abs().max())
    if difference <= bound:
        return None
    return f"{what} differs from its own attention by {difference:.1e}, rounding by {bound:.1e}"


class Adapter(Protocol):
    """One system. A module of this folder is one: it defines these names at its top level.

    Importing an adapter imports neither its system nor a framework; `install` and `self_check` do.
    """

    name: str
    target: Target

    def install(self) -> None:
        """Put anyflash behind the system's door. Twice is once. Warns outside the tested versions."""
        ...

    def remove(self) -> None:
        """Undo `install` exactly. Without an `install` before it, does nothing."""
        ...

    def self_check(self) -> str | None:
        """None if the system, run with and without us on a tiny problem, agrees; else what is wrong.

        Leaves the system as it was found. An absent package is an answer, not an error.
        """
        ...
