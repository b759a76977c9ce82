"""Graphs of AITemplate's front end, run: its operators, its attention modules, its BERT."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402

from anyflash.adapters import aitemplate as adapter  # noqa: E402
from anyflash.adapters._aitemplate import operators  # noqa: E402
from anyflash.core.errors import InvalidCall, Unsupported  # noqa: E402

DOUBLE = torch.float64
B, H, S, T, D = 2, 3, 6, 9, 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=DOUBLE, generator=generator)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    bound = 1024 * torch.finfo(DOUBLE).eps * max(float(wanted.detach().abs().max()), 1.0)
    assert float((found - wanted).detach().abs().max()) <= bound


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, hidden: torch.Tensor | None = None
) -> torch.Tensor:
    scores = q @ k.mT * scale
    return (scores if hidden is None else scores.masked_fill(hidden, -math.inf)).softmax(-1) @ v


fast_gelu = partial(functional.gelu, approximate="tanh")
UPPER = torch.ones(S, T, dtype=torch.bool).triu(1)

A, W, BIAS, MORE = draw(B, S, D), draw(12, D), draw(12), draw(B, S, 12)
Q, K, V = draw(B * H, S, D), draw(B * H, T, D), draw(B * H, T, 5)
BY_NAME: dict[str, tuple[dict[str, Any], tuple[torch.Tensor, ...], Callable[[], torch.Tensor]]] = {
    "gemm_rcr": ({}, (A, W), lambda: A @ W.mT),
    "gemm_rrr": ({}, (A, W.mT), lambda: A @ W.mT),
    "gemm_rcr_bias": ({}, (A, W, BIAS), lambda: A @ W.mT + BIAS),
    "gemm_rcr_bias_add": ({}, (A, W, BIAS, MORE), lambda: A @ W.mT + BIAS + MORE),
    "gemm_rcr_bias_gelu": ({}, (A, W, BIAS), lambda: functional.gelu(A @ W.mT + BIAS)),
    "gemm_rcr_bias_fast_gelu": ({}, (A, W, BIAS), lambda: fast_gelu(A @ W.mT + BIAS)),
    "gemm_rcr_bias_mul_add": ({}, (A, W, BIAS, MORE, A @ W.mT), lambda: (A @ W.mT + BIAS) * MORE + A @ W.mT),
    "gemm_rcr_bias_sigmoid_mul": ({}, (A, W, BIAS, MORE), lambda: (A @ W.mT + BIAS).sigmoid() * MORE),
    "gemm_rcr_permute": (
        {"shape": (S, 3)},
        (A.flatten(0, 1), W),
        lambda: (A @ W.mT).view(B, S, 3, 4).permute(0, 2, 1, 3),
    ),
    "gemm_rcr_bias_permute": (
        {"shape": (S, 3, 2)},
        (A.flatten(0, 1), W, BIAS),
        lambda: (A @ W.mT + BIAS).view(B, S, 3, 2, 2).permute(2, 0, 3, 1, 4),
    ),
    "bmm_rcr": ({}, (Q, K), lambda: Q @ K.mT),
    "bmm_ccr_add": ({}, (Q.mT, K, Q @ K.mT), lambda: 2 * (Q @ K.mT)),
    "bmm_rcc": ({}, (Q, K), lambda: (Q @ K.mT).mT),
    "bmm_rrr_permute": ({"shape": (H,)}, (Q, K.mT), lambda: (Q @ K.mT).view(B, H, S, T).transpose(1, 2)),
    "permute0213": ({}, (draw(2, 3, 4, 5),), lambda: draw(2, 3, 4, 5).permute(0, 2, 1, 3)),
    "bmm_softmax_bmm": ({"op": "bmm_softmax_bmm", "scale": 0.3}, (Q, K, V), lambda: plain(Q, K, V, 0.3)),
    "bmm_softmax_bmm_permute": (
        {"op": "bmm_softmax_bmm_permute", "scale": 0.3, "shape": (H,)},
        (Q, K, V),
        lambda: plain(Q, K, V, 0.3).view(B, H, S, 5).transpose(1, 2),
    ),
    "bmm_softmax_bmm_permute_causal": (
        {"op": "bmm_softmax_bmm_permute_causal", "scale": 0.3, "shape": (H,)},
        (Q, K, V),
        lambda: plain(Q, K, V, 0.3, UPPER).view(B, H, S, 5).transpose(1, 2),
    ),
}


@pytest.mark.parametrize("name", BY_NAME)
def test_operators(name: str) -> None:
    attributes, inputs, wanted = BY_NAME[name]
    run = operators.find(name)
    assert run is not None
    close(run(attributes, *inputs), wanted())


@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention(causal: bool) -> None:
    """Sequences of different lengths, and gradients."""
    lengths = (4, 1, 7)
    qkv = draw(sum(lengths), 3, H, D).requires_grad_()
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    found = operators.find("flash_attention")({"causal": causal}, qkv, bounds)
    parts = []
    for part in qkv.split(lengths):
        q, k, v = part.permute(1, 2, 0, 3)
        n = len(part)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1) if causal else None
        parts.append(plain(q, k, v, D**-0.5, hidden).transpose(0, 1))
    wanted = torch.cat(parts)
    close(found, wanted)
    close(*(torch.autograd.grad(each.square().sum(), qkv)[0] for each in (found, wanted)))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("given", ["", "kv", "q", "kv q"])
def test_attention_of_lengths(given: str, causal: bool) -> None:
    """Causal from the first key, keys up to each entry's length; rows past theirs are 0."""
    q, k, v = draw(B, H, S, D), draw(B, H, T, D), draw(B, H, T, 5)
    lengths = {"kv": torch.tensor([9, 4], dtype=torch.int32), "q": torch.tensor([2, 6], dtype=torch.int32)}
    attributes = {"causal": causal} | {
        f"variable_seq_length_{each}": each in given.split() for each in lengths
    }
    used = [lengths[each] for each in given.split()]
    found = operators.find("mem_eff_attention")(attributes, q, k, v, *used)
    hidden = UPPER if causal else torch.zeros(S, T, dtype=torch.bool)
    if "kv" in given.split():
        hidden = hidden | (torch.arange(T) >= lengths["kv"][:, None, None, None])
    wanted = plain(q, k, v, D**-0.5, hidden).transpose(1, 2)
    if "q" in given.split():
        wanted = wanted.masked_fill((torch.arange(S) >= lengths["q"][:, None])[..., None, None], 0.0)
    close(found, wanted)


@pytest.mark.parametrize("name", ["conv2d", "gemm_rcr_bias_softmax", "gemm_rcr_permute_elup1", "topk"])
def test_no_such_operator(name: str) -> None:
    assert operators.find(name) is None


def test_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without AITemplate the self-check says how to get it, and nothing is installed."""
    monkeypatch.setitem(sys.modules, "aitemplate", None)
    assert "git clone https://github.com/facebookincubator/AITemplate" in (adapter.self_check() or "")
    assert not adapter._undo


@pytest.fixture(scope="module")
def checkout() -> Iterator[Any]:
    """The checkout's front end, whose import takes seconds; its example is imported from beside it."""
    if adapter.source.folder() is None:
        pytest.skip(f"{adapter.source.variable} names no checkout of AITemplate")
    pytest.importorskip("jinja2")
    pytest.importorskip("sympy")
    with adapter.importable() as root, pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root.parent / "examples" / "03_bert"))
        yield pytest.importorskip("aitemplate")
    for module in [name for name in sys.modules if name.partition(".")[0] == "modeling"]:
        del sys.modules[module]


@pytest.fixture
def aitemplate(checkout: Any) -> Iterator[Any]:
    adapter.install()
    yield checkout
    adapter.remove()


def parameters(module: Any) -> dict[str, torch.Tensor]:
    """Random, by the names that the graph has for them; packed sequences are all of one length."""
    module.name_parameter_tensor()
    found = {}
    for i, (name, parameter) in enumerate(module.named_parameters()):
        shape = [dim.value() for dim in parameter.tensor().shape()]
        found[name.replace(".", "_")] = draw(*shape, seed=i) / 3
    return found


def inputs_of(*shapes: tuple[str, list[int]]) -> list[Any]:
    from aitemplate.frontend import Tensor

    return [Tensor(shape=shape, name=name, is_input=True) for name, shape in shapes]


def operator_names(program: Any) -> list[str]:
    return [operator._attrs["op"] for operator, _, _ in program._steps]


BRANCHES = {
    "flash": (2, 6, {}),
    "mem_eff": (2, 6, {"use_mem_eff": True}),
    "products": (1, 512, {}),
    "causal": (2, 6, {"causal": True}),
    "output-mask": (2, 6, {"mask_seq": 4}),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_multihead_attention(aitemplate: Any, name: str) -> None:
    """Every way its front end has to spell attention; the product of softmax and v runs as one, unseen."""
    from aitemplate.frontend import nn

    batch, rows, given = BRANCHES[name]
    module = nn.MultiheadAttention(32, batch, rows, num_heads=4, qkv_bias=True, **given)
    values = parameters(module)
    values["cu_length"] = torch.arange(batch + 1, dtype=torch.int32) * rows
    if given.get("mask_seq"):
        # The last rows are cut off, then filled with a parameter.
        values["cu_length"][-1] -= given["mask_seq"]
    shape = [batch, rows, 32]
    program = adapter.program(module(*inputs_of(("x", shape), ("residual", shape))), values)
    assert "softmax" not in operator_names(program)
    x, residual = draw(batch, rows, 32), draw(batch, rows, 32, seed=1)
    (found,) = program.run({"x": x, "residual": residual})
    qkv = x @ values["qkv_weight"].mT + values["qkv_bias"]
    hidden = torch.ones(rows, rows, dtype=torch.bool).triu(1) if given.get("causal") else None
    if name == "output-mask":
        hidden = torch.zeros(batch, 1, rows, rows, dtype=torch.bool)
        hidden[-1, ..., rows - 4 :] = True
    q, k, v = qkv.view(batch, rows, 3, 4, 8).permute(2, 0, 3, 1, 4)
    heads = plain(q, k, v, 8**-0.5, hidden).transpose(1, 2)
    if name == "output-mask":
        heads = torch.cat([heads.flatten(0, 1)[:-4], values["output_mask"]]).view_as(heads)
    close(found, heads.flatten(2) @ values["proj_weight"].mT + values["proj_bias"] + residual)


def test_cross_attention(aitemplate: Any) -> None:
    from aitemplate.frontend import nn

    module = nn.CrossAttention(32, 6, 9, 4, qkv_bias=True, has_residual=False)
    values = parameters(module)
    shapes = ("q", [2, 6, 32]), ("k", [2, 9, 32]), ("v", [2, 9, 32])
    program = adapter.program(module(*inputs_of(*shapes)), values)
    given = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes)}
    (found,) = program.run(given)
    q, k, v = (
        (t @ values[f"proj_{n}_weight"].mT + values[f"proj_{n}_bias"]).unflatten(-1, (4, 8)).transpose(1, 2)
        for n, t in given.items()
    )
    heads = plain(q, k, v, 8**-0.5).transpose(1, 2).flatten(2)
    close(found, heads @ values["proj_weight"].mT + values["proj_bias"])


def test_bert(aitemplate: Any) -> None:
    """AITemplate's example, embeddings included, compiled as there, against transformers' of its weights."""
    transformers = pytest.importorskip("transformers")
    from aitemplate.compiler import compile_model
    from aitemplate.frontend import Tensor
    from aitemplate.testing import detect_target
    from modeling.bert import BertModel

    sizes = {
        "vocab_size": 50, "max_position_embeddings": 16, "type_vocab_size": 2, "num_hidden_layers": 2,
        "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "hidden_act": "gelu",
        "layer_norm_eps": 1e-12, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
    }  # fmt: skip
    torch.manual_seed(0)
    own = transformers.BertModel(
        transformers.BertConfig(**sizes, attn_implementation="eager"), add_pooling_layer=False
    ).double()
    for parameter in own.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = BertModel(batch_size=3, seq_len=10, **sizes)
    model.name_parameter_tensor()
    names = ("input_ids", "token_type_ids", "position_ids")
    given = [Tensor(shape=[3, 10], name=name, dtype="int64", is_input=True) for name in names]
    (out,) = model(*given)
    out._attrs["is_output"], out._attrs["name"] = True, "output_0"
    program = compile_model(out, detect_target(), "./tmp", "bert")
    weights = own.state_dict()
    renamed = {
        "self_qkv": ("self.query", "self.key", "self.value"),
        "self_proj": ("output.dense",),
    }
    for name in program.get_constant_names():
        if name.endswith("cu_length"):
            program.set_constant_with_tensor(name, torch.arange(4, dtype=torch.int32) * 10)
            continue
        found = [each for each in weights if each.replace(".", "_") == name]
        for short, parts in renamed.items():
            if f"attention_{short}_" in name:
                layer, kind = name.split("_")[2], name.rpartition("_")[2]
                found = [f"encoder.layer.{layer}.attention.{part}.{kind}" for part in parts]
        program.set_constant_with_tensor(name, torch.cat([weights[each] for each in found]))
    program.fold_constants(sync=True)
    generator = torch.Generator().manual_seed(1)
    tokens = {
        "input_ids": torch.randint(50, (3, 10), generator=generator),
        "token_type_ids": torch.randint(2, (3, 10), generator=generator),
        "position_ids": torch.arange(10).expand(3, 10),
    }
    assert program.get_output_maximum_shape(0) == [3, 10, 32]
    room = torch.empty(program.get_output_maximum_shape("output_0"), dtype=DOUBLE)
    with torch.no_grad():
        made = program.run_with_tensors(tokens, [room], graph_mode=True)
        wanted = own.eval()(**tokens).last_hidden_state
    assert made["output_0"].data_ptr() == room.data_ptr()
    # transformers takes the softmax of its scores in the type they have: float64.
    close(room, wanted)


def test_memory_is_given_back(aitemplate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of operators holds two of its tensors at a time, not all."""
    import weakref

    from aitemplate.compiler import ops
    from aitemplate.compiler.ops.common.epilogue import FuncEnum

    made: list[Any] = []
    alive: list[int] = []

    def tanh(x: torch.Tensor) -> torch.Tensor:
        alive.append(sum(each() is not None for each in made))
        out = torch.tanh(x)
        made.append(weakref.ref(out))
        return out

    monkeypatch.setitem(operators._UNARY, "tanh", tanh)
    (t,) = inputs_of(("x", [2, 6]))
    for _ in range(6):
        t = ops.elementwise(FuncEnum.TANH)(t)
    adapter.program(t).run([draw(2, 6)])
    assert alive == [0, 1, 1, 1, 1, 1]


def test_dynamic_batch(aitemplate: Any) -> None:
    """One program for several batch sizes; an axis that the graph leaves open comes from the input."""
    from aitemplate.compiler import ops
    from aitemplate.frontend import IntVar, Tensor

    x = Tensor(shape=[IntVar([1, 4], name="batch"), 6, 32], name="x", is_input=True)
    program = adapter.program(ops.reshape()(x, [-1, 6, 4, 8]))
    for batch in (1, 3):
        given = draw(batch, 6, 32)
        assert torch.equal(program.run([given])[0], given.view(batch, 6, 4, 8))


def test_elementwise(aitemplate: Any) -> None:
    """Numbers stand where they were written; a scale that is a tensor leaves the products as they are."""
    from aitemplate.compiler import ops
    from aitemplate.compiler.ops.common.epilogue import FuncEnum

    shapes = ("q", [6, S, D]), ("k", [6, T, D]), ("v", [6, T, 8]), ("scale", [6, S, T])
    q, k, v, scale = inputs_of(*shapes)
    given = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes)}
    products = ops.bmm_rcr()(q, k)
    scores = ops.elementwise(FuncEnum.MUL)(products, scale)
    out = ops.bmm_rrr()(ops.softmax()(scores, -1), v)
    less = ops.elementwise(FuncEnum.TANH)(ops.elementwise(FuncEnum.SUB)(1.0, out))
    program = adapter.program([less, out])
    assert "softmax" in operator_names(program)
    found = program.run(given)
    wanted = (given["q"] @ given["k"].mT * given["scale"]).softmax(-1) @ given["v"]
    close(found[1], wanted)
    close(found[0], (1.0 - wanted).tanh())
    with pytest.raises(Unsupported, match="no elementwise floor_div"):
        adapter.program(ops.elementwise(FuncEnum.FLOOR_DIV)(scores, scale)).run(given)


def test_weights_that_are_an_output(aitemplate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax that is looked at is computed, and used."""
    from aitemplate.compiler import ops

    monkeypatch.setattr(operators, "product", None)
    shapes = ("q", [6, S, D]), ("k", [6, T, D]), ("v", [6, T, 8])
    q, k, v = inputs_of(*shapes)
    given = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(shapes)}
    weights = ops.softmax()(ops.bmm_rcr()(q, k), -1)
    found = adapter.program([ops.bmm_rrr()(weights, v), weights]).run(given)
    wanted = (given["q"] @ given["k"].mT).softmax(-1)
    close(found[1], wanted)
    close(found[0], wanted @ given["v"])


def test_what_is_missing(aitemplate: Any) -> None:
    from aitemplate.compiler import ops

    (x,) = inputs_of(("x", [2, 6, 32]))
    program = adapter.program(ops.permute()(x, [0, 2, 1]))
    with pytest.raises(InvalidCall, match="inputs: y; expected x among them"):
        program.run({"y": draw(2, 6, 32)})
    with pytest.raises(Unsupported, match="no operator topk"):
        adapter.program(ops.topk(k=3)(x))


def test_install_and_remove(aitemplate: Any) -> None:
    from aitemplate import compiler

    from anyflash.adapters._aitemplate.program import compile_model

    inner = sys.modules["aitemplate.compiler.compiler"]
    adapter.install()
    assert compiler.compile_model is inner.compile_model is compile_model
    adapter.remove()
    own = compiler.compile_model
    assert own is inner.compile_model is not compile_model
    assert adapter._WITHOUT_GPU not in os.environ
    adapter.remove()
    assert adapter.self_check() is None
    assert compiler.compile_model is inner.compile_model is own
