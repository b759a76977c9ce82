"""A tiny GPTModel of megatron-core on the CPU, with its own attention and with ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core", reason="`make test` installs it where it can")

from megatron.core import parallel_state  # noqa: E402
from megatron.core.fusions import fused_softmax  # noqa: E402
from megatron.core.inference.contexts import StaticInferenceContext  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel.random import initialize_rng_tracker  # noqa: E402
from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from anyflash.adapters import megatron as adapter  # noqa: E402

S, VOCABULARY = 16, 64


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """Megatron wants its process groups, and says "cuda" where it makes masks and positions."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    parallel_state.initialize_model_parallel(1)
    initialize_rng_tracker(inference_rng_tracker=True)

    def window_mask(rows: int, keys: int, window: tuple[int, int]) -> torch.Tensor:
        inside = torch.ones(rows, keys, dtype=torch.bool)
        return ~inside.triu(keys - rows - window[0]).tril(keys - rows + window[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        causal = lambda rows: torch.ones(rows, rows, dtype=torch.bool).triu(1)
        patch.setattr(fused_softmax, "get_default_causal_mask", causal)
        patch.setattr(fused_softmax, "get_sliding_window_causal_mask", window_mask)
        yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def gpt(core: Any = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        **settings,
    )
    spec = get_gpt_layer_local_spec()
    if core is not None:
        spec.submodules.self_attention.submodules.core_attention = core
    return GPTModel(config, spec, VOCABULARY, 32, position_embedding_type="rope").double()


def tokens(batch: int, length: int = S) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (batch, length), generator=generator), torch.arange(length)[None].expand(
        batch, -1
    )


def train(model: Any, mask: torch.Tensor | None) -> list[torch.Tensor]:
    ids, positions = tokens(2)
    model.zero_grad(set_to_none=True)
    loss = model(ids, positions, mask, labels=ids).mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    bound = 1024 * torch.finfo(wanted.dtype).eps * max(float(wanted.detach().abs().max()), 1.0)
    assert float((found - wanted).detach().abs().max()) <= bound


def documents() -> torch.Tensor:
    """True = masked: causal, a document border, and a first token that the second entry does not have."""
    masked = torch.ones(S, S, dtype=torch.bool).triu(1).repeat(2, 1, 1)[:, None]
    masked[0, :, 7:, :7] = True
    masked[1, :, :, :1] = True
    return masked


SETTINGS = {
    "causal": ({}, None),
    "mask": ({}, documents),
    "window": ({"window_size": (3, 0)}, None),
    "layer-scaling": ({"apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}, None),
    "off-by-one": ({"softmax_type": "off-by-one"}, None),
    "learnable-sink": ({"softmax_type": "learnable"}, None),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_training(name: str) -> None:
    """The loss and every gradient, also where a row is masked as a whole."""
    settings, mask = SETTINGS[name]
    model = gpt(**settings)
    given = None if mask is None else mask()
    own = train(model, given)
    adapter.install()
    try:
        ours = train(model, given)
    finally:
        adapter.remove()
    for mine, wanted in zip(ours, own, strict=True):
        close(mine, wanted)


def test_module_spec() -> None:
    model = gpt(adapter.core_attention())
    for mine, wanted in zip(train(model, None), train(gpt(), None), strict=True):
        close(mine, wanted)


@pytest.mark.parametrize("room", [0, 3], ids=["end-to-end", "padded"])
def test_packed(room: int) -> None:
    """Sequences packed into one row, with room between them or not, each as if it were alone."""
    core = gpt(adapter.core_attention()).decoder.layers[0].self_attention.core_attention
    lengths = (5, 11)
    parts = [torch.randn(n, 1, 4, 8, dtype=torch.float64, requires_grad=True) for n in lengths]
    alone = [core(p, p[:, :, :2], p[:, :, :2], None) for p in parts]
    spaced = torch.cat([torch.cat([p, p.new_full((room, 1, 4, 8), 7.0)]) for p in parts])[:, 0]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    lying = torch.tensor([0, *(n + room for n in lengths)]).cumsum(0).to(torch.int32)
    given = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        cu_seqlens_q_padded=lying if room else None,
        cu_seqlens_kv_padded=lying if room else None,
        max_seqlen_q=11,
        max_seqlen_kv=11,
    )
    kinds = {"attn_mask_type": AttnMaskType.padding_causal, "packed_seq_params": given}
    found = core(spaced, spaced[:, :2], spaced[:, :2], None, **kinds)
    together = [found[lying[i] : lying[i] + n] for i, n in enumerate(lengths)]
    for mine, wanted, part in zip(together, alone, parts, strict=True):
        close(mine, wanted[:, 0])
        gradients = [
            torch.autograd.grad(o.square().sum(), part, retain_graph=True)[0] for o in (mine, wanted)
        ]
        close(*gradients)


def test_decoding() -> None:
    """A prompt and two steps over Megatron's KV cache, against the whole at once."""
    model = gpt(adapter.core_attention()).eval()
    ids, positions = tokens(2, 10)
    context = StaticInferenceContext(2, 16)
    with torch.no_grad():
        whole = model(ids, positions, None)
        for first, last in ((0, 8), (8, 9), (9, 10)):
            step = model(
                ids[:, first:last],
                positions[:, first:last],
                None,
                inference_context=context,
                runtime_gather_output=True,
            )
            context.enable_decode_mode()
            context.increment_sequence_len_offset(last - first)
            close(step[:, -1], whole[:, last - 1])


def test_remove_undoes_install() -> None:
    own = DotProductAttention.forward
    adapter.install()
    adapter.install()
    assert DotProductAttention.forward is not own
    adapter.remove()
    assert DotProductAttention.forward is own
    adapter.remove()
    assert adapter.self_check() is None
    assert DotProductAttention.forward is own
