"""Calls over a cache, as packed cases of the contract."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import anyflash as af
from anyflash.contract.cases import Case, Packed
from anyflash.contract.rules import MASKS, Causal, Dense, Window
from anyflash.contract.terms import SCORES, Alibi, Biases, Softcap


class Tree:
    """Speculated tokens: the queries are nodes of a tree, one for each sequence."""

    def __repr__(self) -> str:
        return "Tree()"

    def shapes(self, sizes):
        return {"ancestors": (sizes.batch, sizes.q_len, sizes.q_len)}

    def fill(self, name, shape, rng):
        return np.tril(rng.random(shape) < 0.4) | np.eye(shape[-1], dtype=bool)

    def arguments(self, table):
        return {"mask": af.masks.tree(table("ancestors"))}

    def allowed(self, place, arrays):
        first = place.k_len - place.q_len
        node = np.clip(place.k - first, 0, None)
        return (place.k < first) | arrays["ancestors"][place.batch][place.row, node]


DECODE = Packed((1,) * 5, (1, 9, 300, 64, 17))
SPECULATIVE = Packed((4,) * 3, (33, 4, 130))
CHUNKS = Packed((37, 5, 1, 64), (37, 70, 200, 64))
LONG = Packed((1, 1), (3000, 1024))

CASES = (
    Case("decode", packed=DECODE, heads=(4, 2), dims=(64, 64), rules=(Causal(),)),
    Case("decode_not_causal", packed=DECODE, heads=(8, 1), dims=(32, 32)),
    Case("decode_odd_dims", packed=DECODE, heads=(3, 3), dims=(37, 21)),
    Case("decode_long", packed=LONG, heads=(4, 2), dims=(16, 16), rules=(Causal(),)),
    Case("decode_latent", packed=DECODE, heads=(4, 1), dims=(96, 64), rules=(Causal(),)),
    Case("decode_many_heads", packed=DECODE, heads=(33, 1), dims=(40, 24), rules=(Causal(),), sinks="randn"),
    Case("decode_more_heads", packed=DECODE, heads=(128, 1), rules=(Causal(),)),
    Case("decode_window", packed=DECODE, heads=(4, 2), rules=(Window(20, 0),)),
    Case("decode_softcap", packed=DECODE, heads=(4, 2), terms=(Softcap(2.0),)),
    Case("decode_alibi", packed=DECODE, heads=(4, 2), terms=(Alibi(per_batch=True),)),
    Case("decode_sinks", packed=DECODE, heads=(4, 2), sinks="randn"),
    Case("decode_bias", packed=DECODE, heads=(4, 2), terms=(Biases(("bk", "h")),)),
    Case("decode_mask", packed=DECODE, heads=(4, 2), rules=(Dense("bk", 0.6),)),
    Case("decode_score", packed=DECODE, heads=(4, 2), terms=(SCORES["two_tables"],)),
    Case("decode_scale", packed=DECODE, heads=(2, 2), scale=0.5),
    Case("speculative", packed=SPECULATIVE, heads=(4, 2), rules=(Causal(),)),
    Case("speculative_window", packed=SPECULATIVE, heads=(4, 2), rules=(Causal(), Window(9, None))),
    Case("speculative_tree", packed=SPECULATIVE, heads=(4, 2), rules=(Tree(),)),  # type: ignore[arg-type]
    Case("speculative_group", packed=Packed((8,) * 2, (90, 1100)), heads=(16, 2), rules=(Tree(),)),  # type: ignore[arg-type]
    Case("speculative_wide", packed=Packed((9,) * 2, (50, 9)), heads=(8, 2), rules=(Causal(),)),
    Case("chunks", packed=CHUNKS, heads=(4, 2), rules=(Causal(),)),
    Case("chunks_window", packed=CHUNKS, heads=(4, 2), rules=(Causal(), Window(16, None)), sinks="randn"),
    Case("chunks_documents", packed=CHUNKS, rules=(MASKS["documents_by_batch"],)),
    Case("chunks_bias", packed=CHUNKS, terms=(Biases(("bhqk", "qk")), Alibi()), rules=(Causal(),)),
    Case("chunks_score", packed=CHUNKS, terms=(SCORES["relative"], Softcap(3.0)), rules=(Causal(),)),
    Case("empty", packed=Packed((2, 0, 1, 3), (0, 5, 0, 3)), heads=(2, 1), rules=(Causal(),)),
    Case("empty_sinks", packed=Packed((1, 1), (0, 3)), heads=(2, 1), sinks="randn"),
    Case("more_queries", packed=Packed((7, 7), (3, 12)), rules=(Causal(),)),
)
NARROW = tuple(
    replace(case, id=f"{case.id}_{dtype}", dtype=dtype)
    for case in CASES
    if case.id in ("decode", "decode_alibi", "speculative_tree", "chunks_window")
    for dtype in ("float16", "bfloat16", "float64")
)


def _eight_bits(dtype: str, cached: str) -> list[Case]:
    """Factors that each sequence has for itself, that all share, and that are numbers; beside all else."""
    factors = {
        "decode": "arrays",
        "decode_alibi": "mixed",
        "speculative_tree": "numbers",
        "chunks_window": "arrays",
    }
    return [
        replace(
            case,
            id=f"{case.id}_{dtype}_{cached}",
            dtype=dtype,
            dtype_cache=None if dtype == cached else cached,
            descale=factors[case.id],
        )
        for case in CASES
        if case.id in factors
    ]


EIGHT_BITS = tuple(
    case
    for dtype, cached in (
        ("float8_e4m3fn", "float8_e4m3fn"),
        ("float8_e5m2", "float8_e5m2"),
        ("bfloat16", "float8_e4m3fn"),
        ("float16", "float8_e5m2"),
        ("float32", "float8_e4m3fn"),
    )
    for case in _eight_bits(dtype, cached)
)
