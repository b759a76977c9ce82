"""The public names of the serving half, and their arguments."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields

import anyflash as af

POSITIONAL = {"q": inspect.Parameter.empty, "cache": inspect.Parameter.empty, "k": None, "v": None}
KEYWORDS = {
    "cu_seqlens_q": None,
    "cu_seqlens_k": None,
    "rotary": None,
    "rotary_interleaved": False,
    "rotary_positions": None,
    "layout": None,
    "causal": False,
    "window": None,
    "scale": None,
    "softcap": None,
    "score": None,
    "mask": None,
    "bias": None,
    "alibi_slopes": None,
    "sinks": None,
    "descale_q": None,
    "descale_k": None,
    "descale_v": None,
    "return_lse": False,
    "backend": None,
}


def test_signature() -> None:
    parameters = inspect.signature(af.attention_kvcache).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert positional == POSITIONAL
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == KEYWORDS


def test_cache_fields() -> None:
    assert [f.name for f in fields(af.KVCache)] == [
        "k", "v", "seqlens", "block_table", "leftpad", "batch_idx"
    ]  # fmt: skip


def test_imported_when_asked_for() -> None:
    code = (
        "import sys, anyflash; assert 'anyflash.kvcache' not in sys.modules; "
        "anyflash.attention_kvcache; assert anyflash.kvcache is sys.modules['anyflash.kvcache']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {"attention_kvcache", "KVCache", "kvcache"} <= set(dir(af)) & set(af.__all__)
