"""Graphs rewritten: by us, as a backend of `torch.compile`, and by Kernl's own patterns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from anyflash.adapters._kernl.call import attention
from anyflash.adapters._kernl.einsum import Axes
from anyflash.adapters._kernl.graph import attentions
from anyflash.adapters._pytorch.functional import scaled_dot_product_attention
from anyflash.core.errors import InvalidCall
from anyflash.core.log import logger

_FUSED = (torch.nn.functional.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention)


def rewrite(gm: GraphModule) -> int:
    """Put our attention where the graph computes one, in place; the number of places."""
    count = 0
    # One at a time: what one attention gives may go straight into the next.
    while (each := next(attentions(gm), None)) is not None:
        count += 1
        last, axes = each.out
        with gm.graph.inserting_before(last):
            operands = [_permuted(gm, *operand) for operand in (each.q, each.keys, each.v)]
            new = gm.graph.call_function(attention, (*operands, each.steps, each.dropout_p))
            new = _permuted(gm, new, axes)
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        for node in (last, *reversed(each.inner)):
            gm.graph.erase_node(node)
    fused = [n for n in gm.graph.nodes if n.op == "call_function" and n.target in _FUSED]
    for node in fused:
        node.target = scaled_dot_product_attention
    gm.recompile()
    count += len(fused)
    logger.info("torch.compile: %d attentions of a graph are ours", count)
    return count


def _permuted(gm: GraphModule, node: Node, axes: Axes | None) -> Node:
    return node if axes is None else gm.graph.call_method("permute", (node, axes))


def backend(
    gm: GraphModule, example_inputs: list[torch.Tensor], *, options: dict[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """For `torch.compile`: the graph with our attention, run as it is or by the backend `options["then"]`.

    Raises InvalidCall for any other option.
    """
    given = dict(options or {})
    then = given.pop("then", None)
    if given:
        raise InvalidCall("options", ", ".join(given), '{"then": name of the backend for the rest}')
    rewrite(gm)
    if then is None:
        return gm.forward
    return torch._dynamo.lookup_backend(then)(gm, example_inputs)


def kernls_patterns(gm: GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
    """For `torch.compile`: the graph as Kernl's own attention patterns rewrite it, its dropout removed."""
    from kernl.optimizer import attention as patterns
    from kernl.optimizer.dropout import remove_dropout
    from kernl.optimizer.normalizer import normalize_operators

    normalize_operators(gm)
    remove_dropout(gm)
    for fuse in (
        patterns.fuse_attention_pattern_1,
        patterns.fuse_attention_pattern_2,
        patterns.fuse_attention_pattern_3,
    ):
        fuse(gm, False)
    gm.recompile()
    return gm.forward
