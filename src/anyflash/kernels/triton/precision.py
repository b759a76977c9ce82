"""How float32 is multiplied: as it is ("ieee"), or with factors rounded to tf32 (10 bits of fraction).

ANYFLASH_FLOAT32 decides where it is set, else torch's own setting for matrix products, by whichever of its
names that was set (`allow_tf32`, `fp32_precision`, `set_float32_matmul_precision`). A device without tf32
multiplies float32 as it is, and so are heads wider than WIDEST: with tf32 their backward would keep
thousands of bytes a thread out of registers, and leave the shared memory of most devices. Sums, and
everything between the products, are float32 in any case.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from anyflash.core import settings

Products = Literal["ieee", "tf32"]
# AMD has tf32 on this architecture alone; Triton refuses it elsewhere.
_AMD_TF32 = ("gfx942",)
# Columns of a head, as tiles hold it.
WIDEST = 256


class Chosen(NamedTuple):
    """`products` reaches the kernel; `why` is for `explain`."""

    products: Products
    why: str


def float32_products(arch: str, width: int) -> Chosen:
    """What a float32 call with heads of `width` columns does on a device of architecture `arch`."""
    wanted, by = settings.float32_products(), "ANYFLASH_FLOAT32"
    if wanted is None:
        wanted, by = _of_torch(), "torch.backends.cuda.matmul.fp32_precision"
    if wanted == "tf32" and arch.startswith("gfx") and arch not in _AMD_TF32:
        return Chosen("ieee", f"{arch} has no tf32")
    if wanted == "tf32" and width > WIDEST:
        return Chosen("ieee", f"tf32 serves heads of up to {WIDEST} columns")
    return Chosen(wanted, f"by {by}")


def _of_torch() -> Products:
    import torch

    # Reading `allow_tf32` raises once a program has used the newer name; this one knows what either has set.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
