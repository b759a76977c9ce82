"""The three ways in, each in an interpreter of its own, and the way back."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from anyflash.compat import door, hub_kernel, install, remove
from anyflash.compat.aliases import PACKAGES
from anyflash.compat.version import FLASH_ATTN
from architecture.sources import ROOT

DISTRIBUTION = ROOT / "packages" / "flash-attn"
PROGRAM = """
import sys
import flash_attn, flash_attn.modules.mha
from flash_attn.bert_padding import unpad_input
from flash_attn_interface import flash_attn_func
import anyflash.compat.flash_attn.modules.mha as ours
assert flash_attn.modules.mha.MHA is ours.MHA
assert sys.modules["flash_attn.modules.mha"] is ours
assert flash_attn.modules.mha.__spec__.name == "anyflash.compat.flash_attn.modules.mha"
print(__name__, *sys.argv[1:], flash_attn.__version__)
"""


def python(*arguments: str, path: Path | None = None, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """A fresh interpreter, `path` first among the places where it looks for modules."""
    first = [] if path is None else [f"import sys; sys.path.insert(0, {str(path)!r})"]
    if arguments[0] == "-c":
        arguments = ("-c", "\n".join([*first, textwrap.dedent(arguments[1])]), *arguments[2:])
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd)


def printed(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    made = tmp_path / "program.py"
    made.write_text(PROGRAM)
    return made


def test_installed() -> None:
    assert printed(python("-c", "import anyflash.compat\nanyflash.compat.install()\n" + PROGRAM)) == [
        "__main__", FLASH_ATTN,
    ]  # fmt: skip


def test_run_a_script(script: Path, tmp_path: Path) -> None:
    """Arguments are the script's, even those that look like ours; modules beside it are found."""
    (tmp_path / "beside.py").write_text("print('beside')")
    script.write_text(PROGRAM + "import beside\n")
    done = python("-m", "anyflash", "run", str(script), "--help", "-m", "x")
    assert printed(done) == ["__main__", "--help", "-m", "x", FLASH_ATTN, "beside"]


def test_run_a_module(script: Path, tmp_path: Path) -> None:
    done = python("-m", "anyflash", "run", "-m", "program", "--help", cwd=tmp_path)
    assert printed(done) == ["__main__", "--help", FLASH_ATTN]


@pytest.mark.parametrize(
    ("body", "code", "shown"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("import no_such_module", 1, "ModuleNotFoundError"),
        ("import flash_attn.models.gpt", 1, "No module named 'flash_attn.models'"),
        ("import anyflash; raise anyflash.InvalidCall('q', 'a', 'b')", 1, "program.py"),
    ],
)
def test_how_a_program_ends(script: Path, body: str, code: int, shown: str) -> None:
    """As under python: its exit code, and its own traceback."""
    script.write_text(body)
    done = python("-m", "anyflash", "run", str(script))
    assert done.returncode == code
    assert shown in done.stderr


@pytest.mark.parametrize("arguments", [["nothing.py"], ["-m"], []])
def test_run_refuses(arguments: list[str]) -> None:
    done = python("-m", "anyflash", "run", *arguments)
    assert done.returncode == 2


def test_distribution() -> None:
    """From its sources, as an installer would lay them."""
    source = DISTRIBUTION / "src"
    assert sorted(path.name for path in source.iterdir()) == ["flash_attn", "flash_attn_interface"]
    assert printed(python("-c", PROGRAM, path=source)) == ["__main__", FLASH_ATTN]
    twice = "import flash_attn, anyflash.compat\nanyflash.compat.install()\n" + PROGRAM
    assert printed(python("-c", twice, path=source)) == ["__main__", FLASH_ATTN]


def test_distribution_version() -> None:
    import tomllib

    import anyflash

    project = tomllib.loads((DISTRIBUTION / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["name"] == "flash-attn"
    assert project["version"] == f"{FLASH_ATTN}+anyflash.{anyflash.__version__}"


def test_kernel_for_a_hub(tmp_path: Path) -> None:
    """The folder that LOCAL_KERNELS names, as the `kernels` package reads it: metadata, and a module."""
    named = hub_kernel.write(tmp_path)
    build = tmp_path / "build"
    assert named == f"kernels-community/flash-attn2={build}:anyflash/flash-attn={build}"
    metadata = json.loads((build / "torch-cpu" / "metadata.json").read_text("utf-8"))
    assert metadata["backend"] == {"type": "cpu"}
    spec = importlib.util.spec_from_file_location(metadata["id"], build / "torch-cpu" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    kernel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kernel)
    for name in ("flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"):
        assert getattr(kernel, name).__module__.startswith("anyflash.compat.flash_attn.")
    with pytest.raises(ValueError, match="colon"):
        hub_kernel.write(tmp_path / "a:b")


def test_nothing_happens_unasked() -> None:
    """Importing anyflash, its compat or its command line brings no flash_attn, and no framework."""
    assert printed(
        python(
            "-c",
            """
            import sys, anyflash.compat, anyflash.cli.main
            names = {name.partition(".")[0] for name in sys.modules}
            print(sorted(names & {"torch", "transformers", *anyflash.compat.aliases.PACKAGES}))
            """,
        )
    ) == ["[]"]


def test_metadata_while_installed() -> None:
    before = importlib.metadata.packages_distributions()
    assert not set(PACKAGES) & set(before), (
        "a real flash_attn is here: this test needs an environment without"
    )
    install()
    try:
        install()
        assert importlib.metadata.version("flash-attn") == FLASH_ATTN
        assert importlib.metadata.version("flash_attn") == FLASH_ATTN
        assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
        import flash_attn
    finally:
        remove()
    assert "flash_attn" not in sys.modules
    assert importlib.metadata.packages_distributions() == before
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")
    with pytest.raises(ModuleNotFoundError):
        import flash_attn.layers
    assert flash_attn.__version__ == FLASH_ATTN, "what was imported keeps working"
    remove()


def test_open_until_all_have_released() -> None:
    door.hold("one")
    door.hold("other")
    install()
    for leave in (remove, remove, lambda: door.release("one")):
        leave()
        assert importlib.metadata.version("flash-attn") == FLASH_ATTN
    door.release("other")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")


def test_another_flash_attn_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "flash_attn.py").write_text("")
    done = python(
        "-c",
        """
        import flash_attn, anyflash.compat
        try:
            anyflash.compat.install()
        except anyflash.InvalidCall as error:
            print("imported already" in str(error))
        """,
        path=tmp_path,
    )
    assert printed(done) == ["True"]
