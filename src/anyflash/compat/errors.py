"""How the drop-in refuses a call: with flash_attn's own sentence, and with what was found."""

from __future__ import annotations

from collections.abc import Sequence

from anyflash.core.errors import InvalidCall, Unsupported


class Refused(InvalidCall, RuntimeError):
    """A call that flash_attn refuses too.

    The first line of the message is flash_attn's own, word for word, so that what matches it there matches it
    here; the second says what was found. Its kind is both that of flash_attn's extension (RuntimeError) and
    ours.
    """

    def __init__(self, sentence: str, found: str) -> None:
        self.argument = sentence.partition(" ")[0]
        Exception.__init__(self, f"{sentence}\n{found}")


def unsupported(argument: str, found: str, reason: str, hint: str | None = None) -> Unsupported:
    """The error for an argument of flash_attn that means something we cannot do."""
    return Unsupported(f"{argument}={found}", {"anyflash.compat": [reason]}, hint)


def refuse_given(reason: str, **arguments: object) -> None:
    """Raises Unsupported if one of the arguments is given, that is not None."""
    for name, value in arguments.items():
        if value is not None:
            raise unsupported(name, f"<{type(value).__name__}>", reason)


def expect(condition: bool, sentence: str, found: str | Sequence[object]) -> None:
    """Raises Refused with flash_attn's sentence unless the condition holds."""
    if not condition:
        raise Refused(sentence, found if isinstance(found, str) else ", ".join(map(str, found)))
