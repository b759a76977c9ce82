"""Logging through the standard `logging` module, under the name "anyflash".

ANYFLASH_LOG=1 prints plans, 2 prints every call with its inputs before it runs, so that the last line of a
crashed process names the call.
"""

from __future__ import annotations

import logging

from anyflash.core import settings

logger = logging.getLogger("anyflash")


def configure() -> None:
    """Attach a stderr handler if ANYFLASH_LOG asks for one. Called once, at import."""
    level = settings.log_level()
    if level and not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("anyflash %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if level == 1 else logging.DEBUG)
