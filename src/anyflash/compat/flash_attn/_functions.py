"""The autograd functions by name. They are not functions of autograd here: `apply` calls what is
differentiable already. `is_grad_enabled`, their last argument, tells upstream whether to save anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from anyflash.compat.flash_attn import _functional


def _named(name: str, function: Callable[..., Any]) -> type:
    def apply(*arguments: Any) -> Any:
        *call, _is_grad_enabled = arguments
        return function(*call)

    return type(name, (), {"apply": staticmethod(apply), "__doc__": f"`{function.__name__}` by position."})


FlashAttnFunc = _named("FlashAttnFunc", _functional.flash_attn_func)
FlashAttnKVPackedFunc = _named("FlashAttnKVPackedFunc", _functional.flash_attn_kvpacked_func)
FlashAttnQKVPackedFunc = _named("FlashAttnQKVPackedFunc", _functional.flash_attn_qkvpacked_func)
FlashAttnVarlenFunc = _named("FlashAttnVarlenFunc", _functional.flash_attn_varlen_func)
FlashAttnVarlenKVPackedFunc = _named(
    "FlashAttnVarlenKVPackedFunc", _functional.flash_attn_varlen_kvpacked_func
)
FlashAttnVarlenQKVPackedFunc = _named(
    "FlashAttnVarlenQKVPackedFunc", _functional.flash_attn_varlen_qkvpacked_func
)
