"""The whole public surface: every call is describe, plan, run, wrap."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from anyflash.core.dtypes import TABLES, kind
from anyflash.core.errors import InvalidCall
from anyflash.frontends import registry
from anyflash.frontends.base import Frontend, Request, describe_request
from anyflash.semantics.checks import check_merge
from anyflash.semantics.descale import descale_of
from anyflash.semantics.describe import describe_program
from anyflash.semantics.expr import At, Expr, Table

if TYPE_CHECKING:
    from anyflash.dispatch.explain import Explanation

Window = tuple[int | None, int | None] | None
Score = Callable[[Expr, At], Any] | None


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    layout: str = "bshd",
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    score: Score = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    descale_q: Any = None,
    descale_k: Any = None,
    descale_v: Any = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Any:
    """Exact attention in memory linear in sequence length.

        s   = scale * (q . k)
        s   = score(s), softcap, ALiBi, biases         in this order
        s   = -inf where a mask says no
        lse = log(sum_k exp(s) + exp(sink))
        out = dropout(exp(s - lse)) . v

    8-bit floats stand for themselves times a factor: s = scale * descale_q * descale_k * (q . k), and out is
    multiplied by descale_v.

    B batch, Tq queries, Tk keys, Hq query heads, Hkv key heads (Hq a multiple of Hkv; query head h reads key
    head h // (Hq // Hkv)), D head_dim and Dv that of v (each 1 to 576).

    Args:
        q: (B, Tq, Hq, D), float16, bfloat16, float32 or float64, or float8_e4m3fn or float8_e5m2 (no
            gradient); any strides. An array of numpy or torch; every other array of the call belongs to the
            same framework and lies on the same device.
        k: (B, Tk, Hkv, D), the dtype of q.
        v: (B, Tk, Hkv, Dv), the dtype of q.
        layout: "bshd", as above, or "bhsd", where heads come before rows, in q, k, v and out.
        causal: keys up to the query's position only. Query row i sits at key position i + Tk - Tq.
        window: (left, right), keys from position - left to position + right, both included; None for no
        bound.
        scale: factor of the products; None is D ** -0.5.
        softcap: c, makes scores c * tanh(s / c).
        score: `score(s, at)`, called once with symbols, gives the new score from the old one and from where
            it stands: at.batch, at.head, at.row, at.q, at.k, at.q_len, at.k_len. Built with operators,
            `anyflash.tanh`, `exp`, `log`, `where`, `minimum`, `maximum`, and `anyflash.table(array)[...]`.
        mask: `mask(at)`, called once with symbols, says where a query may see a key; or one of
            `anyflash.masks`; or a boolean array that broadcasts to (B, Hq, Tq, Tk). It is and-ed with
            `causal` and `window`.
        bias: a floating array that broadcasts to (B, Hq, Tq, Tk), added to the scores, or a list of such
            arrays; each is read as it is, never stretched in memory.
        alibi_slopes: (Hq,) or (B, Hq); subtracts slope * |position - key|.
        sinks: (Hq,) logits that join each head's denominator and no output.
        dropout_p: chance that a probability is dropped, 0 <= dropout_p < 1; the others are scaled up.
        seed: of dropout, 0 to 2 ** 63 - 1; the same seed drops the same (batch, head, query, key) on every
            device. None draws one: from the operating system for numpy, from the framework's generator
            elsewhere.
        descale_q, descale_k, descale_v: factors of 8-bit q, k and v: None for 1, a number, or a floating
            array that broadcasts to (B, Hkv). Query heads of a group share their key head's.
        return_lse: give (out, lse), lse (B, Hq, Tq) float32 (float64 for float64), the natural logarithm.
        deterministic: None and True give the same bits for the same call. False leaves gradients to be summed
            in any order where that is faster: on Hopper GPUs the last bits of dq may then differ from run to
            run.
        backend: the name of one, which then runs the call or raises; None for the best that can.

    Returns:
        out (B, Tq, Hq, Dv) in `layout`, row-major, the dtype of q, bfloat16 for 8-bit floats; or (out, lse).
        A query that sees no key gets out 0 and lse -inf.

    Raises:
        InvalidCall: an argument contradicts the above; nothing was computed.
        Unsupported: no backend that may run the call can; the message has each one's reasons.
        BackendBroken: a backend failed; its error is chained.

    Example:
        >>> import numpy as np, anyflash as af
        >>> q = np.random.default_rng(0).standard_normal((2, 128, 4, 64), dtype=np.float32)
        >>> out, lse = af.attention(q, q, q, causal=True, return_lse=True)
        >>> out.shape, lse.shape
        ((2, 128, 4, 64), (2, 4, 128))

        In 8-bit floats, k with a factor for each key head:

        >>> import ml_dtypes
        >>> top = np.abs(q).max(axis=(0, 1, 3)) / 448
        >>> k8 = (q / top[:, None]).astype(ml_dtypes.float8_e4m3fn)
        >>> q8 = q.astype(ml_dtypes.float8_e4m3fn)
        >>> af.attention(q8, k8, q8, causal=True, descale_k=top).dtype
        dtype(bfloat16)
    """
    frontend, request = _request(
        (q, k, v),
        layout,
        None,
        causal, window, scale, softcap, score, mask, bias, alibi_slopes, sinks, dropout_p, seed,
        (descale_q, descale_k, descale_v), deterministic, backend,
    )  # fmt: skip
    out, lse = frontend.attend(request)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    seqused_k: Any = None,
    layout: str = "thd",
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    score: Score = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    descale_q: Any = None,
    descale_k: Any = None,
    descale_v: Any = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Any:
    """Attention over packed sequences of different lengths, each on its own.

    Args:
        q: (total_q, Hq, D), the sequences one after the other.
        k: (total_k, Hkv, D).
        v: (total_k, Hkv, Dv).
        cu_seqlens_q: (sequences + 1,) int32 or int64: sequence i has the rows cu_seqlens_q[i] to
            cu_seqlens_q[i + 1] - 1 of q. Starts with 0, ascends, ends with at most total_q. Lengths may be 0.
        cu_seqlens_k: the same for k and v.
        seqused_k: (sequences,) int32 or int64: only that many keys of each sequence exist; None for all.
            Lengths lie where q does. In host memory their values are checked. On a device only their shapes
            are, because the host would have to wait for it: the call can be captured in a CUDA graph and run
            again with other lengths. Wrong ones give a wrong result there, and never an access outside the
            arrays.
        layout: "thd".

    The other arguments are those of `attention`, with `at.batch` the sequence's number and rows, positions
    and lengths counted within each sequence. A bias or boolean mask has axes (sequences, heads, longest q,
    longest k).

    Returns:
        out (total_q, Hq, Dv), or (out, lse) with lse (Hq, total_q). Rows of no sequence get out 0 and lse
        -inf.

    Raises:
        as `attention`.

    Example:
        >>> import numpy as np, anyflash as af
        >>> q = np.ones((7, 2, 16), np.float32)
        >>> starts = np.array([0, 3, 3, 7], np.int32)
        >>> af.attention_varlen(q, q, q, cu_seqlens_q=starts, cu_seqlens_k=starts, causal=True).shape
        (7, 2, 16)
    """
    frontend, request = _request(
        (q, k, v),
        layout,
        (cu_seqlens_q, cu_seqlens_k, seqused_k),
        causal, window, scale, softcap, score, mask, bias, alibi_slopes, sinks, dropout_p, seed,
        (descale_q, descale_k, descale_v), deterministic, backend,
    )  # fmt: skip
    out, lse = frontend.attend(request)
    return (out, lse) if return_lse else out


def merge(out_a: Any, lse_a: Any, out_b: Any, lse_b: Any, *, layout: str = "bshd") -> tuple[Any, Any]:
    """Combine attention over one set of keys with attention over another, exactly: (out, lse) over both.

    Args:
        out_a, out_b: (B, Tq, Hq, Dv), or (total_q, Hq, Dv), results for the same queries over disjoint keys.
        lse_a, lse_b: (B, Hq, Tq), or (Hq, total_q), as `return_lse` gives them.
        layout: "bhsd" if the outputs have heads before rows.

    The neutral element is out 0 with lse -inf. A sink must be in one of the two only.

    Raises:
        InvalidCall: shapes or frameworks do not go together.

    Example:
        >>> import numpy as np, anyflash as af
        >>> q = np.ones((1, 4, 2, 8), np.float32)
        >>> a = af.attention(q, q[:, :3], q[:, :3], return_lse=True)
        >>> b = af.attention(q, q[:, 3:], q[:, 3:], return_lse=True)
        >>> out, lse = af.merge(*a, *b)
        >>> np.allclose(lse, af.attention(q, q, q, return_lse=True)[1])
        True
    """
    frontend = registry.of("out_a", out_a)
    arrays = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    check_merge({name: (tuple(a.shape), _dtype(frontend, name, a)) for name, a in arrays.items()}, layout)
    return frontend.merge(out_a, lse_a, out_b, lse_b, layout)


def explain(
    q: Any,
    k: Any,
    v: Any,
    *,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    seqused_k: Any = None,
    layout: str | None = None,
    causal: bool = False,
    window: Window = None,
    scale: float | None = None,
    softcap: float | None = None,
    score: Score = None,
    mask: Any = None,
    bias: Any = None,
    alibi_slopes: Any = None,
    sinks: Any = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    descale_q: Any = None,
    descale_k: Any = None,
    descale_v: Any = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
) -> Explanation:
    """What `attention` (or `attention_varlen`, if `cu_seqlens_q` is given) would do with these arguments.

    Computes no attention. The result prints as a short report: the backend and its configuration, tiles of
    scores that the mask empties, leaves partial or full, operations, bytes, and why each other backend
    declined.

    Raises:
        InvalidCall: as `attention`. A call that no backend can run is explained, not raised.

    Example:
        >>> import numpy as np, anyflash as af
        >>> q = np.zeros((1, 256, 2, 64), np.float32)
        >>> print(af.explain(q, q, q, causal=True, backend="reference"))  # doctest: +ELLIPSIS
        attention of q (1, 256, 2, 64), ...
    """
    from anyflash.dispatch import explain as explaining

    packed = cu_seqlens_q is not None or cu_seqlens_k is not None or seqused_k is not None
    frontend, request = _request(
        (q, k, v),
        layout or ("thd" if packed else "bshd"),
        (cu_seqlens_q, cu_seqlens_k, seqused_k) if packed else None,
        causal, window, scale, softcap, score, mask, bias, alibi_slopes, sinks, dropout_p, seed,
        (descale_q, descale_k, descale_v), deterministic, backend,
    )  # fmt: skip
    return explaining.explain(*describe_request(frontend, request), backend)


def table(array: Any) -> Table:
    """An array for score and mask functions to read: `table(array)[at.head, at.k]`, one integer index an
    axis.

    The array may be floating, integer or boolean, of the framework of q. An index that may leave the array is
    clamped to its edge; one that surely leaves it is an InvalidCall. In torch, a floating table that requires
    a gradient gets one.

    Example:
        >>> import numpy as np, anyflash as af
        >>> documents = af.table(np.array([0, 0, 1, 1], np.int32))
        >>> q = np.ones((1, 4, 1, 8), np.float32)
        >>> af.attention(q, q, q, mask=lambda at: documents[at.q] == documents[at.k]).shape
        (1, 4, 1, 8)
    """
    dtype = registry.of("array", array).dtype(array)
    if dtype not in TABLES:
        raise InvalidCall(
            "array", f"dtype {dtype}, shape {tuple(array.shape)}", f"one of {', '.join(TABLES)}"
        )
    return Table(array, kind(dtype))


def _request(
    qkv: tuple[Any, Any, Any],
    layout: str,
    lengths: tuple[Any, Any, Any] | None,
    causal: bool,
    window: Window,
    scale: float | None,
    softcap: float | None,
    score: Score,
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sinks: Any,
    dropout_p: float,
    seed: int | None,
    factors: tuple[Any, Any, Any],
    deterministic: bool | None,
    backend: str | None,
) -> tuple[Frontend, Request]:
    """The framework of a call, and the call as a program and arrays of that framework."""
    q, k, v = qkv
    frontend = registry.of("q", q)
    if type(k) is not type(q) or type(v) is not type(q):
        registry.same(frontend, "k", k)
        registry.same(frontend, "v", v)
    if deterministic is not None and not isinstance(deterministic, bool):
        raise InvalidCall("deterministic", repr(deterministic), "None, True or False")
    if backend is not None and not isinstance(backend, str):
        raise InvalidCall("backend", repr(backend), "None or the name of a backend")
    if seed is not None:
        seed = _seed(seed)
    if sinks is not None:
        registry.same(frontend, "sinks", sinks)
    sequences = None
    if lengths is not None:
        sequences = _sequences(frontend, *lengths)
    descale = None
    if not factors[0] is factors[1] is factors[2] is None:
        descale = descale_of(factors, k.shape, layout, frontend.dtype(q), frontend.dtype(k))
    program, tables, names = describe_program(
        q.shape,
        k.shape,
        lambda argument, array: _dtype(frontend, argument, array),
        layout=layout,
        sequences=sequences,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        score=score,
        mask=mask,
        bias=bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        descale=descale,
        deterministic=deterministic is not False,
    )
    for name, array in zip(names, tables, strict=True):
        registry.same(frontend, name, array)
    arrays = (*qkv, layout, tables, names, sinks, *(lengths or (None, None, None)))
    return frontend, Request(program, *arrays, dropout_p != 0.0, seed, backend)


def _dtype(frontend: Frontend, argument: str, array: Any) -> str:
    registry.same(frontend, argument, array)
    return frontend.dtype(array)


def _seed(seed: Any) -> int:
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= int(seed) < 2**63:
        raise InvalidCall("seed", repr(seed), "None or a whole number from 0 to 2 ** 63 - 1")
    return int(seed)


def _sequences(frontend: Frontend, cu_seqlens_q: Any, cu_seqlens_k: Any, seqused_k: Any) -> int:
    for argument, array in (
        ("cu_seqlens_q", cu_seqlens_q),
        ("cu_seqlens_k", cu_seqlens_k),
        ("seqused_k", seqused_k),
    ):
        if array is not None:
            registry.same(frontend, argument, array)
        elif argument != "seqused_k":
            raise InvalidCall(argument, "None", "(sequences + 1,) cumulative lengths of the packed rows")
    if len(cu_seqlens_q.shape) != 1 or cu_seqlens_q.shape[0] < 1:
        raise InvalidCall("cu_seqlens_q", f"shape {tuple(cu_seqlens_q.shape)}", "(sequences + 1,)")
    return cu_seqlens_q.shape[0] - 1
