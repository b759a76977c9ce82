"""Kernels compiled beforehand: launches of the calls to come are recorded on the host and compiled on all
cores into Triton's cache, where the device's own launches find them.

A kernel that compiles for seconds would else be most of a run's time.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as Late
from multiprocessing import get_context
from typing import Any

from gpureport.calls import Case, make


def launches(case: Case, arch: str, backward: bool = True) -> list[Any]:
    """What a call launches on a device of that architecture."""
    from anyflash.kernels.triton import offline

    made = make(case, "cpu", empty=True)
    with offline.recorded(arch) as found:
        made.call.launch(made.dout, backward)
    return found


def compile_case(case: Case, arch: str, backward: bool) -> int:
    from anyflash.kernels.triton import offline

    found = launches(case, arch, backward)
    for each in found:
        offline.binary(each.kernel, arch, *each.arguments, **each.constants)
    return len(found)


def warm(cases: Sequence[tuple[Case, bool]], arch: str, seconds: float) -> dict[str, Any]:
    """Compile what `cases` (and whether backward, too) launch, until the time is up."""
    start = time.perf_counter()
    done, failed = 0, {}
    # Interpreted kernels cannot be compiled; the processes are started while the variable is away.
    interpreted = os.environ.pop("TRITON_INTERPRET", None)
    pool = ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=get_context("spawn"))
    try:
        tasks = {pool.submit(compile_case, case, arch, backward): case for case, backward in cases}
        for task in as_completed(tasks, timeout=max(seconds, 1)):
            try:
                done += task.result()
            except Exception:  # noqa: BLE001 - told in the report; the call itself will say it again
                failed[str(tasks[task])] = traceback.format_exc()[-1500:]
    except Late:
        failed["the others"] = f"not done in {seconds:.0f} s"
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        if interpreted is not None:
            os.environ["TRITON_INTERPRET"] = interpreted
    return {"launches": done, "seconds": time.perf_counter() - start, "failed": failed}
