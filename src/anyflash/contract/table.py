"""The cases that every backend must pass, listed by what they are about."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import permutations, product

from anyflash.contract.cases import Case, Packed, each_dtype
from anyflash.contract.narrow import eight_bits
from anyflash.contract.poison import Layout
from anyflash.contract.rules import MASKS, Causal, Dense, Window
from anyflash.contract.terms import SCORES, Alibi, Biases, Softcap

HALVES = ("float16", "bfloat16")

CORE = (
    Case("plain"),
    Case("causal", rules=(Causal(),), lens=(70, 70)),
    Case("gqa_causal", rules=(Causal(),), heads=(6, 2), dims=(32, 32), lens=(65, 130)),
    Case("window", rules=(Window(9, 4),), lens=(90, 75)),
    Case("head_dim_64", dims=(64, 64), lens=(100, 100)),
    Case("head_dim_128", dims=(128, 128), lens=(50, 129), rules=(Causal(),)),
    Case("odd_dims", dims=(37, 21), lens=(45, 67)),
    Case("one_query", lens=(1, 300), heads=(4, 1), dims=(64, 64)),
    Case("softcap", terms=(Softcap(2.0),), rules=(Causal(),)),
    Case("alibi", terms=(Alibi(),), rules=(Causal(),), heads=(4, 2)),
    Case("bias", terms=(Biases(("hqk",)),)),
    Case("sinks", sinks="randn", rules=(Causal(),), heads=(4, 2)),
    Case("dropout", dropout_p=0.3, rules=(Causal(),)),
    Case("documents", rules=(MASKS["documents_by_batch"],), lens=(80, 80)),
    Case("varlen", packed=Packed((5, 0, 33, 64, 1), (9, 3, 33, 0, 70)), rules=(Causal(),), heads=(4, 2)),
    Case("integers", data="integers", dims=(32, 32), rules=(Causal(),)),
    Case("large", data="large"),
    Case("constant", data="constant"),
)

DIMS = (
    (1, 1), (2, 3), (5, 7), (8, 8), (17, 16), (24, 40), (40, 40), (63, 65), (72, 96), (80, 80), (111, 59),
    (160, 160), (192, 128), (256, 256), (320, 1), (3, 513), (576, 512), (576, 576),
)  # fmt: skip
LENS = (
    (1, 1), (1, 17), (17, 1), (2, 3), (7, 8), (8, 7), (9, 200), (200, 9), (16, 16), (31, 33), (47, 48),
    (48, 47), (49, 97), (63, 64), (64, 65), (95, 96), (97, 95), (113, 203), (128, 128), (129, 257),
    (257, 129), (1, 1025), (1025, 1),
)  # fmt: skip
EMPTY = ((0, 5), (5, 0), (0, 0))
HEADS = ((1, 1), (3, 3), (4, 1), (5, 1), (6, 2), (6, 3), (12, 4), (16, 2))
WINDOWS = (
    (0, 0),
    (0, None),
    (None, 0),
    (3, None),
    (None, 3),
    (5, 0),
    (0, 5),
    (16, 16),
    (1000, 1000),
    (2, 40),
)
BIASES = tuple(
    "".join(axis for axis, on in zip("bhqk", bits, strict=True) if on) for bits in product((0, 1), repeat=4)
)


def _geometry() -> Iterator[Case]:
    for dim, dim_v in DIMS:
        yield Case(f"dims_{dim}_{dim_v}", dims=(dim, dim_v), batch=1, lens=(35, 52))
    for q, k in LENS:
        yield Case(f"lens_{q}_{k}", lens=(q, k))
        yield Case(f"lens_{q}_{k}_causal", lens=(q, k), rules=(Causal(),))
    for q, k in EMPTY:
        yield Case(f"empty_{q}_{k}", lens=(q, k), rules=(Causal(),), sinks="randn" if q > k else None)
    yield Case("empty_batch", batch=0)
    for q, k in HEADS:
        yield Case(f"heads_{q}_{k}", heads=(q, k), lens=(40, 30))
    for scale in (0.0, 1.0, -0.7, 3.0):
        yield Case(f"scale_{scale}", scale=scale)
    yield Case("batch_7", batch=7, lens=(20, 20))


def _masks() -> Iterator[Case]:
    for left, right in WINDOWS:
        yield Case(f"window_{left}_{right}", rules=(Window(left, right),), lens=(60, 51))
    yield Case("window_causal", rules=(Causal(), Window(7, 30)), lens=(51, 60))
    for name, mask in MASKS.items():
        yield Case(f"mask_{name}", rules=(mask,), lens=(57, 57), heads=(4, 2))
        yield Case(f"mask_{name}_more_keys", rules=(mask,), lens=(20, 75))
    for pattern in BIASES:
        yield Case(f"dense_{pattern or 'scalar'}", rules=(Dense(pattern),))
    yield Case("dense_sparse", rules=(Dense("bhqk", 0.03),), lens=(70, 70))
    yield Case("dense_causal", rules=(Dense("bk", 0.7), Causal()))
    yield Case("two_masks", rules=(MASKS["dilated"], MASKS["by_head"], Window(20, None)), lens=(80, 80))


def _scores() -> Iterator[Case]:
    for pattern in BIASES:
        yield Case(f"bias_{pattern or 'scalar'}", terms=(Biases((pattern,)),))
    yield Case("bias_fewer_axes", terms=(Biases(("qk", "k", "hqk"), fewer_axes=True),))
    yield Case("bias_two_evoformer", terms=(Biases(("bk", "hqk")),), heads=(4, 4), batch=3)
    yield Case("bias_three", terms=(Biases(("bhq", "hk", "bqk")),), rules=(Causal(),), heads=(4, 2))
    yield Case("bias_decode", terms=(Biases(("hk",)),), lens=(1, 130), heads=(4, 2))
    yield Case("alibi_per_batch", terms=(Alibi(per_batch=True),), lens=(50, 30))
    yield Case("alibi_softcap_bias", terms=(Softcap(3.0), Alibi(), Biases(("hk",))), rules=(Causal(),))
    for name, score in SCORES.items():
        yield Case(f"score_{name}", terms=(score,), heads=(4, 2))
        yield Case(f"score_{name}_causal", terms=(score,), rules=(Causal(),), lens=(60, 60))
    yield Case("score_then_all", terms=(SCORES["relative"], Softcap(4.0), Alibi(), Biases(("b", "qk"))),
               rules=(Window(12, 3),), sinks="randn", dropout_p=0.1)  # fmt: skip
    for sinks in ("randn", "large", "none"):
        yield Case(f"sinks_{sinks}", sinks=sinks)
        yield Case(f"sinks_{sinks}_no_key", sinks=sinks, rules=(MASKS["few_rows"],))
    for p in (0.1, 0.5, 0.9):
        yield Case(f"dropout_{p}", dropout_p=p, heads=(4, 2), lens=(40, 70))
    yield Case("dropout_bias", dropout_p=0.2, terms=(Biases(("bhqk",)),))
    yield Case(
        "tables_float32",
        terms=(SCORES["two_tables"], Biases(("hqk",))),
        dtype="bfloat16",
        table_dtype="float32",
    )
    yield Case("tables_bfloat16", terms=(SCORES["two_tables"], Biases(("hqk",))), table_dtype="bfloat16")


def _packed() -> Iterator[Case]:
    lengths = Packed((17, 0, 64, 3, 50), (17, 21, 30, 0, 90))
    spare = Packed((17, 40, 3), (30, 40, 64), used_k=(12, 0, 64), slack_q=9, slack_k=33)
    for name, packed in (("lengths", lengths), ("spare", spare)):
        yield Case(f"packed_{name}", packed=packed)
        yield Case(f"packed_{name}_causal", packed=packed, rules=(Causal(),), heads=(4, 2))
        yield Case(f"packed_{name}_window", packed=packed, rules=(Window(6, 2),))
        yield Case(f"packed_{name}_alibi", packed=packed, terms=(Alibi(per_batch=True),), rules=(Causal(),))
        yield Case(f"packed_{name}_documents", packed=packed, rules=(MASKS["documents_by_batch"],))
        yield Case(f"packed_{name}_score", packed=packed, terms=(SCORES["distance"],))
        yield Case(f"packed_{name}_sinks", packed=packed, sinks="randn", rules=(Causal(),))
        yield Case(f"packed_{name}_dropout", packed=packed, dropout_p=0.4)
    yield Case("packed_all_empty", packed=Packed((0, 0), (0, 0)))
    yield Case("packed_no_sequence", packed=Packed((), ()))
    yield Case("packed_no_keys", packed=Packed((4, 3), (0, 0)))
    yield Case("packed_many", packed=Packed((1,) * 200, (9,) * 200), heads=(4, 1))


def layouts() -> Iterator[tuple[str, tuple[Layout, ...]]]:
    """Named arrangements of q, k, v and the results."""
    for order in permutations(range(4)):
        yield "order_" + "".join(map(str, order)), (Layout(order=order),)
    for shift in range(1, 16):
        yield (
            f"shift_{shift}",
            (Layout(shift=shift), Layout(shift=15 - shift), Layout(shift=3), Layout(shift=shift)),
        )
    yield "gaps", (Layout(gap=3), Layout(gap=5), Layout(gap=1), Layout(gap=7))
    yield "steps", (Layout(step=2), Layout(step=3, gap=1), Layout(step=2), Layout(step=3))
    for axis in range(4):
        yield f"reverse_{axis}", (Layout(reverse=(axis,)),)
        yield f"expand_{axis}", (Layout(expand=(axis,)),)
    yield "reverse_all", (Layout(reverse=(0, 1, 2, 3), gap=2),)
    yield "expand_all", (Layout(expand=(0, 1, 2, 3)),)
    yield (
        "mixed",
        (
            Layout((2, 0, 3, 1), gap=4, step=2, reverse=(1,), shift=6),
            Layout((3, 1, 0, 2), gap=1, reverse=(3,), expand=(0,)),
            Layout((0, 2, 1, 3), gap=9, reverse=(0, 2), junk=True, shift=1),
            Layout((1, 0, 2, 3), gap=3, step=2, reverse=(3,)),
        ),
    )


def _layouts() -> Iterator[Case]:
    for name, chosen in layouts():
        yield Case(f"layout_{name}", layouts=chosen, lens=(19, 27), dims=(9, 12), rules=(Causal(),))
    junk = (Layout(junk=True),)
    yield Case("layout_junk_batch", layouts=junk, batch=1)
    yield Case("layout_junk_heads", layouts=junk, heads=(1, 1), dims=(1, 1))
    yield Case("layout_junk_tokens", layouts=junk, lens=(1, 1), batch=1)
    yield Case("layout_wide", layouts=(Layout((0, 2, 1, 3), gap=24),), dims=(64, 64), lens=(70, 70))
    yield Case("layout_columns", layouts=(Layout((0, 2, 3, 1)),), dims=(64, 64), lens=(70, 70))
    packed = Packed((17, 0, 33), (20, 5, 33))
    yield Case("layout_packed_heads_first", layouts=(Layout((0, 2, 1, 3)),), packed=packed, rules=(Causal(),))
    yield Case(
        "layout_packed_mixed",
        layouts=(Layout((3, 1, 0, 2), gap=4, step=2, reverse=(1,), shift=2),),
        packed=packed,
    )
    strided = Layout(gap=3, step=2, shift=3, reverse=(0,))
    yield Case(
        "layout_tables",
        terms=(Biases(("bhqk", "k")), Alibi()),
        rules=(MASKS["documents"],),
        table_layout=strided,
    )


@lru_cache(maxsize=1)
def table() -> tuple[Case, ...]:
    """Every case: the core in all dtypes, the rest in float32 and a changing second dtype where it adds
    something."""
    cases = each_dtype(CORE)
    others = ("float64", "bfloat16", "float16")
    for family in (_geometry, _masks, _scores, _packed, _layouts):
        for i, case in enumerate(family()):
            if case.dtype != "float32":
                cases.append(case)
                continue
            cases.append(case)
            if i % 3 == 0:
                cases.append(replace(case, dtype=others[i // 3 % 3]))
    cases += eight_bits()
    return tuple(
        replace(case, id=(name := f"{case.dtype}-{case.id}"), data_seed=zlib.crc32(name.encode()))
        for case in cases
    )


def by_id(name: str) -> Case:
    """Raises KeyError for an unknown id."""
    return {case.id: case for case in table()}[name]
