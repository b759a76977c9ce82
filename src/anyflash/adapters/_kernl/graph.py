"""Attention in a graph of torch operations: found by its softmax, however it is spelled.

    product of q and k  ->  steps on the scores  ->  softmax over keys  ->  dropout  ->  product with v

Steps are sums, differences, products and quotients with numbers and tensors, tanh, masked_fill and where, in
any order and number, as operators, functions or methods, in place or not; casts between floating types are
passed over. What else looks at the scores or the probabilities (a model that returns its weights) keeps the
attention as it is, since the matrix would be formed anyhow.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from anyflash.adapters._kernl import einsum

_FUNCTIONS: dict[Any, str] = {
    operator.matmul: "product",
    torch.matmul: "product",
    torch.bmm: "product",
    torch.einsum: "einsum",
    torch.baddbmm: "sum of a product",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.sub: "sub",
    operator.isub: "sub",
    torch.sub: "sub",
    operator.mul: "mul",
    operator.imul: "mul",
    torch.mul: "mul",
    operator.truediv: "div",
    operator.itruediv: "div",
    torch.div: "div",
    torch.true_divide: "div",
    torch.tanh: "tanh",
    torch.masked_fill: "fill",
    torch.where: "where",
    torch.softmax: "softmax",
    torch.nn.functional.softmax: "softmax",
    torch.dropout: "dropout",
    torch.nn.functional.dropout: "dropout",
}
_METHODS = {
    "matmul": "product",
    "bmm": "product",
    "baddbmm": "sum of a product",
    "add": "add",
    "add_": "add",
    "sub": "sub",
    "sub_": "sub",
    "mul": "mul",
    "mul_": "mul",
    "div": "div",
    "div_": "div",
    "tanh": "tanh",
    "masked_fill": "fill",
    "masked_fill_": "fill",
    "softmax": "softmax",
    "to": "cast",
    "float": "cast",
    "half": "cast",
    "bfloat16": "cast",
    "double": "cast",
    "type": "cast",
    "type_as": "cast",
    "contiguous": "cast",
}

Step = tuple[Any, ...]
Operand = tuple[Node, einsum.Axes | None]


@dataclass(frozen=True, slots=True)
class Found:
    """One attention of a graph.

    q       (..., q, dim), scaled or not; keys (..., dim, k): k as the product has it; v (..., k, value dim);
            each a node and, if it has another order of axes, how to permute it
    steps   ("mul", operand), ("fill", condition, value), ...: applied to the scores in this order
    out     the node that has its result, and how to permute (..., q, value dim) to it
    inner   the nodes that only this attention needs, each before those that use it
    """

    q: Operand
    keys: Operand
    v: Operand
    steps: tuple[Step, ...]
    dropout_p: float
    out: Operand
    inner: tuple[Node, ...]


def attentions(gm: GraphModule) -> Iterator[Found]:
    """Every attention of the graph that no one else looks into."""
    for node in gm.graph.nodes:
        if kind(gm, node) == "softmax" and _over_keys(gm, node):
            found = _around(gm, node)
            if found is not None:
                yield found


def kind(gm: GraphModule, node: Node) -> str | None:
    """What a node does, by one name for all spellings; None for what takes no part in attention."""
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target)
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return {nn.Softmax: "softmax", nn.Dropout: "dropout", nn.Identity: "cast"}.get(type(module))
    return None


def value(node: Any) -> torch.Tensor | None:
    """What stands for the tensor that a node gives; None if it gives none, or the graph does not say."""
    found = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, Node) else None
    return found if isinstance(found, torch.Tensor) else None


def _around(gm: GraphModule, softmax: Node) -> Found | None:
    after = _after(gm, softmax)
    if after is None:
        return None
    out, v, dropout_p, passed = after
    before = _before(gm, softmax.args[0], {softmax, *passed})
    if before is None:
        return None
    (q, keys), steps, inner = before
    values = [value(each) for each in (q[0], keys[0], v[0], inner[0])]
    if any(each is None or not each.is_floating_point() for each in values):
        return None
    if len({each.dtype for each in values}) > 1 or len({each.ndim for each in values}) > 1:
        return None
    if values[0].ndim < 2 or 0 in values[-1].shape:
        return None
    return Found(q, keys, v, steps, dropout_p, out, (*inner, softmax, *passed))


def _after(gm: GraphModule, softmax: Node) -> tuple[Operand, Operand, float, list[Node]] | None:
    """What follows the probabilities: (the product with v, v, dropout_p, the nodes in between)."""
    node, dropout_p, passed = softmax, 0.0, []
    while True:
        users = list(node.users)
        if len(users) != 1:
            return None
        (user,) = users
        what = kind(gm, user)
        if what == "einsum":
            found = einsum.with_values(user, node)
            return found and ((user, found[1]), found[0], dropout_p, passed)
        if not user.args or user.args[0] is not node:
            return None
        if what == "product":
            return ((user, None), (user.args[1], None), dropout_p, passed)
        if what == "dropout":
            chance = _dropout(gm, user)
            if chance is None or (chance and dropout_p):
                return None
            dropout_p = dropout_p or chance
        elif what != "cast":
            return None
        passed.append(user)
        node = user


def _dropout(gm: GraphModule, node: Node) -> float | None:
    """The chance to be dropped; None if the graph computes it, or drops all."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        p, training = module.p, module.training
    else:
        p, training = _arguments(node, p=0.5, training=True)
    if isinstance(p, Node) or isinstance(training, Node):
        return None
    return None if training and p >= 1 else float(p) if training else 0.0


def _arguments(node: Node, **defaults: Any) -> list[Any]:
    """Of a call, in this order, after its tensor."""
    given = dict(zip(defaults, node.args[1:], strict=False)) | dict(node.kwargs)
    return [given.get(name, default) for name, default in defaults.items()]


def _over_keys(gm: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        dim = gm.get_submodule(str(node.target)).dim
    else:
        (dim,) = _arguments(node, dim=None)
    scores = value(node)
    return bool(node.args) and scores is not None and dim in (-1, scores.ndim - 1)


def _before(
    gm: GraphModule, node: Any, known: set[Node]
) -> tuple[tuple[Operand, Operand], tuple[Step, ...], list[Node]] | None:
    """((q, keys), steps, nodes from the product on) that end in these scores. `known` may look at them: what
    makes the probabilities, and casts to the type of the scores, which vanish with them."""
    scores = value(node)
    if scores is None or not scores.is_floating_point() or node.users.keys() - known:
        return None
    what = kind(gm, node)
    if what == "product":
        return ((node.args[0], None), (node.args[1], None)), (), [node]
    if what == "einsum":
        operands = einsum.of_scores(node)
        return operands and (operands, (), [node])
    if what == "sum of a product":
        return _sum_of_product(node)
    for source, step in _readings(what, node):
        origin = value(source)
        if origin is not None and origin.shape == scores.shape:
            before = _before(gm, source, known | {node})
            if before is not None:
                operands, steps, inner = before
                return operands, (*steps, *step), [*inner, node]
    return None


def _sum_of_product(node: Node) -> tuple[tuple[Operand, Operand], tuple[Step, ...], list[Node]] | None:
    """beta * bias + alpha * (q @ keys)"""
    q, keys, beta, alpha = _arguments(node, batch1=None, batch2=None, beta=1, alpha=1)
    if isinstance(beta, Node) or isinstance(alpha, Node):
        return None
    steps: tuple[Step, ...] = (("mul", alpha),)
    # Without beta there is no bias, whatever lies in its memory.
    if beta:
        steps = (("mul", alpha / beta), ("add", node.args[0]), ("mul", beta))
    return ((q, None), (keys, None)), steps, [node]


def _readings(what: str | None, node: Node) -> Iterator[tuple[Any, tuple[Step, ...]]]:
    """The ways to see a node as a step on scores: (where they come from, the step if it is one)."""
    args = node.args
    if what == "cast":
        yield args[0], ()
    elif what == "tanh":
        yield args[0], (("tanh",),)
    elif what in ("add", "mul") and not node.kwargs and len(args) == 2:
        yield args[0], ((what, args[1]),)
        yield args[1], ((what, args[0]),)
    elif what in ("sub", "div") and not node.kwargs and len(args) == 2:
        yield args[0], ((what, args[1]),)
    elif what == "fill":
        mask, filled = _arguments(node, mask=None, value=None)
        yield args[0], (("fill", mask, filled),)
    elif what == "where" and len(args) == 3:
        condition, yes, no = args
        yield no, (("fill", condition, yes),)
        yield yes, (("keep", condition, no),)
