"""The straight line of a call over a KV cache: view, describe, plan, write the new keys, and then attend.

The plan comes before the first write, so that a call that no backend can run leaves the cache as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from anyflash.core.view import View
from anyflash.dispatch.plan import Plan, execute_append, plan
from anyflash.semantics.cache import Integers, describe_cache
from anyflash.semantics.operands import Operands
from anyflash.semantics.rotary import Rotary


@dataclass(slots=True)
class CacheRequest:
    """One call over a cache after its keywords became a program: arrays of one framework, None where absent.

    `program` is a Program's text. `tables` are in slot order and `names` says which argument each came from.
    """

    program: str
    q: Any
    cache_k: Any
    cache_v: Any
    k: Any = None
    v: Any = None
    integers: Sequence[Any] = Integers()
    rotary: tuple[Any, Any] | None = None
    rotary_interleaved: bool = False
    layout: str = "bshd"
    tables: Sequence[Any] = ()
    names: Sequence[str] = ()
    sinks: Any = None
    backend: str | None = None


def begin(
    view: Callable[[Any], View],
    empty: Callable[[tuple[int, ...], str, Any], tuple[Any, View]],
    request: CacheRequest,
) -> tuple[Plan, Operands]:
    """All of a call but the attention itself: afterwards the new keys and values are in the cache.

    `view` and `empty` are those of a Frontend.
    """

    def optional(array: Any) -> View | None:
        return None if array is None else view(array)

    rotary = request.rotary
    call = describe_cache(
        request.program,
        view(request.q),
        view(request.cache_k),
        view(request.cache_v),
        optional(request.k),
        optional(request.v),
        integers=Integers(*[optional(array) for array in request.integers]),
        layout=request.layout,
        rotary=rotary and Rotary(view(rotary[0]), view(rotary[1]), request.rotary_interleaved),
        tables=tuple([view(table) for table in request.tables]),
        names=request.names,
        sinks=optional(request.sinks),
    )
    made = plan(call.problem, call.operands.q.device, request.backend)
    turned = None
    if rotary is not None:
        _, turned = empty(call.problem.q_shape, call.problem.dtype, request.q)
    return made, execute_append(made, call, turned)
