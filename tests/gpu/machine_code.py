"""What a compiled kernel's machine code says, and the programs that print it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def printed(script: str, *arguments: str) -> Any:
    """What a program of this folder prints, in a process of its own, where kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", str(HERE / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def assembly(made: Any) -> str:
    """A compiled kernel as its device has it: AMD's assembler, or NVIDIA's SASS."""
    import triton

    if "amdgcn" in made.asm:
        return made.asm["amdgcn"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        return subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout


def hopper_warnings(made: Any) -> int:
    """How often ptxas says that it puts wgmma one after the other (C75xx)."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(made.asm["ptx"])
        file.flush()
        command = [get_ptxas(90).path, "-v", "-arch=sm_90a", file.name, "-o", "/dev/null"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return len(re.findall(r"C75\d\d", said))


def overlapped(code: str) -> list[int]:
    """How many exponentials stand between a wait that leaves a product (in one piece or two) in flight and
    the wait for it, for each such place."""
    found: list[int] = []
    count: int | None = None
    for line in code.splitlines():
        if "WARPGROUP.DEPBAR.LE" in line:
            if re.search(r"gsb0, 0x[12]\b", line):
                count = 0
            elif count is not None:
                found.append(count)
                count = None
        elif count is not None and "MUFU.EX2" in line:
            count += 1
    return found
