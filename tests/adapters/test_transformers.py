"""The adapter's own parts: registration, masks as formulas, and the conventions of single calls."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel  # noqa: E402
from transformers import masking_utils as own_masks  # noqa: E402

from adapters.tiny import BY_ID, tokens  # noqa: E402
from anyflash.adapters import transformers as adapter  # noqa: E402
from anyflash.adapters._transformers.attention import attention_for_transformers  # noqa: E402
from anyflash.adapters._transformers.mask import FormulaMask, mask_for_transformers  # noqa: E402
from anyflash.core.errors import Unsupported  # noqa: E402
from anyflash.semantics import evaluate, text  # noqa: E402

REGISTRIES = (AttentionInterface, AttentionMaskInterface)


@pytest.fixture
def installed() -> Iterator[None]:
    adapter.install()
    yield
    adapter.remove()


def state() -> list[Any]:
    return [dict(r._global_mapping) for r in REGISTRIES] + [dict(vars(PreTrainedModel))]


def test_remove_undoes_install() -> None:
    before = state()
    adapter.install()
    adapter.install()
    assert all(adapter.IMPLEMENTATION in r._global_mapping for r in REGISTRIES)
    adapter.remove()
    assert state() == before
    adapter.remove()
    assert state() == before


def test_remove_puts_back_what_had_the_name() -> None:
    mine = lambda *_: None
    AttentionInterface.register(adapter.IMPLEMENTATION, mine)
    try:
        adapter.install()
        adapter.remove()
        assert AttentionInterface._global_mapping[adapter.IMPLEMENTATION] is mine
    finally:
        del AttentionInterface._global_mapping[adapter.IMPLEMENTATION]


def test_self_check_leaves_no_trace() -> None:
    before, seed = state(), torch.get_rng_state()
    assert adapter.self_check() is None
    assert state() == before
    assert torch.equal(seed, torch.get_rng_state())


def test_self_check_finds_a_wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    import anyflash.adapters._transformers.attention as attention

    wrong = lambda *arguments, **more: (
        torch.zeros_like(attention_for_transformers(*arguments, **more)[0]),
        None,
    )
    monkeypatch.setattr(attention, "attention_for_transformers", wrong)
    assert "differs" in (adapter.self_check() or "")


@pytest.mark.usefixtures("installed")
def test_the_name_is_taken_everywhere() -> None:
    """At construction, later, and by models that send "flash" names elsewhere or refuse them."""
    assert BY_ID["gpt_oss"].make(attn_implementation="anyflash").config._attn_implementation == "AnyFlash"
    for name in ("gpt_oss", "t5"):
        model = BY_ID[name].make()
        model.set_attn_implementation("anyflash")
        assert model.config._attn_implementation == "AnyFlash"


@dataclass(frozen=True)
class Pattern:
    """A mask function, made for a batch of 2 and 9 tokens, and what its formula must be where that is
    fixed."""

    id: str
    make: Callable[[], Callable[..., Any]]
    formula: str | None = None
    batch: int = 2


def ids(batch: int) -> torch.Tensor:
    return torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0, 0, 0, 0, 0, 0, 0, 1, 1]])[:batch]


def positions(batch: int) -> torch.Tensor:
    return torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 0, 1]])[:batch]


def packed(base: Callable[..., Any], batch: int) -> Callable[..., Any]:
    return own_masks.packed_sequence_compatibility_function(base, positions(batch), ids(batch))


def image_prefix(batch: Any, head: Any, q: Any, k: Any) -> Any:
    return torch.where(k < 4, k >= 0, k <= q)


def not_index_based(batch: Any, head: Any, q: Any, k: Any) -> Any:
    return torch.sin(k.float()) <= q


PATTERNS = [
    Pattern("causal", lambda: own_masks.causal_mask_function, "(le k q)"),
    Pattern("everything", lambda: own_masks.bidirectional_mask_function),
    Pattern("window", lambda: own_masks.sliding_window_causal_mask_function(3)),
    Pattern("two-sided-window", lambda: own_masks.sliding_window_bidirectional_mask_function(3)),
    Pattern("chunks", lambda: own_masks.chunked_causal_mask_function(4, torch.tensor([0, 2]))),
    Pattern("packed", lambda: packed(own_masks.causal_mask_function, 2)),
    Pattern(
        "packed-row",
        lambda: packed(own_masks.causal_mask_function, 1),
        "(and (eq (load 0:i q) (load 0:i k)) (le (load 1:i k) (load 1:i q)))",
        batch=1,
    ),
    Pattern("packed-window", lambda: packed(own_masks.sliding_window_causal_mask_function(2), 1), batch=1),
    Pattern(
        "blocks",
        lambda: own_masks.or_masks(own_masks.causal_mask_function, own_masks.blockwise_overlay(ids(2) - 1)),
    ),
    Pattern("prefix", lambda: image_prefix),
    Pattern("not-a-formula", lambda: not_index_based),
]
PADDING = {
    "none": None,
    "left": [[1] * 9, [0] * 4 + [1] * 5],
    "right": [[1] * 6 + [0] * 3, [1] * 9],
    "both": [[1] * 6 + [0] * 3, [0] * 2 + [1] * 7],
    "holes": [[1, 0] * 4 + [1], [1] * 9],
    "nobody": [[0] * 9, [1] * 9],
}


def values(mask: FormulaMask) -> torch.Tensor:
    """The formula evaluated by our own definition."""
    q_len, k_len = mask.shape[2:]
    (formula,), tables = text.bind([mask.formula])
    grid = torch.meshgrid(*(torch.arange(n) for n in mask.shape), indexing="ij")
    names = ("batch", "head", "row", "k")
    env = {name: axis.numpy() for name, axis in zip(names, grid, strict=True)}
    env |= {"q": env["row"] + k_len - q_len, "q_len": q_len, "k_len": k_len}
    found = evaluate.evaluate(formula, env, [t.array.numpy() for t in tables])
    return torch.as_tensor(found).expand(mask.shape)


@pytest.mark.parametrize("offsets", [(9, 9, 0, 0), (4, 9, 5, 0), (4, 9, 0, 0), (3, 6, 6, 3)], ids=str)
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: p.id)
def test_formula(pattern: Pattern, padding: str, offsets: tuple[int, int, int, int]) -> None:
    """Every pattern, over a whole sequence, a continued one, an empty static cache and a window's cache, is
    the matrix that transformers builds."""
    q_length, kv_length, q_offset, kv_offset = offsets
    valid = PADDING[padding]
    arguments: dict[str, Any] = {
        "batch_size": pattern.batch,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": pattern.make(),
        "attention_mask": None if valid is None else torch.tensor(valid, dtype=torch.bool)[: pattern.batch],
    }
    if pattern.id == "not-a-formula":
        arguments["mask_function"] = lambda b, h, q, k: torch.sin(k.float()) <= q
    expected = own_masks.sdpa_mask(**arguments, allow_is_causal_skip=False)
    mask = mask_for_transformers(**arguments)
    assert mask is not None
    assert isinstance(mask, FormulaMask) == (pattern.id != "not-a-formula")
    assert mask.shape == expected.shape
    if isinstance(mask, FormulaMask):
        assert torch.equal(values(mask), expected)
        if pattern.formula and padding == "none" and q_length == kv_length:
            assert repr(pattern.formula) in repr(mask)
    assert torch.equal(mask & True, expected)
    assert torch.equal(mask[:, :, 1:, :-1], expected[:, :, 1:, :-1])


def test_plain_masks() -> None:
    """None where every query sees every key; transformers' own row for a decoding step."""
    both = {"batch_size": 2, "kv_length": 9, "mask_function": own_masks.bidirectional_mask_function}
    free = mask_for_transformers(**both, q_length=9, allow_is_bidirectional_skip=True)
    assert free is None
    step = mask_for_transformers(
        batch_size=2, q_length=1, kv_length=9, q_offset=8, attention_mask=torch.ones(2, 9).bool().tril(7)
    )
    assert type(step) is torch.Tensor
    assert step.shape == (2, 1, 1, 9)


def test_memory_of_a_mask() -> None:
    """A mask of 2**40 elements is no more than its formula."""
    mask = mask_for_transformers(batch_size=1, q_length=2**20, kv_length=2**20)
    assert isinstance(mask, FormulaMask)
    assert mask.shape == (1, 1, 2**20, 2**20)


def test_formula_of_another_shape() -> None:
    """A layer with fewer keys than its mask was made for cuts the matrix, and positions stay where they
    were."""
    q, k, v = arrays(4, 6)
    mask = mask_for_transformers(batch_size=2, q_length=4, kv_length=9, q_offset=5)
    out, _ = attention_for_transformers(MODULE, q, k, v, mask)
    close(out, plain([q, k, v], below(4, 6, 5)))


def test_padding_is_skipped() -> None:
    """Keys that are padding throughout a tile cost nothing: two of 4096 keys take far less than all."""
    q, k, v = (torch.randn(1, 2, n, 32) for n in (256, 4096, 4096))
    seconds = []
    for valid in (2, 4096):
        present = torch.arange(4096)[None] < valid
        mask = mask_for_transformers(
            batch_size=1,
            q_length=256,
            kv_length=4096,
            mask_function=own_masks.bidirectional_mask_function,
            attention_mask=present,
        )
        assert isinstance(mask, FormulaMask)
        taken = []
        for _ in range(9):
            start = time.perf_counter()
            attention_for_transformers(MODULE, q, k, v, mask)
            taken.append(time.perf_counter() - start)
        seconds.append(min(taken))
    assert seconds[0] < seconds[1] / 3


# Single calls of the attention function, against the definition written out here.

MODULE = SimpleNamespace(is_causal=True)


def arrays(q_length: int, kv_length: int, heads: int = 4, kv_heads: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, q_length, 8), (2, kv_heads, kv_length, 8), (2, kv_heads, kv_length, 8))
    return [torch.randn(s, dtype=torch.float64, generator=generator) for s in shapes]


def plain(qkv: list[torch.Tensor], keep: torch.Tensor | None, bias: Any = 0.0) -> torch.Tensor:
    q, k, v = qkv
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5 + bias
    scores = scores if keep is None else scores.masked_fill(~keep, float("-inf"))
    return (torch.softmax(scores, -1).nan_to_num(0.0) @ v).transpose(1, 2)


def close(ours: torch.Tensor, own: torch.Tensor) -> None:
    assert ours.is_contiguous()
    assert float((ours - own).abs().max()) <= 64 * torch.finfo(torch.float64).eps * float(own.abs().max())


def below(q_length: int, kv_length: int, offset: int = 0) -> torch.Tensor:
    return torch.arange(kv_length)[None] <= torch.arange(q_length)[:, None] + offset


def test_static_cache_is_upper_left() -> None:
    """Without a mask, causal, more keys than queries: the keys past the queries are not written yet."""
    qkv = arrays(5, 9)
    out, weights = attention_for_transformers(MODULE, *qkv, None)
    assert weights is None
    close(out, plain(qkv, below(5, 9)))
    bias = torch.randn(1, 4, 5, 9, dtype=torch.float64)
    close(
        attention_for_transformers(MODULE, *qkv, None, position_bias=bias)[0], plain(qkv, below(5, 9), bias)
    )


def test_one_query_is_not_causal() -> None:
    qkv = arrays(1, 9)
    close(attention_for_transformers(MODULE, *qkv, None)[0], plain(qkv, None))


@pytest.mark.parametrize("said", [None, False])
def test_causality_of_the_module(said: bool | None) -> None:
    qkv = arrays(6, 6)
    module = SimpleNamespace(is_causal=said is None)
    out, _ = attention_for_transformers(module, *qkv, None, is_causal=said)
    close(out, plain(qkv, below(6, 6) if said is None else None))


def test_masks_of_every_kind() -> None:
    """Boolean and additive, longer than the keys, and rows that see nothing."""
    qkv = arrays(6, 9)
    keep = torch.rand(2, 1, 6, 12, generator=torch.Generator().manual_seed(5)) > 0.4
    keep[1, 0, 2, :9] = False
    expected = plain(qkv, keep[..., :9])
    out, _ = attention_for_transformers(MODULE, *qkv, keep)
    close(out, expected)
    assert not out[1, 2].any()
    additive = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, float("-inf"))
    close(attention_for_transformers(MODULE, *qkv, additive)[0], expected)


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("value", [-1e4, -1e6, -1e9, LOWEST])
def test_finite_masks_keep_their_meaning(value: float) -> None:
    """A row masked throughout by a finite number is the mean of its keys, as in eager attention, and so are
    its gradients."""
    q, k, v = (t.float() for t in arrays(6, 9))
    found = []
    for attend in (eager, lambda *qkv: attention_for_transformers(MODULE, *qkv)[0]):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        mask = torch.zeros(2, 1, 6, 9)
        mask[1, 0, 2] = value
        out = attend(*leaves, mask)
        out.square().sum().backward()
        found.append([out.detach(), *(t.grad for t in leaves)])
    # The number takes a score's last digits: what is left of it is right to a unit in the number's last
    # place, and where that is coarser than the scores, nothing is left.
    unit = abs(float(np.spacing(np.float32(max(value, -1e30)))))
    rounding = 64 * torch.finfo(torch.float32).eps + (2 * unit if unit < 1 else 0.0)
    for own, ours in zip(*found, strict=True):
        assert float((ours - own).abs().max()) <= rounding * float(own.abs().max())


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return plain([q, k, v], None, mask)


def test_nan_in_a_mask_is_seen() -> None:
    qkv = arrays(6, 9)
    mask = torch.zeros(2, 1, 6, 9, dtype=torch.float64)
    mask[1, 0, 2, 3] = torch.nan
    out, _ = attention_for_transformers(MODULE, *qkv, mask)
    assert out[1, 2].isnan().all()
    assert int(out.isnan().sum()) == out[1, 2].numel()


def test_chosen_keys() -> None:
    qkv = arrays(6, 9)
    indices = torch.stack([torch.randperm(9)[:4] for _ in range(12)]).reshape(2, 6, 4)
    indices[0, 0, 1:] = -1
    keep = torch.zeros(2, 1, 6, 9, dtype=torch.bool)
    for b, i, j in itertools.product(range(2), range(6), range(4)):
        if indices[b, i, j] >= 0:
            keep[b, 0, i, indices[b, i, j]] = True
    close(
        attention_for_transformers(MODULE, *qkv, None, is_causal=False, indices=indices)[0], plain(qkv, keep)
    )
    mask = below(6, 9, 3).expand(2, 1, 6, 9)
    close(attention_for_transformers(MODULE, *qkv, mask, indices=indices)[0], plain(qkv, keep & mask))


def test_dropout_follows_the_generator() -> None:
    qkv = arrays(6, 6)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(attention_for_transformers(MODULE, *qkv, None, dropout=0.5)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_paged_cache_is_refused() -> None:
    with pytest.raises(Unsupported, match="sdpa"):
        attention_for_transformers(MODULE, *arrays(6, 6), None, cache=object())


@pytest.mark.usefixtures("installed")
def test_training_with_dropout() -> None:
    model = BY_ID["gpt2"].make(attn_pdrop=0.3, resid_pdrop=0.0, embd_pdrop=0.0).train()
    model.set_attn_implementation(adapter.IMPLEMENTATION)
    row = tokens(2, 17)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model.zero_grad(set_to_none=True)
        model(row, labels=row).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert found[0].isfinite().all()
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
