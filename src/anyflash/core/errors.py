"""The three errors of anyflash, and how their messages are built.

Every message says what was asked, what was found and what to do about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class AnyflashError(Exception):
    """Base of all errors raised by anyflash."""


class InvalidCall(AnyflashError, ValueError):
    """The caller's arguments contradict each other or the documented contract.

    Raised before anything is computed or written.
    """

    def __init__(self, argument: str, found: str, expected: str, hint: str | None = None) -> None:
        self.argument = argument
        message = f"{argument}: {found}; expected {expected}"
        super().__init__(f"{message}. {hint}" if hint else message)


class Unsupported(AnyflashError, NotImplementedError):
    """The call is valid, and no backend that may run it can.

    `reasons` maps each backend that was asked to why it declined.
    """

    def __init__(self, what: str, reasons: Mapping[str, Sequence[str]], hint: str | None = None) -> None:
        self.reasons = {name: tuple(why) for name, why in reasons.items()}
        lines = [f"no backend can run {what}"]
        lines += [f"  {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        if hint:
            lines.append(hint)
        super().__init__("\n".join(lines))


class BackendBroken(AnyflashError, RuntimeError):
    """A backend that should work here failed; the cause is chained."""

    def __init__(self, backend: str, doing: str, cause: BaseException | str) -> None:
        super().__init__(
            f"backend {backend} failed while {doing}: {cause}. `anyflash doctor` says what is here"
        )
