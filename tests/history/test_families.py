"""Bugs that attention kernels have had, by family, and where each is tested here.

Files `test_NN_*.py` of this folder are families of their own. The others:

    family                                     where
     5  offsets that overflow 32 bits          tests/contract/test_big.py
    14  races, missing waits                   tests/contract/test_invariance.py, tests/stress/test_threads.py
    17  dropout differs in the backward        tests/contract/test_dropout.py
    20  torch.compile breaks or recompiles     tests/frontend_torch/test_compile.py
    23  use after fork                         tests/stress/test_processes.py
    26  denormals flushed in the process       tests/contract/test_process.py

and those that no code here can have yet:

    21  CUDA graphs replay a stale plan        there is no GPU backend, and so no graph to capture
    22  wrong device or default stream         arrays lie on the CPU alone, where calls are synchronous

Four lessons about the suites themselves are kept by how the contract is built: its attention shares no mask
code with the library (a verifier once had its kernel's bug); where the truth is NaN the result must be (a NaN
once counted as a pass); each feature is tested where it changes the result (tests once covered only the
disabled case); layout is an axis of its own (padding once repaired it by accident).
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
FAMILIES = range(1, 31)
LINE = re.compile(r"^ +(\d+)  .{35,}?  +(.+)$", re.MULTILINE)


def test_every_family_is_somewhere():
    own = {int(path.name[5:7]) for path in HERE.glob("test_[0-9]*.py")}
    listed = {int(number): where for number, where in LINE.findall(__doc__)}
    assert own | listed.keys() == set(FAMILIES)
    assert not own & listed.keys()
    for where in listed.values():
        for name in re.findall(r"tests/\S+\.py", where):
            assert (HERE.parents[1] / name).exists(), name
