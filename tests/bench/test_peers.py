"""Every peer that is here computes every cell that it does not lack; the others are shown with the reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch._dynamo.utils

from anyflash.bench import inputs, measure
from anyflash.bench.cells import Cell
from anyflash.bench.inputs import Inputs
from anyflash.bench.peers import registry
from anyflash.bench.peers.base import Peer, Step
from anyflash.bench.variants import VARIANTS
from bench import tiny

PEERS = {peer.name: peer for peer in registry.peers()}
# Each cell of it compiles for seconds.
SLOW = {"torch flex"}
CELLS = [
    *(tiny.cell(variant, backward=backward) for variant in VARIANTS for backward in (False, True)),
    *(
        tiny.cell("causal", dtype, backward)
        for dtype in ("bfloat16", "float16")
        for backward in (False, True)
    ),
    tiny.cell("causal", heads_kv=2),
    tiny.cell("full", heads_kv=1, seqlen_q=1, seqlen_k=300),
    tiny.cell("window", batch=1, heads=1, seqlen_q=520),
    *(
        tiny.cell("causal", dtype, heads_kv=2, seqlen_q=queries, seqlen_k=80, cache="dense")
        for dtype in ("float32", "bfloat16")
        for queries in (1, 3)
    ),
    *(Cell("tiny", 3, 4, 40, 16, "float32", "causal", b, lengths=(40, 1, 17)) for b in (False, True)),
]


def _here(name: str) -> Peer:
    peer = PEERS[name]
    if registry.version(peer.package) is None:
        pytest.skip(f"{peer.package} is not installed")
    return peer


def _admit(peer: Peer, cell: Cell) -> dict[str, Any]:
    made = inputs.make(cell)
    entry, way = measure._admit(peer, [made], measure._Gate(made))
    assert (way is not None) == (entry["status"] == "timed")
    return entry


@pytest.mark.parametrize(
    ("name", "cell"),
    [
        pytest.param(name, cell, id=f"{name}: {cell.name}")
        for name, peer in PEERS.items()
        for cell in CELLS
        if name not in SLOW and peer.lacks(cell) is None
    ],
)
def test_computes_what_it_does_not_lack(name: str, cell: Cell) -> None:
    entry = _admit(_here(name), cell)
    assert entry["status"] == "timed", entry["why"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", ["full", "window", "documents", "alibi", "softcap", "function", "evoformer"]
)
def test_flex_computes(variant: str) -> None:
    assert _admit(_here("torch flex"), tiny.cell(variant))["status"] == "timed"


@pytest.mark.slow
def test_flex_computes_packed_sequences() -> None:
    packed = Cell("tiny", 3, 4, 40, 16, "float32", "causal", lengths=(40, 1, 17))
    assert _admit(_here("torch flex"), packed)["status"] == "timed"


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_somebody_computes_every_variant(variant: str, backward: bool) -> None:
    """Else its cells would have no ratio."""
    cell = tiny.cell(variant, backward=backward)
    assert [name for name, peer in PEERS.items() if peer.package == "torch" and peer.lacks(cell) is None]


@dataclass
class Stub:
    """A peer made for a test."""

    name: str = "stub"
    family: str = "stub"
    package: str = "torch"
    reason: str | None = None

    def lacks(self, cell: Cell) -> str | None:
        return self.reason

    def prepare(self, inputs: Inputs) -> Step:
        raise KeyError("out of order")


@pytest.mark.parametrize(
    ("stub", "status", "why"),
    [
        (Stub(package="no-such-distribution"), "missing", "no-such-distribution is not installed"),
        (Stub(reason="no masks"), "lacks", "no masks"),
        (Stub(), "failed", "KeyError: 'out of order'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_why_a_peer_takes_no_part(stub: Stub, status: str, why: str) -> None:
    entry = _admit(stub, tiny.cell())
    assert (entry["status"], entry["why"]) == (status, why)


def test_a_peer_that_computes_something_else_is_not_timed() -> None:
    class Forgetful(Stub):
        def prepare(self, inputs: Inputs) -> Step:
            return PEERS["torch flash"].prepare(replace(inputs, variant=VARIANTS["full"]))

    entry = _admit(Forgetful(), tiny.cell("causal"))
    assert entry["status"] == "disagrees"
    assert entry["why"].startswith("out: ")


def test_names_are_unique() -> None:
    assert len(PEERS) == len(registry.peers())


@pytest.mark.slow
def test_flex_compiles_once_for_all_copies() -> None:
    """Compiled once for each, it would soon run uncompiled."""
    counters = torch._dynamo.utils.counters
    counters.clear()
    cell = tiny.cell(heads_kv=2, seqlen_q=1, seqlen_k=200, measure="memory")
    made = [inputs.make(cell, seed) for seed in range(12)]
    _, way = measure._admit(_here("torch flex"), made, measure._Gate(made[0]))
    assert way is not None
    with way.context():
        for call in way.calls:
            call()
    assert counters["stats"]["unique_graphs"] == 1
