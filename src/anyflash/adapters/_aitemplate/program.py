"""A graph of AITemplate's front end, run as it is, in the place of the library that AITemplate compiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from anyflash.adapters._aitemplate import operators
from anyflash.core.errors import InvalidCall, Unsupported

_VIEWS = ("reshape", "flatten", "squeeze", "unsqueeze")
Step = tuple[Any, list[Any], Callable[[Mapping[str, int], list[Any]], Any]]


class Program:
    """A graph, sorted. Stands where AITemplate's `compile_model` gives a `Model`, and has its methods.

    A softmax between two batched products, as `nn.MultiheadAttention` builds for long sequences, runs as one
    attention: its scores are never formed.

    Raises Unsupported, naming them, if the graph has operators that there are none for here.
    """

    def __init__(self, outputs: Any, constants: Mapping[str, Tensor] | None = None) -> None:
        self._outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
        sorted_operators = _sorted(self._outputs)
        read = Counter(id(tensor) for each in sorted_operators for tensor in each._attrs["inputs"])
        read.update(id(tensor) for tensor in self._outputs)
        fused = {id(each): _attention(each, read) for each in sorted_operators}
        unread = _unread(sorted_operators, fused, self._outputs)
        self._steps: list[Step] = []
        unknown = set()
        for each in sorted_operators:
            if id(each) in unread:
                continue
            attention = fused[id(each)]
            if attention is not None:
                self._steps.append((each, attention[0], attention[1]))
                continue
            run = _runner(each)
            if run is None:
                unknown.add(each._attrs["op"])
            else:
                self._steps.append((each, list(each._attrs["inputs"]), run))
        if unknown:
            missing = [f"no operator {name}" for name in sorted(unknown)]
            raise Unsupported("this graph of AITemplate's", {"anyflash": missing})
        operands = [tensor for _, inputs, _ in self._steps for tensor in inputs]
        self._last_read = {id(t): step for step, (_, inputs, _) in enumerate(self._steps) for t in inputs}
        for tensor in self._outputs:
            self._last_read[id(tensor)] = len(self._steps)
        sources = {id(t): t for t in (*operands, *self._outputs) if not t._attrs["src_ops"]}.values()
        self._inputs = [t for t in sources if t._attrs["is_input"]]
        self._parameters = [t for t in sources if not t._attrs["is_input"] and t._attrs["value"] is None]
        self._constants: dict[str, Tensor] = {}
        self.set_many_constants_with_tensors(constants or {})

    def set_constant_with_tensor(self, name: str, tensor: Tensor) -> None:
        """Give a parameter its tensor, of any floating type; all of a program are of one."""
        self._constants[name] = tensor

    def set_many_constants_with_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        self._constants.update(tensors)

    def fold_constants(self, *args: Any, **kwargs: Any) -> None:
        """AITemplate computes here what depends on parameters only; a program does when it runs."""

    def get_input_name_to_index_map(self) -> dict[str, int]:
        return {tensor._attrs["name"]: i for i, tensor in enumerate(self._inputs)}

    def get_output_name_to_index_map(self) -> dict[str, int]:
        return {tensor._attrs["name"]: i for i, tensor in enumerate(self._outputs)}

    def get_constant_names(self) -> list[str]:
        return [tensor._attrs["name"] for tensor in self._parameters]

    def get_output_maximum_shape(self, output: int | str) -> list[int]:
        index = self.get_output_name_to_index_map()[output] if isinstance(output, str) else output
        return [max(dim._attrs["values"]) for dim in self._outputs[index]._attrs["shape"]]

    def close(self) -> None:
        """Nothing is held that must be given back."""

    def run_with_tensors(
        self,
        inputs: Sequence[Tensor] | Mapping[str, Tensor],
        outputs: Sequence[Tensor] | Mapping[str, Tensor],
        stream_ptr: int | None = None,
        sync: bool = True,
        graph_mode: bool = False,
    ) -> dict[str, Tensor]:
        """Run, and write the results into `outputs`; gives them by name. Streams and graphs are for GPUs."""
        order = self.get_output_name_to_index_map()
        written = {}
        for (name, index), made in zip(order.items(), self.run(inputs), strict=True):
            room = outputs[name] if isinstance(outputs, Mapping) else outputs[index]
            written[name] = room.view(-1)[: made.numel()].view(made.shape).copy_(made)
        return written

    def run(self, inputs: Sequence[Tensor] | Mapping[str, Tensor]) -> list[Tensor]:
        """The outputs for these inputs, named or in the order of `get_input_name_to_index_map`.

        Differentiable where torch is. Raises InvalidCall if an input or a parameter is missing.
        """
        if not isinstance(inputs, Mapping):
            inputs = dict(zip(self.get_input_name_to_index_map(), inputs, strict=True))
        values: dict[int, Any] = {}
        extents: dict[str, int] = {}
        for tensor in self._inputs:
            values[id(tensor)] = found = _given(tensor, inputs, "inputs")
            names = (dim._attrs["name"] for dim in tensor._attrs["shape"])
            extents.update(zip(names, found.shape, strict=True))
        for tensor in self._parameters:
            values[id(tensor)] = _given(tensor, self._constants, "constants")
        for step, (operator, operands, run) in enumerate(self._steps):
            made = run(extents, [_value(tensor, values) for tensor in operands])
            results = made if isinstance(made, tuple | list) else (made,)
            values.update(zip((id(t) for t in operator._attrs["outputs"]), results, strict=True))
            # What nobody reads any more gives its memory back.
            for tensor in (*operands, *operator._attrs["outputs"]):
                if self._last_read.get(id(tensor), step) <= step:
                    values.pop(id(tensor), None)
            del made, results
        return [values[id(tensor)] for tensor in self._outputs]


def _given(tensor: Any, given: Mapping[str, Tensor], argument: str) -> Tensor:
    name = tensor._attrs["name"]
    if name not in given:
        raise InvalidCall(argument, f"{', '.join(given) or 'none'}", f"{name} among them")
    return given[name]


def _value(tensor: Any, values: Mapping[int, Any]) -> Any:
    return values[id(tensor)] if id(tensor) in values else tensor._attrs["value"]


def _sorted(outputs: Iterable[Any]) -> list[Any]:
    """The operators behind these tensors, each after those that it needs."""
    found: dict[int, Any] = {}
    stack = [(operator, False) for tensor in outputs for operator in tensor._attrs["src_ops"]]
    while stack:
        operator, done = stack.pop()
        if done:
            found.setdefault(id(operator), operator)
        elif id(operator) not in found:
            stack.append((operator, True))
            inputs = operator._attrs["inputs"]
            stack += [(each, False) for tensor in inputs for each in tensor._attrs["src_ops"]]
    return list(found.values())


def _runner(operator: Any) -> Callable[[Mapping[str, int], list[Any]], Any] | None:
    attributes = operator._attrs
    if attributes["op"] in _VIEWS:
        dims = attributes["outputs"][0]._attrs["shape"]
        return lambda extents, given: operators.reshape(given[0], [_extent(dim, extents) for dim in dims])
    run = operators.find(attributes["op"])
    return None if run is None else lambda extents, given: run(attributes, *given)


def _extent(dim: Any, extents: Mapping[str, int]) -> int | None:
    values = dim._attrs["values"]
    return values[0] if len(values) == 1 else extents.get(dim._attrs["name"])


def _only(tensor: Any, name: str, read: Mapping[int, int]) -> Any:
    """The operator behind a tensor, if it is of this name and its result goes nowhere else."""
    sources = list(tensor._attrs["src_ops"])
    if len(sources) != 1 or read[id(tensor)] != 1:
        return None
    return sources[0] if sources[0]._attrs["op"] == name else None


def _attention(
    last: Any, read: Mapping[int, int]
) -> tuple[list[Any], Callable[[Mapping[str, int], list[Any]], Any]] | None:
    """(q, k and v; what runs) if this operator ends bmm_rcr, a scale or none, softmax and bmm_rrr."""
    attributes = last._attrs
    if attributes["op"] not in ("bmm_rrr", "bmm_rrr_permute"):
        return None
    weights, v = attributes["inputs"]
    softmax = _only(weights, "softmax", read)
    if softmax is None or softmax._attrs["dim"] not in (-1, 2):
        return None
    scores, scale = softmax._attrs["inputs"][0], 1.0
    multiply = _only(scores, "elementwise", read)
    if multiply is not None:
        factors = multiply._attrs["args"]
        numbers = [t._attrs["value"] for t in factors if t._attrs["value"] is not None]
        others = [t for t in factors if t._attrs["value"] is None]
        if multiply._attrs["func"].name != "MUL" or len(numbers) != 1 or len(others) != 1:
            return None
        scores, scale = others[0], float(numbers[0])
    first = _only(scores, "bmm_rcr", read)
    if first is None:
        return None
    q, k = first._attrs["inputs"]
    permute = attributes if attributes["op"] == "bmm_rrr_permute" else None
    return [q, k, v], lambda extents, given: operators.product(*given, scale, False, permute)


def _unread(found: Sequence[Any], fused: Mapping[int, Any], outputs: Sequence[Any]) -> set[int]:
    """The operators whose results nobody reads, now that attentions read past them."""
    wanted = {id(tensor) for tensor in outputs}
    unread = set()
    for operator in reversed(found):
        if not any(id(tensor) in wanted for tensor in operator._attrs["outputs"]):
            unread.add(id(operator))
            continue
        attention = fused[id(operator)]
        wanted |= {id(t) for t in (attention[0] if attention else operator._attrs["inputs"])}
    return unread


def compile_model(
    tensor: Any,
    target: Any = None,
    workdir: str = "",
    test_name: str = "",
    *args: Any,
    constants: Mapping[str, torch.Tensor] | None = None,
    **kwargs: Any,
) -> Program:
    """In the place of AITemplate's `compile_model`: nothing is compiled, and nothing written to `workdir`."""
    return Program(tensor, constants)
