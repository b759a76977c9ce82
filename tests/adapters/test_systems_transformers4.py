"""What Colossal-AI and Kernl were written for: models of transformers 4, with our attention under theirs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if not transformers.__version__.startswith("4."):
    pytest.skip("needs transformers 4: make test-systems", allow_module_level=True)

from anyflash.adapters import colossalai, kernl  # noqa: E402
from anyflash.adapters._kernl.backend import rewrite  # noqa: E402
from anyflash.adapters._kernl.call import attention_of_kernl  # noqa: E402

DOUBLE = torch.float64
B, S = 3, 9
PRESENT = torch.tensor([[1] * 9, [1] * 5 + [0] * 4, [0] * 2 + [1] * 7])


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype = DOUBLE) -> None:
    assert found.shape == wanted.shape
    bound = 1024 * torch.finfo(dtype).eps * max(float(wanted.detach().abs().max()), 1.0)
    assert float((found - wanted).detach().abs().max()) <= bound


@pytest.fixture
def sharded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Colossal-AI's attention layers for OPT and GPT-2, ours installed. What they import of pipelines and
    shards they do not call."""
    if colossalai.source.folder() is None:
        pytest.skip(f"{colossalai.source.variable} names no checkout of Colossal-AI")
    pytest.importorskip("einops")
    with colossalai.importable() as root:
        attn = importlib.import_module("colossalai.shardformer.layer.attn")
        layer = sys.modules["colossalai.shardformer.layer"]
        layer.__dict__.update(vars(attn), dist_cross_entropy=None)
        modeling = ModuleType("colossalai.shardformer.modeling")
        modeling.__path__ = [str(root / "colossalai" / "shardformer" / "modeling")]
        unused = {
            "colossalai.shardformer.layer._operation": ("gather_sp_output", "split_forward_gather_backward"),
            "colossalai.pipeline": (),
            "colossalai.pipeline.stage_manager": ("PipelineStageManager",),
            "colossalai.shardformer.shard": ("ShardConfig",),
        }
        monkeypatch.setitem(sys.modules, modeling.__name__, modeling)
        for name, members in unused.items():
            module = ModuleType(name)
            module.__dict__.update(dict.fromkeys(members, object))
            monkeypatch.setitem(sys.modules, name, module)
        colossalai.install()
        try:
            attn.ColoAttention._init_kernels_dispatch()
            kernels = attn.ColoAttention._kernel_dispatch_map
            kernels[DOUBLE] = kernels[torch.float32]
            yield attn
        finally:
            colossalai.remove()


def layers(sharded: Any, name: str) -> tuple[Any, Any]:
    """(a layer of transformers, Colossal-AI's forward for it)"""
    module = importlib.import_module(f"colossalai.shardformer.modeling.{name}")
    torch.manual_seed(0)
    shard = SimpleNamespace(sequence_parallelism_mode=None)
    if name == "opt":
        config = transformers.OPTConfig(hidden_size=32, num_attention_heads=4, attn_implementation="eager")
        layer = transformers.models.opt.modeling_opt.OPTAttention(config, layer_idx=0)
        return layer.double().eval(), module.get_opt_flash_attention_forward(shard)
    config = transformers.GPT2Config(n_embd=32, n_head=4, n_positions=16, attn_implementation="eager")
    layer = transformers.models.gpt2.modeling_gpt2.GPT2Attention(config, layer_idx=0)
    return layer.double().eval(), module.get_gpt2_flash_attention_forward(shard)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_layers_of_colossalai(sharded: Any, name: str, padded: bool) -> None:
    """Causal, the masks prepared by Colossal-AI; transformers' own eager layer beside it, with gradients."""
    layer, forward = layers(sharded, name)
    present = PRESENT if padded else torch.ones_like(PRESENT)
    x = torch.randn(B, S, 32, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    prepared = sharded.ColoAttention.prepare_attn_kwargs(
        (B, 1, S, S), DOUBLE, x.device, q_padding_mask=present if padded else None, is_causal=True
    )
    seen = torch.ones(S, S, dtype=torch.bool).tril() & present[:, None, None].bool()
    # Finite in float32 as well, in which both of transformers' layers take their softmax.
    mask = torch.zeros(B, 1, S, S, dtype=DOUBLE).masked_fill(~seen, torch.finfo(torch.float32).min)
    results = []
    for out in (forward(layer, x, attention_mask=prepared)[0], layer(x, attention_mask=mask)[0]):
        rows = out[present.bool()]
        results.append([rows, *torch.autograd.grad(rows.square().sum(), (x, *layer.parameters()))])
    for mine, wanted in zip(*results, strict=True):
        close(mine, wanted, torch.float32)


def bert() -> tuple[Any, dict[str, torch.Tensor]]:
    """Heads of 64, for which alone Kernl's pattern is written."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=128, num_attention_heads=2, num_hidden_layers=2, intermediate_size=64, vocab_size=50,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.BertModel(config, add_pooling_layer=False).double().eval()
    tokens = torch.randint(50, (B, S), generator=torch.Generator().manual_seed(1))
    return model, {"input_ids": tokens, "attention_mask": PRESENT}


@pytest.mark.parametrize("whose", ["ours", "kernl"])
def test_bert_rewritten(whose: str) -> None:
    """Both layers: by our search, and by Kernl's own patterns with our attention behind them."""
    if whose == "kernl" and kernl.source.folder() is None:
        pytest.skip(f"{kernl.source.variable} names no checkout of Kernl")
    model, inputs = bert()
    counts = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        if whose == "ours":
            counts.append(rewrite(gm))
            return gm.forward
        run = kernl.kernls_patterns(gm, example_inputs)
        counts.append(sum(node.target is attention_of_kernl for node in gm.graph.nodes))
        return run

    torch._dynamo.reset()
    with torch.no_grad():
        wanted = model(**inputs).last_hidden_state
        compiled = torch.compile(model, backend=backend)
        if whose == "ours":
            found = compiled(**inputs).last_hidden_state
        else:
            with kernl.importable():
                kernl.install()
                try:
                    found = compiled(**inputs).last_hidden_state
                finally:
                    kernl.remove()
    assert sum(counts) == 2
    close(found[PRESENT.bool()], wanted[PRESENT.bool()])
