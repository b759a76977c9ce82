"""Compiled kernels on disk were read half written, stale or damaged (triton #2688, #4002, #11512; DeepGEMM PR
302; flashinfer #4062; vllm #52413, where all results were NaN).

Eight processes on a cold cache are in tests/stress; here a call meets a cache that was spoiled.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from anyflash.contract.backends import present

pytestmark = pytest.mark.skipif("cpu" not in present(), reason="the CPU backend keeps the kernels")
TESTS = Path(__file__).resolve().parents[1]
SCRIPT = "from stress.workers import checksum; print(checksum(0), checksum(1))"


def run(folder, **settings):
    """What a new process with this cache computes."""
    environment = {
        **os.environ,
        "ANYFLASH_CACHE_DIR": str(folder),
        "PYTHONPATH": os.pathsep.join(map(str, (TESTS, *filter(None, sys.path)))),
        **settings,
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    return folder, run(folder)


def files(folder):
    """Those that hold something: a lock is empty."""
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]


SPOILS = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a_bit": lambda path: path.write_bytes(_flipped(path.read_bytes())),
    "text": lambda path: path.write_text("not a kernel"),
}


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


@pytest.mark.parametrize("how", SPOILS)
def test_spoiled_files(filled, how):
    folder, expected = filled
    kept = files(folder)
    assert kept
    for path in kept:
        SPOILS[how](path)
    assert run(folder) == expected
    assert run(folder) == expected


def test_another_processor(filled):
    """The same cache under a smaller instruction set gives kernels for that one."""
    folder, expected = filled
    before = len(files(folder))
    found = run(folder, ANYFLASH_CPU="generic" if os.uname().machine == "aarch64" else "avx2")
    assert len(files(folder)) > before
    assert len(found.split()) == len(expected.split())


def test_without_a_cache(filled, tmp_path):
    _, expected = filled
    assert run(tmp_path, ANYFLASH_CACHE="0") == expected
    assert not files(tmp_path)


def test_folder_that_cannot_be_written(filled, tmp_path):
    """A file stands where the folder should be."""
    _, expected = filled
    (tmp_path / "file").write_text("in the way")
    assert run(tmp_path / "file" / "cache") == expected
