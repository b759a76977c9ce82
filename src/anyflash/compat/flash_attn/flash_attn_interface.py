"""`flash_attn.flash_attn_interface`: every function by name, those of version 1 and the private ones
included."""

from __future__ import annotations

from anyflash.compat.flash_attn import _gpu as flash_attn_gpu
from anyflash.compat.flash_attn._functional import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from anyflash.compat.flash_attn._functions import (
    FlashAttnFunc,
    FlashAttnKVPackedFunc,
    FlashAttnQKVPackedFunc,
    FlashAttnVarlenFunc,
    FlashAttnVarlenKVPackedFunc,
    FlashAttnVarlenQKVPackedFunc,
)
from anyflash.compat.flash_attn._kvcache import flash_attn_with_kvcache
from anyflash.compat.flash_attn._operators import (
    wrapped_flash_attn_backward as _wrapped_flash_attn_backward,
)
from anyflash.compat.flash_attn._operators import (
    wrapped_flash_attn_forward as _wrapped_flash_attn_forward,
)
from anyflash.compat.flash_attn._operators import (
    wrapped_flash_attn_varlen_backward as _wrapped_flash_attn_varlen_backward,
)
from anyflash.compat.flash_attn._operators import (
    wrapped_flash_attn_varlen_forward as _wrapped_flash_attn_varlen_forward,
)
from anyflash.compat.flash_attn._private import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)
from anyflash.compat.flash_attn._version1 import (
    flash_attn_unpadded_func,
    flash_attn_unpadded_kvpacked_func,
    flash_attn_unpadded_qkvpacked_func,
    flash_attn_unpadded_qkvpacked_split_func,
)

__all__ = [
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "FlashAttnVarlenKVPackedFunc",
    "FlashAttnVarlenQKVPackedFunc",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_unpadded_func",
    "flash_attn_unpadded_kvpacked_func",
    "flash_attn_unpadded_qkvpacked_func",
    "flash_attn_unpadded_qkvpacked_split_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
