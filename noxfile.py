"""Systems whose pins clash with what the rest of the tests use, each set in an environment of its own.

`make test` runs those of Triton, `make test-systems` the others, `.venv/bin/nox -s
'systems(transformers4)'` one. An environment is laid over the project's: it adds or replaces some packages,
without their own dependencies, and sees the rest (torch, pytest, anyflash itself) where they are. So it
takes seconds to build, and torch is there once. Tests say by themselves what they need, and are skipped
elsewhere with the words "make test-systems".
"""

from __future__ import annotations

import os
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"
nox.options.error_on_missing_interpreters = True


@dataclass(frozen=True)
class Overlay:
    """packages: installed with --no-deps; tests: what is run, and what by Triton's interpreter; sources:
    packages that are installed apart, as a checkout would lie, and the variables that tests look for those
    in."""

    packages: tuple[str, ...]
    tests: tuple[str, ...]
    interpreted: tuple[str, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()


# Composer and llm-foundry pin an older torch, and want two dozen packages that nothing here calls.
_MOSAIC = (
    "mosaicml==0.32.1",
    "llm-foundry==0.22.0",
    "torchmetrics==1.7.4",
    "torch_optimizer==0.3.0",
    "pytorch_ranger==0.1.1",
    "lightning_utilities==0.15.3",
    "coolname==5.0.0",
    "tabulate==0.9.0",
    "importlib_metadata==8.7.0",
    "catalogue==2.0.10",
)
_MOSAIC_TESTS = ("tests/adapters/test_composer.py", "tests/adapters/test_llm_foundry.py")

_COMPILED = (
    "tests/gpu/test_assembler.py",
    "tests/gpu/test_compiled.py",
    "tests/gpu/test_compiled_append.py",
    "tests/gpu/test_compiled_decode.py",
    "tests/gpu/test_compiled_fp8.py",
    "tests/gpu/test_compiled_others.py",
    "tests/gpu/test_compiled_hopper.py",
    "tests/gpu/test_compiled_hopper_fp8.py",
    "tests/gpu/test_compiled_hopper_backward.py",
    "tests/gpu/test_compiled_hopper_decode.py",
    "tests/gpu/test_compiled_pages.py",
    "tests/gpu/test_emulated_pages.py",
    "tests/gpu/test_emulator.py",
    "tests/gpu/test_emulator_agrees.py",
    "tests/gpu/test_tuner.py",
    "tests/gpu/test_variants.py",
)
_INTERPRETED = (
    "tests/gpu/test_interpreted.py",
    "tests/gpu/test_interpreted_append.py",
    "tests/gpu/test_interpreted_decode.py",
    "tests/gpu/test_interpreted_device.py",
    "tests/gpu/test_interpreted_fp8.py",
    "tests/gpu/test_precision.py",
    "tests/gpu/test_emulated_backward.py",
    "tests/gpu/test_emulated_decode.py",
    "tests/gpu/test_emulated_decode_mutations.py",
    "tests/gpu/test_report.py",
    "tests/gpu/test_torch_device.py",
    "tests/gpu/test_emulated_hopper.py",
    "tests/gpu/test_emulated_fp8.py",
    "tests/gpu/test_emulated_mutations_fp8.py",
    "tests/gpu/test_emulated_mutations.py",
    "tests/gpu/test_emulated_prefill.py",
)

OVERLAYS = {
    "triton39": Overlay(("triton==3.9.0",), _COMPILED, _INTERPRETED),
    "triton36": Overlay(("triton==3.6.0",), _COMPILED, _INTERPRETED),
    "mosaic": Overlay(_MOSAIC, _MOSAIC_TESTS),
    "transformers4": Overlay(
        ("transformers==4.51.3", "tokenizers==0.21.4", "huggingface_hub==0.36.0", *_MOSAIC),
        (
            *_MOSAIC_TESTS,
            "tests/adapters/test_systems_transformers4.py",
            "tests/adapters/test_kernl.py",
            "tests/adapters/test_colossalai.py",
        ),
        sources=(("ANYFLASH_SRC_COLOSSALAI", "colossalai==0.5.0"),),
    ),
}


@nox.session
@nox.parametrize("name", list(OVERLAYS), ids=list(OVERLAYS))
def systems(session: nox.Session, name: str) -> None:
    """The tests of one set; arguments behind -- take the place of its files."""
    if name.startswith("triton") and sys.platform != "linux":
        session.skip("Triton is built for Linux alone")
    overlay = OVERLAYS[name]
    shared = sysconfig.get_path("purelib")
    site = Path(session.virtualenv.location) / Path(shared).relative_to(sys.prefix)
    # Behind its own packages come those of the environment that nox runs in, with their .pth files.
    (site / "project.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
    session.install("--quiet", "--no-deps", *overlay.packages)
    named = {variable: str(site.parent / variable) for variable, _ in overlay.sources}
    for variable, package in overlay.sources:
        if not Path(named[variable]).exists():
            # What is built from source asks for torch while it is.
            apart = ("--no-deps", "--no-build-isolation", "--target", named[variable])
            session.install("--quiet", *apart, package)
    pytest = ("python", "-m", "pytest", "-m", "not gpu")
    if overlay.interpreted:
        # Hundreds of tests, each on one core, none of which measures time.
        pytest += ("-n", str(min(os.cpu_count() or 1, 8)))
    session.run(*pytest, *(session.posargs or overlay.tests), env=named)
    if overlay.interpreted and not session.posargs:
        # Kernels are interpreted or compiled, as they are imported: never both in one process.
        session.run(*pytest, *overlay.interpreted, env={"TRITON_INTERPRET": "1"})
