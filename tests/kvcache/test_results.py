"""Every case in every form of a cache, on every backend: results within the contract's bounds, and the cache
afterwards as it was but for the new keys."""

from __future__ import annotations

import numpy as np
import pytest

from anyflash.contract.backends import present
from anyflash.contract.run import assess, known
from anyflash.core.errors import Unsupported
from kvcache.cases import CASES, EIGHT_BITS, NARROW
from kvcache.laying import FORMS, lay_out


def new_lens(case, new):
    """None to read only; else as many new keys as queries, or all keys."""
    packed = case.packed
    if new == "none":
        return None
    return packed.lens_k if new == "all" else tuple(map(min, packed.lens_q, packed.lens_k))


PARAMETERS = [
    pytest.param(
        case, form, ("none", "queries", "all")[(i + j) % 3], backend, id=f"{backend}-{case.id}-{form.id}"
    )
    for backend in present()
    for i, case in enumerate((*CASES, *NARROW, *EIGHT_BITS))
    for j, form in enumerate(FORMS if case in CASES[:1] or backend != "reference" else FORMS[i % 3 :: 3])
]


@pytest.mark.parametrize(("case", "form", "new", "backend"), PARAMETERS)
def test_results(case, form, new, backend):
    values, truth = known(case)
    laid = lay_out(case, values, form, new_lens(case, new))
    try:
        out, lse = laid.run(backend)
    except Unsupported as why:
        pytest.skip(str(why))
    verdicts = assess(case, laid.canonical(out, lse), truth, ("forward",))
    assert not [v.complaint for v in verdicts if v.complaint]
    for found, expected in ((laid.cache["k"], laid.after_k), (laid.cache["v"], laid.after_v)):
        assert found.tobytes() == expected.tobytes()


def test_rows_behind_the_last_sequence():
    """Packed queries may have rows of no sequence: out 0 and lse -inf."""
    case = next(case for case in CASES if case.id == "chunks")
    values, _ = known(case)
    for backend in present():
        laid = lay_out(case, values, FORMS[0])
        laid.q = np.concatenate([laid.q, np.full_like(laid.q[:3], np.nan)])
        try:
            out, lse = laid.run(backend)
        except Unsupported:
            continue
        assert (out[-3:] == 0).all()
        assert (lse[:, -3:] == -np.inf).all()
        assert np.isfinite(out[:-3]).all()
