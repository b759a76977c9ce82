"""What the algorithm does to a model.

    MPT                   llm-foundry's functions are replaced in its layers
    MosaicBERT            its encoder and its layers get our forwards
    BERT after `Alibi`    the forward that Composer's own algorithm gave to self-attention is replaced
    transformers models   their configuration says "anyflash", and masks follow; in transformers 4 "sdpa"
    all others            torch's function is ours, in the whole process

Parameters and modules stay the same objects, so that optimizers need no surgery.
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import MethodType
from typing import Any

from torch.nn import Module

from anyflash.adapters import pytorch
from anyflash.adapters import transformers as hf
from anyflash.adapters._composer import alibi
from anyflash.core.log import logger

Undo = list[Callable[[], object]]


def swap(model: Module, undo: Undo) -> None:
    """Put our attention into every part of the model that has one. `undo` gets what takes it out again."""
    layers = 0
    for module in model.modules():
        layers += any(swap_one(module, undo) for swap_one in (_mpt, _mosaicbert, _after_alibi))
    models = 0 if layers else _transformers(model, undo)
    doors = ExitStack()
    doors.enter_context(pytorch.use())
    undo.append(doors.close)
    logger.info("Composer: attention of %d layers, of %d transformers models, and torch's", layers, models)


def _set(module: Any, attribute: str, value: Any, undo: Undo) -> None:
    """On the one object; what its class says, or it itself said before, comes back."""
    if attribute in vars(module):
        own = vars(module)[attribute]
        undo.append(lambda: setattr(module, attribute, own))
    else:
        undo.append(lambda: delattr(module, attribute))
    setattr(module, attribute, value)


def _mpt(module: Module, undo: Undo) -> bool:
    theirs = sys.modules.get("llmfoundry.models.layers.attention")
    if theirs is None or not isinstance(module, theirs.GroupedQueryAttention):
        return False
    from anyflash.adapters._llm_foundry.attention import flash, torch_function

    own = module.attn_fn
    if own is theirs.flash_attn_fn:
        _set(module, "attn_fn", flash, undo)
    elif own is theirs.scaled_multihead_dot_product_attention:
        _set(module, "attn_fn", torch_function(own), undo)
    return True


def _mosaicbert(module: Module, undo: Undo) -> bool:
    kind = type(module)
    if kind.__module__.rpartition(".")[2] != "bert_layers":
        return False
    from anyflash.adapters._mosaicbert.attention import encoder_forward, self_attention

    if kind.__name__ == "BertEncoder":
        _set(module, "forward", MethodType(encoder_forward(kind.forward), module), undo)
    elif kind.__name__ == "BertUnpadSelfAttention":
        _set(module, "forward", MethodType(self_attention, module), undo)
    return kind.__name__ == "BertUnpadSelfAttention"


def _after_alibi(module: Module, undo: Undo) -> bool:
    theirs = sys.modules.get("composer.algorithms.alibi.attention_surgery_functions._bert")
    if theirs is None or getattr(vars(module).get("forward"), "__func__", None) is not theirs.forward:
        return False
    _set(module, "forward", MethodType(alibi.self_attention(theirs.forward), module), undo)
    return True


def _transformers(model: Module, undo: Undo) -> int:
    if "transformers" not in sys.modules:
        return 0
    found = list(_outermost(model))
    swap_one = _named if hf.target.tested(importlib.metadata.version("transformers")) else _to_sdpa
    return sum(swap_one(each, undo) for each in found)


def _named(model: Any, undo: Undo) -> bool:
    """The adapter for transformers knows this version."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if hf.IMPLEMENTATION not in ALL_ATTENTION_FUNCTIONS:
        hf.install()
        undo.append(hf.remove)
    before = model.config._attn_implementation
    model.set_attn_implementation(hf.IMPLEMENTATION)
    undo.append(lambda: model.set_attn_implementation(before))
    return True


def _to_sdpa(model: Any, undo: Undo) -> bool:
    """transformers 4: torch's function is ours, so a model that asks for eager attention is told to call it,
    if it looks its attention up as it runs. Some keep the name for their masks beside the configuration."""
    looks_up = hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS")
    if not looks_up or not model._supports_sdpa or model.config._attn_implementation != "eager":
        return False
    _set(model.config, "_attn_implementation_internal", "sdpa", undo)
    for module in model.modules():
        if vars(module).get("_attn_implementation") == "eager":
            _set(module, "_attn_implementation", "sdpa", undo)
    return True


def _outermost(module: Module) -> Iterator[Any]:
    """The transformers models in it that are in no other one."""
    from transformers import PreTrainedModel

    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from _outermost(child)
