"""`anyflash explain`: what a call of given shapes would do on this machine."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer

from anyflash.cli._options import Causal, Json, Keys, Queries, Window, window


def command(
    q: Queries = 2048,
    k: Keys = None,
    batch: Annotated[int, typer.Option("--batch", min=0, help="Batch entries.")] = 1,
    heads: Annotated[int, typer.Option("--heads", min=1, help="Query heads.")] = 8,
    heads_kv: Annotated[
        int | None, typer.Option("--heads-kv", min=1, help="Key heads; --heads without it.")
    ] = None,
    dim: Annotated[int, typer.Option("--dim", min=1, help="head_dim.")] = 64,
    dim_v: Annotated[
        int | None, typer.Option("--dim-v", min=1, help="head_dim of v; --dim without it.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float16, bfloat16, float32 or float64.")] = "float32",
    causal: Causal = False,
    window_text: Window = None,
    softcap: Annotated[float | None, typer.Option("--softcap", help="Scores become c * tanh(s / c).")] = None,
    dropout: Annotated[float, typer.Option("--dropout", help="Chance that an element is dropped.")] = 0.0,
    backend: Annotated[
        str | None, typer.Option("--backend", help="Explain this one instead of the best.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which backend would run a call, how, what the mask saves, and why each other backend declines."""
    import numpy as np

    import anyflash as af
    from anyflash.core.dtypes import FLOATS
    from anyflash.semantics.arrays import numpy_dtype

    if dtype not in FLOATS:
        raise typer.BadParameter(f"{dtype!r}: expected one of {', '.join(FLOATS)}", param_hint="--dtype")
    keys = q if k is None else k
    zero = np.zeros((), numpy_dtype(dtype))
    shapes = ((q, heads, dim), (keys, heads_kv or heads, dim), (keys, heads_kv or heads, dim_v or dim))
    # Only shapes matter, so the arrays are one element seen many times.
    arrays = [np.broadcast_to(zero, (batch, *shape)) for shape in shapes]
    found = af.explain(
        *arrays,
        causal=causal,
        window=window(window_text),
        softcap=softcap,
        dropout_p=dropout,
        backend=backend,
    )
    typer.echo(json.dumps(dataclasses.asdict(found), indent=2, default=str) if as_json else str(found))
