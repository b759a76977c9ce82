"""Our kernel as an extension of Colossal-AI, for the registries of its kernel loaders."""

from __future__ import annotations

from collections.abc import Callable

import torch
from colossalai.kernel.extensions.base_extension import _Extension
from torch import Tensor

from anyflash.adapters._colossalai.attention import attention


class AnyflashExtension(_Extension):
    """Preferred to all of Colossal-AI's, and there where those cannot run: they are for CUDA and NPUs."""

    def __init__(self) -> None:
        super().__init__(name="anyflash", support_aot=False, support_jit=False, priority=100)

    def is_available(self) -> bool:
        return not torch.cuda.is_available()

    def assert_compatible(self) -> None:
        pass

    def build_aot(self) -> None:
        raise NotImplementedError("anyflash compiles its kernels when they are called")

    def build_jit(self) -> None:
        raise NotImplementedError("anyflash compiles its kernels when they are called")

    def load(self) -> Callable[..., Tensor]:
        return attention
