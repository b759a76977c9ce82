"""What processes of the stress tests do; importable by processes that start afresh."""

from __future__ import annotations

import numpy as np

from anyflash.contract.direct import attend
from contract.calls import PROGRAMS, operands, results


def problem(i: int) -> dict[str, bytes]:
    """The bits of the i-th of several different calls, forward and backward."""
    programs = list(PROGRAMS.values())
    arrays = operands("float32", (1 + i % 3, 20 + 13 * i % 70), (1 + i % 3, 30 + 29 * i % 100), seed=i)
    found = attend("cpu", **arrays, **programs[i % len(programs)])
    return {name: array.tobytes() for name, array in results(found).items()}


def checksum(i: int) -> float:
    """One number from `problem(i)`, cheap to send between processes."""
    return float(sum(np.frombuffer(bits, np.uint8).astype(np.float64).sum() for bits in problem(i).values()))
