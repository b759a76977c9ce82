"""MLPerf's BERT: the call that its unpadded layers make, and themselves where ANYFLASH_SRC_MLPERF names a
checkout."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from anyflash import Unsupported  # noqa: E402
from anyflash.adapters import mlperf_bert as adapter  # noqa: E402
from anyflash.adapters._mlperf_bert.attention import stream_attn_func  # noqa: E402

DOUBLE = torch.float64
HEADS, DIM, WIDTH, LONGEST, VOCABULARY = 2, 8, 16, 9, 24


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    bound = 256 * torch.finfo(wanted.dtype).eps * float(wanted.detach().abs().max())
    assert float((found - wanted).detach().abs().max()) <= bound


def definition(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    dropout_p: float,
    max_s: int,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Each sequence by itself."""
    assert dropout_p == 0
    scale = qkv.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    found = []
    for one in qkv.tensor_split(cu_seqlens[1:-1].long()):
        q, k, v = one.unbind(1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(len(q), len(q), dtype=torch.bool).triu(1), -torch.inf)
        found.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(found)


# Lengths of the sequences; the arguments that have defaults.
CALLS: dict[str, tuple[list[int], dict[str, Any]]] = {
    "several": ([5, 1, 9], {}),
    "one": ([7], {}),
    "one-is-empty": ([4, 0, 3], {}),
    "scale": ([5, 3], {"softmax_scale": 0.7}),
    "causal": ([5, 3], {"causal": True}),
}


@pytest.mark.parametrize("name", CALLS)
def test_call(name: str) -> None:
    """As `BertStreamSelfAttention.forward` calls: outputs and the gradient of qkv."""
    lengths, extra = CALLS[name]
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, HEADS, DIM, dtype=DOUBLE, requires_grad=True)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    results = []
    for function in (stream_attn_func, definition):
        out = function(qkv, starts, 0.0, max(lengths), **extra)
        results.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    for mine, own in zip(*results, strict=True):
        close(mine, own)


def test_dropout() -> None:
    """From torch's generator; each row of the values' unit matrix shows what was kept, and by how much."""
    torch.manual_seed(0)
    qkv = torch.randn(64, 3, 1, 64, dtype=DOUBLE)
    qkv[:, 2, 0] = torch.eye(64, dtype=DOUBLE)
    starts = torch.tensor([0, 64], dtype=torch.int32)
    kept = stream_attn_func(qkv, starts, 0.25, 64)
    whole = stream_attn_func(qkv, starts, 0.0, 64)
    close(kept, torch.where(kept == 0, 0, whole / 0.75))
    torch.manual_seed(1)
    again = [stream_attn_func(qkv, starts, 0.25, 64)]
    torch.manual_seed(1)
    again.append(stream_attn_func(qkv, starts, 0.25, 64))
    assert torch.equal(*again)
    # A share of a quarter, up to five standard deviations of so many.
    share = float((kept == 0).double().mean())
    assert abs(share - 0.25) <= 5 * (0.25 * 0.75 / kept.numel()) ** 0.5


def test_probabilities_are_refused() -> None:
    qkv = torch.randn(4, 3, HEADS, DIM)
    with pytest.raises(Unsupported, match="return_attn_probs"):
        stream_attn_func(qkv, torch.tensor([0, 4], dtype=torch.int32), 0.0, 4, return_attn_probs=True)


def test_absent() -> None:
    if importlib.util.find_spec("modeling") is None:
        assert "modeling" in (adapter.self_check() or "")


@pytest.fixture
def modeling() -> Iterator[Any]:
    """modeling.py, which this import takes through `install`, as users do."""
    if adapter.source.folder() is None:
        pytest.skip(f"{adapter.source.variable} names no checkout of MLPerf's training results")
    pytest.importorskip("einops")
    with adapter.importable():
        adapter.install()
        adapter.remove()
        yield importlib.import_module("modeling")


def bert(modeling: Any, **chosen: Any) -> Any:
    """BERT for pretraining, without padding; what is fused needs CUDA."""
    config = modeling.BertConfig(
        VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=32,
        max_position_embeddings=LONGEST,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.5,
    )
    for name, value in {"unpad": True, "unpad_stream_attn": True, **chosen}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return modeling.BertForPreTraining(config).double()


def batch() -> dict[str, torch.Tensor]:
    """Two padded sequences and a full one; of some tokens the true one is asked. Label 0 asks nothing."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([9, 4, 6])
    valid = torch.arange(LONGEST) < lengths[:, None]
    ids = torch.randint(1, VOCABULARY, valid.shape, generator=generator)
    asked = valid & (torch.rand(valid.shape, generator=generator) < 0.4)
    asked[:, 1] = True
    return {
        "input_ids": ids.masked_fill(asked, 3) * valid,
        "token_type_ids": (torch.arange(LONGEST) > 3).long().expand_as(ids),
        "attention_mask": valid.long(),
        "masked_lm_labels": ids * asked,
        "next_sentence_label": torch.tensor([0, 1, 0]),
    }


def with_ours(run: Callable[[], Any]) -> Any:
    adapter.install()
    try:
        return run()
    finally:
        adapter.remove()


@pytest.mark.parametrize("subset", [False, True], ids=["last-layer-whole", "last-layer-of-what-is-asked"])
def test_pretraining(modeling: Any, subset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's step: its loss, and the gradients of all parameters."""
    # Its own loss asserts that it is on a GPU.
    monkeypatch.setattr(modeling, "CrossEntropyLossApex", torch.nn.CrossEntropyLoss)
    model = bert(modeling, dense_seq_output=True, last_layer_subset=subset)
    leaves = dict(model.named_parameters())

    def step() -> list[torch.Tensor]:
        loss, accuracy, _ = model(**batch())
        return [loss, accuracy, *torch.autograd.grad(loss, list(leaves.values()))]

    mine = with_ours(step)
    monkeypatch.setattr(modeling, "stream_attn_func", definition)
    for found, wanted in zip(mine, step(), strict=True):
        close(found, wanted)


def test_against_its_padded_layer(modeling: Any) -> None:
    """Where tokens are, the layer without padding gives what the one with padding and a mask does, and the
    gradients of the input."""
    unpadded = bert(modeling).bert.encoder.layer[0]
    padded = bert(modeling, unpad=False, unpad_stream_attn=False).bert.encoder.layer[0]
    given = unpadded.state_dict()
    for part, kind in enumerate(("query", "key", "value")):
        for what in ("weight", "bias"):
            given[f"attention.self.{kind}.{what}"] = given[f"attention.self.Wqkv.{what}"].chunk(3)[part]
    for what in ("weight", "bias"):
        del given[f"attention.self.Wqkv.{what}"]
    padded.load_state_dict(given)
    valid = batch()["attention_mask"].bool()
    hidden = torch.randn(*valid.shape, WIDTH, dtype=DOUBLE, requires_grad=True)
    starts = torch.nn.functional.pad(valid.sum(1).cumsum(0), (1, 0)).int()
    ours = with_ours(lambda: unpadded(hidden[valid], starts, LONGEST))
    own = padded(hidden, (~valid).double() * -10000.0, None)[valid]
    close(ours, own)
    # A norm stands last, so the sum of squares would have no gradient.
    weights = torch.randn_like(own)
    gradients = [torch.autograd.grad((out * weights).sum(), hidden)[0] for out in (ours, own)]
    close(*gradients)


def test_leaves_nothing(modeling: Any) -> None:
    own = importlib.import_module("model.ops.stream_attn_interface").stream_attn_func
    assert modeling.stream_attn_func is own
    before = set(sys.modules)
    adapter.install()
    adapter.install()
    assert modeling.stream_attn_func is stream_attn_func
    assert adapter.self_check() is None
    assert modeling.stream_attn_func is stream_attn_func
    adapter.remove()
    assert modeling.stream_attn_func is own
    assert adapter.self_check() is None
    assert modeling.stream_attn_func is own
    assert not (set(sys.modules) - before) & set(adapter._EXTENSIONS)
