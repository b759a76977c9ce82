"""Objects on disk: one compile for many processes, and never a wrong or damaged object."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from anyflash.kernels.llvm import cache, engine
from anyflash.kernels.llvm.target import get_target, host_target

_SPEC = "a module that returns 42"
_IR = "define i64 @f() {\n  ret i64 42\n}"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ANYFLASH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("ANYFLASH_CACHE", raising=False)
    monkeypatch.setattr(cache, "counters", cache.Counters())
    return tmp_path / "cache"


def _new_process(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Forget what this process has loaded, get `_IR` again and run it. Returns how often it was emitted."""
    monkeypatch.setattr(engine, "_kernels", {})
    emitted: list[int] = []

    def emit() -> str:
        emitted.append(1)
        return _IR

    kernel = engine.compile_module(emit, host_target(), _SPEC, ["f"])
    assert kernel.function("f", result=ctypes.c_int64)() == 42
    return emitted


def _object(folder: Path) -> Path:
    (path,) = folder.rglob("*.o")
    return path


def test_a_warm_start_emits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _new_process(monkeypatch) == [1]
    assert _new_process(monkeypatch) == []
    assert (cache.counters.hits, cache.counters.compiled, cache.counters.stored) == (1, 1, 1)
    report = cache.report()
    assert report["objects"] == 1 and report["bytes"] > 0 and report["writable"] and report["problem"] is None


_DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[: len(content) // 2],
    "header only": lambda content: content[: len(cache._MAGIC) + 32],
    "longer": lambda content: content + b"\0",
    "one bit in the code": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "one bit in the digest": lambda content: content[:20] + bytes([content[20] ^ 1]) + content[21:],
    "other format": lambda content: b"x" + content[1:],
    "text": lambda content: b"<html>not an object</html>" * 50,
}


@pytest.mark.parametrize("damage", _DAMAGE)
def test_a_damaged_file_is_compiled_again_and_replaced(
    monkeypatch: pytest.MonkeyPatch, folder: Path, damage: str
) -> None:
    _new_process(monkeypatch)
    path = _object(folder)
    whole = path.read_bytes()
    path.write_bytes(_DAMAGE[damage](whole))
    assert _new_process(monkeypatch) == [1]
    assert "damaged" in str(cache.counters.problem)
    assert _object(folder).read_bytes() == whole


def test_another_kernel_under_this_name_is_refused(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    _new_process(monkeypatch)
    other = "define i64 @f() {\n  ret i64 43\n}"
    engine.compile_module(other, host_target(), None, ["f"])
    (mine,) = (path for path in folder.rglob("*.o") if path.stem == cache.object_key(_SPEC, host_target()))
    (foreign,) = (path for path in folder.rglob("*.o") if path != mine)
    mine.write_bytes(foreign.read_bytes())
    assert _new_process(monkeypatch) == [1]


@pytest.mark.parametrize("what", ["sources", "target", "spec"])
def test_whatever_decides_the_code_is_in_the_key(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    target = host_target()
    before = cache.object_key(_SPEC, target)
    if what == "sources":
        monkeypatch.setattr(cache, "fingerprint", lambda: "of another version")
        assert cache.object_key(_SPEC, target) != before
        assert _new_process(monkeypatch) == [1]
    elif what == "target":
        other = get_target("generic" if target.name != "generic" else "neon")
        assert cache.object_key(_SPEC, other) != before
    else:
        assert cache.object_key(_SPEC + " ", target) != before


def test_the_fingerprint_follows_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    read = Path.read_bytes
    for name in (None, "target.py", "expr.py", "dtypes.py"):
        monkeypatch.setattr(
            Path, "read_bytes", lambda self, name=name: read(self) + b"#" * (self.name == name)
        )
        cache.fingerprint.cache_clear()
        seen.add(cache.fingerprint())
    monkeypatch.setattr(Path, "read_bytes", read)
    cache.fingerprint.cache_clear()
    assert len(seen) == 4 and cache.fingerprint() in seen


def test_objects_of_other_versions_are_forgotten_after_a_month(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    for name, days in (("old", 31), ("recent", 29)):
        (folder / "cpu" / name).mkdir(parents=True)
        (folder / "cpu" / name / "x.o").write_bytes(b"")
        then = time.time() - days * 24 * 3600
        os.utime(folder / "cpu" / name, (then, then))
    _new_process(monkeypatch)
    assert {path.name for path in (folder / "cpu").iterdir()} == {"recent", cache.fingerprint()[:16]}


def _no_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFLASH_CACHE", "0")


def _a_file_in_its_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_text("")


def _read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.directory().mkdir(parents=True)
    if os.geteuid() != 0:
        cache.directory().chmod(0o500)
    else:  # the superuser may write anywhere, so the refusal is played

        def refuse(path: object, *_: object) -> int:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr(os, "open", refuse)
        monkeypatch.setattr(Path, "write_bytes", refuse)


def _disk_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)


def _no_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ANYFLASH_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)


@pytest.mark.parametrize("obstacle", [_no_cache, _a_file_in_its_place, _read_only, _disk_full, _no_home])
def test_kernels_work_where_nothing_can_be_stored(
    monkeypatch: pytest.MonkeyPatch, folder: Path, obstacle: Callable[[Path, pytest.MonkeyPatch], None]
) -> None:
    obstacle(folder, monkeypatch)
    for _ in range(2):
        assert _new_process(monkeypatch) == [1]
    report = cache.report()
    assert report["enabled"] == (obstacle is not _no_cache)
    assert (report["problem"] is None) == (obstacle is _no_cache)
    monkeypatch.undo()
    assert not list(folder.rglob("*.o")) and not list(folder.rglob(".*"))


def test_a_lock_that_is_never_released_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl", reason="this system has no file locks")
    monkeypatch.setattr(cache, "_LOCK_TIMEOUT_S", 0.05)
    key = cache.object_key(_SPEC, host_target())
    cache.directory().mkdir(parents=True)
    with (cache.directory() / f"lock-{key[0]}").open("w") as hung:
        fcntl.flock(hung, fcntl.LOCK_EX)
        assert _new_process(monkeypatch) == [1]
    assert "compiling beside it" in str(cache.counters.problem)
    assert _new_process(monkeypatch) == []


_PROCESS = """
import ctypes, os, sys, time
from pathlib import Path
from anyflash.kernels.llvm import cache, engine
from anyflash.kernels.llvm.target import get_target, host_target
go, log = Path(sys.argv[1]), sys.argv[2]
def emit():
    with open(log, "ab", buffering=0) as file:
        file.write(b"x")
    time.sleep(0.2)
    return sys.argv[3]
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
kernel = engine.compile_module(emit, host_target(), "cold start", ["f"])
assert kernel.function("f", result=ctypes.c_int64)() == 42
print(cache.counters.compiled, cache.counters.hits)
"""


def test_eight_processes_on_a_cold_cache_compile_once(tmp_path: Path, folder: Path) -> None:
    go, log = tmp_path / "go", tmp_path / "log"
    command = [sys.executable, "-c", _PROCESS, str(go), str(log), _IR]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    for process in processes:
        assert process.stdout and process.stdout.readline() == "ready\n"
    go.touch()
    outcomes = [process.communicate(timeout=120) for process in processes]
    assert [error for _, error in outcomes] == [""] * 8
    assert sorted(said for said, _ in outcomes) == ["0 1\n"] * 7 + ["1 0\n"]
    assert log.read_bytes() == b"x"
    assert len(list(folder.rglob("*.o"))) == 1
