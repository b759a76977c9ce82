"""The two products of attention written as `torch.einsum`: which axes of what are rows, keys and width."""

from __future__ import annotations

import re

from torch.fx import Node

Axes = tuple[int, ...]
_EQUATION = re.compile(r"([A-Za-z]+),([A-Za-z]+)->([A-Za-z]+)")


def of_scores(node: Node) -> tuple[tuple[Node, Axes], tuple[Node, Axes]] | None:
    """q to (..., q, dim) and keys to (..., dim, k), each with the axes that bring it there; None if the node
    is no such product, or one operand lacks leading axes."""
    parsed = _parse(node)
    if parsed is None:
        return None
    a, b, out, first, second = parsed
    *lead, row, key = out
    if row in b:
        a, b, first, second = b, a, second, first
    width = set(a) & set(b) - set(lead)
    if len(width) != 1:
        return None
    (dim,) = width
    q, keys = _axes(a, (*lead, row, dim)), _axes(b, (*lead, dim, key))
    return None if q is None or keys is None else ((first, q), (second, keys))


def with_values(node: Node, weights: Node) -> tuple[tuple[Node, Axes], Axes] | None:
    """v with the axes that bring it to (..., k, value dim), and those that bring (..., q, value dim) to what
    the node gives; None if it is no such product of these weights (..., q, k)."""
    parsed = _parse(node)
    if parsed is None:
        return None
    a, b, out, first, second = parsed
    if second is weights:
        a, b, first, second = b, a, second, first
    if first is not weights or second is weights:
        return None
    *lead, row, key = a
    width = set(b) - set(a)
    if len(width) != 1:
        return None
    (dim,) = width
    v, result = _axes(b, (*lead, key, dim)), _axes("".join((*lead, row, dim)), tuple(out))
    return None if v is None or result is None else ((second, v), result)


def _parse(node: Node) -> tuple[str, str, str, Node, Node] | None:
    """(labels of both operands, labels of the result, the operands)."""
    if len(node.args) != 3 or not isinstance(node.args[0], str):
        return None
    match = _EQUATION.fullmatch(node.args[0].replace(" ", ""))
    _, first, second = node.args
    if match is None or not isinstance(first, Node) or not isinstance(second, Node):
        return None
    if len(match[3]) < 2 or any(len(set(labels)) != len(labels) for labels in match.groups()):
        return None
    return match[1], match[2], match[3], first, second


def _axes(labels: str, wanted: tuple[str, ...]) -> Axes | None:
    return tuple(labels.index(each) for each in wanted) if sorted(labels) == sorted(wanted) else None
