"""MLPerf's BERT as HazyResearch trained it without padding, in the training results 2.0.

    from anyflash.adapters import mlperf_bert as anyflash_for_bert

    anyflash_for_bert.install()   # in the folder of modeling.py, before it is imported
    import modeling

`install` puts our function behind the layers of `unpad=True, unpad_stream_attn=True`, also of models that
exist already. modeling.py imports CUDA extensions; those that are absent are empty modules while it is
imported, so the settings that call them must stay off. The results 2.1 import flash_attn: anyflash.compat.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from anyflash.adapters.base import Target, disagreement
from anyflash.adapters.checkout import Checkout

name = "mlperf_bert"
_FOLDER = "HazyResearch/benchmarks/bert/implementations/pytorch"
target = Target(
    package="mlperf-training-results",
    module="modeling",
    minimum="2.0",
    below="2.1",
    how_to_install=f"git clone https://github.com/mlcommons/training_results_v2.0 && cd */{_FOLDER}",
)
source = Checkout(
    package="MLPerf's training results 2.0",
    variable="ANYFLASH_SRC_MLPERF",
    repository="https://github.com/mlcommons/training_results_v2.0",
    revision="8437fbb7",
)
# The package of each that may be absent, then what is imported of it.
_EXTENSIONS = (
    "stream_attn_cuda",
    "fused_dense_lib",
    "dropout_layer_norm",
    "xentropy_cuda",
    "apex",
    "apex._autocast_utils",
)

_undo: list[Callable[[], object]] = []


def importable() -> AbstractContextManager[Path]:
    """Within: its modules come from the checkout."""
    return source.importable(under=_FOLDER)


def install() -> None:
    """Put our function in its place. Raises ImportError if modeling.py or torch is absent."""
    if _undo:
        return
    target.warn_if_untested()
    with _extensions():
        modeling: Any = importlib.import_module(target.module)

    from anyflash.adapters._mlperf_bert.attention import stream_attn_func

    try:
        own = modeling.stream_attn_func
    except AttributeError:
        raise ImportError(
            f"{modeling.__file__} has no stream_attn_func, so it is not that of {_FOLDER}"
        ) from None
    modeling.stream_attn_func = stream_attn_func
    _undo.append(lambda: setattr(modeling, "stream_attn_func", own))


def remove() -> None:
    """Put its own function back."""
    while _undo:
        _undo.pop()()


@contextmanager
def _extensions() -> Iterator[None]:
    """Within: the extensions that are absent are empty modules."""
    absent = [n for n in _EXTENSIONS if importlib.util.find_spec(n.partition(".")[0]) is None]
    for extension in absent:
        sys.modules[extension] = ModuleType(extension)
    if "apex" in absent:
        sys.modules["apex._autocast_utils"]._cast_if_autocast_enabled = None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for extension in absent:
            del sys.modules[extension]


def self_check() -> str | None:
    """None if an unpadded layer gives what its padded one gives for the valid tokens; else what is wrong."""
    was_installed = bool(_undo)
    try:
        import torch

        install()
    except ImportError as error:
        return f"{error}: {target.how_to_install}"
    try:
        modeling = importlib.import_module(target.module)
        settings = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
        config = modeling.BertConfig(8, **settings)
        with torch.random.fork_rng(devices=()):
            packed = modeling.BertStreamSelfAttention(config).double().eval()
            padded = modeling.BertSelfAttention(config).double().eval()
        for part, kind in enumerate((padded.query, padded.key, padded.value)):
            for own, given in ((kind.weight, packed.Wqkv.weight), (kind.bias, packed.Wqkv.bias)):
                own.data = given.data.chunk(3)[part]
        valid = torch.arange(7) < torch.tensor([7, 4])[:, None]
        hidden = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            ours, _ = packed(hidden[valid], torch.tensor([0, 7, 11], dtype=torch.int32), 7)
            own = padded(hidden, (~valid).double() * -10000.0)[valid]
        return disagreement("a layer without padding", ours, own)
    finally:
        if not was_installed:
            remove()
