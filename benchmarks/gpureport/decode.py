"""Attention over a cache: right, at what part of a copy's speed, and captured in a graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import anyflash as af
from gpureport.place import Clock, Place

Keep = Callable[[str, Any], None]
PAGES = (None, 16, 64, 256)
KEYS = (8192, 131072, 32768, 16384, 65536)
# Keys of all sequences together: 2 GiB of keys and values in bfloat16, far more than L2.
TOTAL_KEYS = 2**19
KV_HEADS, DIM = 8, 128


@dataclass(frozen=True)
class Decoding:
    """Queries of each of `batch` sequences over `keys` keys; `page` None is a dense cache."""

    keys: int
    batch: int
    group: int
    page: int | None
    kv_heads: int = KV_HEADS
    dim: int = DIM
    backend: str = "triton"
    queries: int = 1
    causal: bool = False

    def __str__(self) -> str:
        where = "dense" if self.page is None else f"pages of {self.page}"
        where += f", {self.queries} queries" if self.queries > 1 else ""
        where += ", causal" if self.causal else ""
        on = "" if self.backend == "triton" else f", {self.backend}"
        return f"{self.batch} x {self.keys} keys, group {self.group}, {where}{on}"

    @property
    def bytes(self) -> int:
        """Of keys and values in bfloat16, each read once."""
        return 2 * 2 * self.keys * self.batch * self.kv_heads * self.dim


def made(case: Decoding, device: str, lengths: Any) -> tuple[Any, Any]:
    """Queries and a cache in which only slots below `lengths` hold numbers; the others hold NaN."""
    heads = case.group * case.kv_heads
    q = torch.randn(case.batch, case.queries, heads, case.dim, device=device).to(torch.bfloat16)
    page = case.page or case.keys
    pages = case.batch * -(-case.keys // page)
    k, v = (
        torch.randn(pages, page, case.kv_heads, case.dim, device=device, dtype=torch.bfloat16) for _ in "kv"
    )
    if case.page is None:
        table, slots = None, torch.arange(page, device=device)
        unused = slots[None] >= lengths[:, None]
    else:
        table = torch.randperm(pages, device=device).view(case.batch, -1).to(torch.int32)
        unused = torch.empty(pages, page, dtype=torch.bool, device=device)
        slots = torch.arange(table.shape[1] * page, device=device).view(-1, page)
        unused[table.long()] = slots[None] >= lengths[:, None, None]
    if bool(unused.any()):
        for array in (k, v):
            array[unused] = float("nan")
    return q, af.KVCache(k, v, lengths.to(torch.int32), table)


def run(case: Decoding, q: Any, cache: Any) -> Any:
    return af.attention_kvcache(q, cache, causal=case.causal, backend=case.backend)


def definition(case: Decoding, q: Any, cache: Any, lengths: Any, dtype: Any) -> Any:
    """(batch, queries, heads, dim), sequence by sequence; each has at least as many keys as queries."""
    rows = []
    for b in range(case.batch):
        n = int(lengths[b])
        if cache.block_table is None:
            k, v = cache.k[b, :n], cache.v[b, :n]
        else:
            k, v = (x[cache.block_table[b].long()].flatten(0, 1)[:n] for x in (cache.k, cache.v))
        k, v = (x.to(dtype).repeat_interleave(case.group, 1).transpose(0, 1) for x in (k, v))
        s = q[b].to(dtype).transpose(0, 1) @ k.transpose(1, 2) * case.dim**-0.5
        if case.causal:
            hidden = torch.ones_like(s, dtype=torch.bool).triu(n - case.queries + 1)
            s = s.masked_fill(hidden, float("-inf"))
        rows.append((s.softmax(-1) @ v).transpose(0, 1))
    return torch.stack(rows)


def correct_cases(place: Place, backends: tuple[str, ...]) -> Iterator[Decoding]:
    if place.dry:
        for backend in backends:
            keys, dim = (128, 64) if backend == "hopper" else (70, 16)
            yield Decoding(keys, 2, 2, None, 1, dim, backend)
            yield Decoding(keys, 2, 2, 16, 1, dim, backend)
            yield Decoding(210, 2, 2, 16, 1, dim, backend, 70, True)
        return
    for page in PAGES:
        for group in (1, 8):
            for keys in (333, 4096) if place.quick else (17, 333, 4096, 20000):
                for backend in backends:
                    yield Decoding(keys, 3, group, page, 2, backend=backend)
    # More than 64 rows, and other widths.
    for dim, group in ((64, 100), (128, 100), (96, 8), (192, 8), (256, 8)):
        for backend in backends:
            yield Decoding(4096, 3, group, 16, 2, dim, backend)
    # Many rows: prefill.
    for dim, page in ((128, None), (128, 16), (128, 64), (64, 48), (96, 16), (192, 16), (256, 256)):
        for causal in (False, True):
            for backend in backends:
                yield Decoding(2125, 3, 4, page, 2, dim, backend, 300, causal)


def correctness(place: Place, clock: Clock, part: str, keep: Keep, backends: tuple[str, ...]) -> None:
    """Against float64, error over that of the definition in bfloat16; a batch of one gives the same bits."""
    torch.manual_seed(0)
    for case in clock.while_time(part, correct_cases(place, backends), []):
        lengths = torch.tensor(
            [case.keys, max(1, case.keys // 3), case.keys - 5][: case.batch], device=place.device
        )
        q, cache = made(case, place.device, lengths)
        try:
            found = run(case, q, cache)
        except af.Unsupported as why:
            keep(str(case), {"declined": str(why)})
            continue
        wanted = definition(case, q, cache, lengths, torch.float64)
        plain = definition(case, q, cache, lengths, torch.bfloat16)
        error = (found.double() - wanted).square().mean().sqrt()
        least = torch.finfo(torch.bfloat16).eps * wanted.square().mean().sqrt() / 8
        ratio = float(error / (plain.double() - wanted).square().mean().sqrt().clamp_min(least))
        same = all(torch.equal(run(case, q, cache), found) for _ in range(3))
        table = cache.block_table
        alone = af.KVCache(
            cache.k if table is not None else cache.k[1:2],
            cache.v if table is not None else cache.v[1:2],
            cache.seqlens[1:2],
            None if table is None else table[1:2],
        )
        apart = torch.equal(run(case, q[1:2], alone)[0], found[1])
        keep(
            str(case),
            {"error over plain": ratio, "same bits": same, "same bits alone": apart,
             "right": ratio <= 2 and same and apart},
        )  # fmt: skip


def speed_cases(place: Place, backends: tuple[str, ...]) -> Iterator[Decoding]:
    if place.dry:
        for backend in backends:
            yield Decoding(40, 1, 2, 16, 1, 64 if backend == "hopper" else 16, backend)
        return
    for keys in KEYS[:2] if place.quick else KEYS:
        for group in (8, 1):
            for page in PAGES:
                for backend in backends:
                    yield Decoding(keys, max(1, TOTAL_KEYS // keys), group, page, backend=backend)


def speed(
    place: Place, clock: Clock, part: str, keep: Keep, backends: tuple[str, ...], copy: float | None
) -> None:
    """GB/s of keys and values, and what part of a copy's speed that is."""
    wanted = list(speed_cases(place, backends))
    for done, case in enumerate(clock.while_time(part, wanted, [])):
        lengths = torch.full((case.batch,), case.keys, device=place.device)
        q, cache = made(case, place.device, lengths)
        seconds = min(0.5, max(0.05, clock.left(part) / (len(wanted) - done) / 4))
        calls: dict[str, Callable[[], object]] = {"ours": lambda c=case, x=q, y=cache: run(c, x, y)}
        ms = place.milliseconds(calls, seconds)["ours"]
        rate = case.bytes / ms / 1e6
        keep(str(case), {"milliseconds": ms, "GB/s": rate, "of copy": rate / copy if copy else None})
        del q, cache
        place.forget()


def graphs(place: Place, keep: Keep, backends: tuple[str, ...]) -> None:
    """One step recorded, then run with another query and other lengths: as the call itself, bit for bit."""
    for page, backend in ((page, backend) for backend in backends for page in (None, 16)):
        case = Decoding(5000, 2, 2, page, 4, 128, backend)
        if place.dry:
            keys, dim = (128, 64) if backend == "hopper" else (70, 16)
            case = Decoding(keys, 2, 2, page, 1, dim, backend)
        lengths = torch.tensor([case.keys, case.keys - 20], device=place.device)
        q, cache = made(case, place.device, lengths)
        replay, out = recorded(place, lambda c=case, x=q, y=cache: run(c, x, y))
        record: dict[str, Any] = {}
        for name, shorter in (("same lengths", 0), ("other lengths", 31)):
            q.copy_(torch.randn_like(q))
            cache.seqlens.sub_(shorter)
            replay()
            place.wait()
            record[name] = torch.equal(out() if callable(out) else out, run(case, q, cache))
        record["right"] = all(record.values())
        keep(str(case), record)
    shape = (1, 20, 1, 16) if place.dry else (2, 100, 2, 64)
    x = [torch.randn(shape, device=place.device).to(torch.bfloat16) for _ in range(3)]
    call = lambda: af.attention(*x, causal=True, backend="triton")
    replay, out = recorded(place, call)
    x[0].copy_(torch.randn_like(x[0]))
    replay()
    place.wait()
    keep("attention, causal", {"right": torch.equal(out() if callable(out) else out, call())})


def recorded(place: Place, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """What runs the recorded call again, and its result, which that overwrites."""
    if place.dry:
        kept = [call()]

        def again() -> None:
            kept[0] = call()

        return again, lambda: kept[0]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out
