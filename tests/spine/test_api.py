"""The public surface is what is promised, and its examples run."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import anyflash as af
from anyflash import api

KEYWORDS = {
    "layout": "bshd",
    "causal": False,
    "window": None,
    "scale": None,
    "softcap": None,
    "score": None,
    "mask": None,
    "bias": None,
    "alibi_slopes": None,
    "sinks": None,
    "dropout_p": 0.0,
    "seed": None,
    "descale_q": None,
    "descale_k": None,
    "descale_v": None,
    "return_lse": False,
    "deterministic": None,
    "backend": None,
}
REQUIRED = inspect.Parameter.empty
LENGTHS = {"cu_seqlens_q": REQUIRED, "cu_seqlens_k": REQUIRED, "seqused_k": None}
OPTIONAL = dict.fromkeys(LENGTHS)
SIGNATURES = {
    "attention": (("q", "k", "v"), KEYWORDS),
    "attention_varlen": (("q", "k", "v"), {**LENGTHS, **KEYWORDS, "layout": "thd"}),
    "explain": (("q", "k", "v"), {**OPTIONAL, **KEYWORDS, "layout": None}),
    "merge": (("out_a", "lse_a", "out_b", "lse_b"), {"layout": "bshd"}),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    positional, keywords = SIGNATURES[name]
    parameters = inspect.signature(getattr(af, name)).parameters
    assert tuple(n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD) == positional
    assert {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY} == keywords


def test_names() -> None:
    promised = {
        *SIGNATURES, "masks", "table", "tanh", "exp", "log", "where", "minimum", "maximum",
        "InvalidCall", "Unsupported", "BackendBroken", "__version__",
    }  # fmt: skip
    assert promised <= set(af.__all__)
    assert all(hasattr(af, name) for name in af.__all__)
    assert "torch" in dir(af)


def test_version_is_the_packages() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert tomllib.loads(project.read_text(encoding="utf-8"))["project"]["version"] == af.__version__


def test_frameworks_are_attributes_imported_when_asked_for() -> None:
    code = "import sys, anyflash; assert 'torch' not in sys.modules; anyflash.missing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip().endswith("AttributeError: module 'anyflash' has no attribute 'missing'")


@pytest.mark.parametrize("name", [*SIGNATURES, "table"])
def test_examples_run(name: str) -> None:
    example = doctest.DocTestFinder(recurse=False).find(getattr(api, name), name)
    assert example
    for one in example:
        assert one.examples
        results = doctest.DocTestRunner().run(one)
        assert not results.failed
