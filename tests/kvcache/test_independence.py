"""A sequence's result is the same bits whatever else is in the batch, wherever its pages lie, and whether its
queries come packed or not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from anyflash.contract.backends import present
from anyflash.contract.cases import Case, Packed
from anyflash.contract.rules import Causal, Window
from anyflash.contract.run import known
from anyflash.contract.terms import SCORES, Alibi, Softcap
from anyflash.core.errors import Unsupported
from kvcache.laying import FORMS, Form, lay_out

# Lengths on both sides of every border of a kernel: few and many queries, one and several splits of keys.
MIXED = Packed((1, 4, 70, 1, 9, 0, 1, 3), (1300, 70, 200, 5, 9, 40, 2050, 0))
ALIKE = Packed((1,) * 6, (1, 64, 65, 900, 1025, 17))
CASES = (
    Case("mixed", packed=MIXED, heads=(4, 2), dims=(32, 32), rules=(Causal(),)),
    Case("mixed_window", packed=MIXED, heads=(4, 1), rules=(Causal(), Window(30, None)), sinks="randn"),
    Case("mixed_program", packed=MIXED, heads=(2, 2), terms=(SCORES["distance"], Softcap(5.0), Alibi())),
    Case("decode", packed=ALIKE, heads=(4, 2), dims=(64, 64)),
)
DTYPES = ("float32", "bfloat16", "float16")
PARAMETERS = [
    pytest.param(replace(case, dtype=dtype), backend, id=f"{backend}-{case.id}-{dtype}")
    for backend in present()
    for case in CASES
    for dtype in (DTYPES if backend != "reference" else DTYPES[:1])
]
PARAMETERS += [
    pytest.param(
        replace(CASES[i], dtype=dtype, dtype_cache="float8_e4m3fn", descale="arrays"),
        "cpu",
        id=f"cpu-{CASES[i].id}-{dtype}-float8",
    )
    for i, dtype in ((0, "bfloat16"), (3, "bfloat16"), (3, "float32"))
]


def each(case: Case, values, backend: str, form: Form, pick: tuple[int, ...], seed: int) -> dict[int, bytes]:
    """out and lse of each sequence of a call over those in `pick`."""
    assert case.packed is not None
    new = tuple(map(min, case.packed.lens_q, case.packed.lens_k))
    laid = lay_out(case, values, form, new, pick, seed)
    try:
        out, lse = laid.run(backend)
    except Unsupported as why:
        pytest.skip(str(why))
    found = laid.canonical(out, lse)
    ends = np.cumsum([0, *[case.packed.lens_q[i] for i in pick]])
    return {
        sequence: found["out"][ends[i] : ends[i + 1]].tobytes()
        + np.ascontiguousarray(found["lse"][:, ends[i] : ends[i + 1]]).tobytes()
        for i, sequence in enumerate(pick)
    }


@pytest.mark.parametrize(("case", "backend"), PARAMETERS)
def test_batch_does_not_matter(case, backend):
    values, _ = known(case)
    everyone = tuple(range(len(case.packed.lens_q)))
    dense, small, large = (
        next(f for f in FORMS if f.id == name) for name in ("dense", "pages_of_3", "pages_of_256")
    )
    whole = each(case, values, backend, small, everyone, seed=0)
    # numpy's matrix product depends on strides, so the reference is held to the same form alone.
    forms = [small] if backend == "reference" else [small, large, dense]
    batches = [(i,) for i in everyone] + [everyone[::-1], everyone[::2], everyone[1:4]]
    for seed, form in enumerate(forms, 1):
        for pick in batches:
            # Terms and masks may say `batch`, which is another one here: these cases do not.
            for sequence, bits in each(case, values, backend, form, pick, seed).items():
                assert bits == whole[sequence], (form.id, pick, sequence)
