"""A forward in 8-bit floats, with factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import anyflash as af
from gpureport.place import Place


def eight(place: Place, keep: Callable[[str, Any], None]) -> None:
    """Error from float64 of the numbers as they are in 8 bits, and speed at 8192 keys."""
    torch.manual_seed(0)
    backend = "triton" if not place.dry else None
    rows, heads = (40, 2) if place.dry else (1000, 4)
    for causal in (False, True):
        q, k, v = (
            torch.randn(2, rows, heads, 64, device=place.device).to(torch.float8_e4m3fn) for _ in range(3)
        )
        factors = [torch.rand(2, heads, device=place.device) + 0.5 for _ in range(3)]
        names = ("descale_q", "descale_k", "descale_v")
        out = af.attention(q, k, v, causal=causal, backend=backend, **dict(zip(names, factors, strict=True)))
        a, b, c = (
            (x.double() * f[:, None, :, None].double()).transpose(1, 2)
            for x, f in zip((q, k, v), factors, strict=True)
        )
        wanted = torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=causal).transpose(1, 2)
        off = (out.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        # Probabilities and the result may each be rounded to 3 bits of fraction.
        right = float(off) <= 2 * 2.0**-4
        keep(f"{'causal' if causal else 'full'}, relative error", {"error": float(off), "right": right})
    if place.dry:
        return
    for causal in (False, True):
        q, k, v = (torch.randn(2, 8192, 16, 128, device="cuda").to(torch.float8_e4m3fn) for _ in range(3))
        call = lambda x=(q, k, v), c=causal: af.attention(*x, causal=c, backend=backend)
        ms = place.milliseconds({"ours": call}, 0.5)["ours"]
        flops = 4 * 8192**2 * 128 * 16 * 2 * (0.5 if causal else 1.0)
        keep(f"128 8192 {'causal' if causal else 'full'}", {"milliseconds": ms, "TFLOP/s": flops / ms / 1e9})
