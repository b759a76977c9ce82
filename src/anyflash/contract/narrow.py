"""Cases in 8-bit floats, forward only: with and without factors, which stand beside all else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from anyflash.contract.cases import Case, Packed
from anyflash.contract.poison import Layout
from anyflash.contract.rules import MASKS, Causal, Window
from anyflash.contract.terms import SCORES, Alibi, Biases, Softcap
from anyflash.core.dtypes import FLOATS8

_PACKED = Packed((17, 0, 64, 3), (17, 21, 90, 0), slack_q=5, slack_k=9)


def _families() -> Iterator[Case]:
    yield Case("eight_bits")
    yield Case("eight_numbers", descale="numbers", rules=(Causal(),), heads=(4, 2))
    yield Case("eight_arrays", descale="arrays", heads=(6, 2), dims=(40, 24), lens=(50, 70), sinks="randn")
    yield Case("eight_mixed", descale="mixed", rules=(Causal(),), lens=(70, 70), dims=(64, 64))
    yield Case(
        "eight_everything",
        descale="arrays",
        terms=(SCORES["relative"], Softcap(4.0), Alibi(), Biases(("qk",))),
        rules=(Window(30, 5),),
        heads=(4, 2),
        dropout_p=0.2,
    )
    yield Case("eight_softcap_alibi", descale="mixed", terms=(Softcap(3.0), Alibi()), rules=(Causal(),))
    yield Case("eight_packed", descale="arrays", packed=_PACKED, rules=(Causal(),), heads=(4, 2))
    yield Case("eight_many_blocks", descale="arrays", lens=(260, 200), dims=(64, 80), heads=(2, 2), batch=1)
    yield Case("eight_one_query", descale="arrays", lens=(1, 300), heads=(8, 2), dims=(64, 64))
    yield Case("eight_no_key", descale="numbers", rules=(MASKS["few_rows"],))
    yield Case("eight_large", data="large", descale="numbers")
    yield Case("eight_empty", lens=(5, 0), descale="arrays")
    yield Case(
        "eight_layout",
        descale="arrays",
        lens=(19, 70),
        dims=(9, 12),
        rules=(Causal(),),
        layouts=(
            Layout((2, 0, 3, 1), gap=4, step=2, reverse=(1,), shift=3),
            Layout((3, 1, 0, 2), gap=1, reverse=(3,)),
            Layout((0, 2, 1, 3), gap=9, shift=1),
        ),
    )


def eight_bits() -> list[Case]:
    """Every case in both dtypes."""
    return [replace(case, dtype=dtype) for case in _families() for dtype in FLOATS8]
