"""A forward in 8-bit floats, with factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import anyflash as af
from gpureport.place import Place

# Runs of one case, whose results must not differ by a bit.
REPEATS = 20


def eight(place: Place, keep: Callable[[str, Any], None], backends: tuple[str, ...]) -> None:
    """By backend: error from float64 of the numbers as they are in 8 bits, over few keys and over so many
    that a running sum of fewer bits than float32 would show, and speed at 8192 keys."""
    for backend in backends:
        rows, heads = (40, 2) if place.dry else (1000, 4)
        lengths = ((rows, rows),) if place.dry else ((rows, rows), (300, 16384))
        for dim in (64,) if place.dry else (64, 128):
            for lens in lengths:
                for causal in (False, True):
                    name = f"{backend} {dim} {lens[0]} {lens[1]} {'causal' if causal else 'full'}"
                    keep(f"{name}, relative error", judged(place, backend, dim, lens, heads, causal))
        if place.dry:
            continue
        for causal in (False, True):
            q, k, v = (torch.randn(2, 8192, 16, 128, device="cuda").to(torch.float8_e4m3fn) for _ in range(3))
            call = lambda x=(q, k, v), c=causal, b=backend: af.attention(*x, causal=c, backend=b)
            ms = place.milliseconds({"ours": call}, 0.5)["ours"]
            flops = 4 * 8192**2 * 128 * 16 * 2 * (0.5 if causal else 1.0)
            name = f"{backend} 128 8192 {'causal' if causal else 'full'}"
            keep(name, {"milliseconds": ms, "TFLOP/s": flops / ms / 1e9})


def judged(
    place: Place, backend: str, dim: int, lens: tuple[int, int], heads: int, causal: bool
) -> dict[str, Any]:
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, rows, heads, dim, device=place.device).to(torch.float8_e4m3fn)
        for rows in (lens[0], lens[1], lens[1])
    )
    factors = [torch.rand(2, heads, device=place.device) + 0.5 for _ in range(3)]
    named = dict(zip(("descale_q", "descale_k", "descale_v"), factors, strict=True))
    call = lambda: af.attention(q, k, v, causal=causal, backend=backend, **named)
    out = call()
    same = all(torch.equal(out, call()) for _ in range(1 if place.dry else REPEATS))
    a, b, c = (
        (x.double() * f[:, None, :, None].double()).transpose(1, 2)
        for x, f in zip((q, k, v), factors, strict=True)
    )
    # The last row sees the last key.
    seen = torch.ones(lens, dtype=torch.bool, device=place.device).tril(lens[1] - lens[0]) if causal else None
    wanted = torch.nn.functional.scaled_dot_product_attention(a, b, c, attn_mask=seen).transpose(1, 2)
    off = float((out.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    # Probabilities and the result may each be rounded to 3 bits of fraction.
    return {"error": off, "right": same and off <= 2 * 2.0**-4, "the same every time": same}
