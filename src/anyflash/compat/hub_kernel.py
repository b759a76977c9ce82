"""anyflash as a kernel of the `kernels` package, which transformers loads in place of one from a hub.

A way in that changes nothing in transformers: a folder, and an environment variable that names it.

    LOCAL_KERNELS=$(python -m anyflash.compat.hub_kernel FOLDER) python program.py

Then `attn_implementation="flash_attention_2"`, whose kernel this stands for, runs on a machine without a GPU,
and so does `attn_implementation="anyflash/flash-attn"`. transformers and `kernels` must be of versions that
go together.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anyflash

STANDS_FOR = "kernels-community/flash-attn2"
NAME = "anyflash/flash-attn"

_MODULE = '''"""flash_attn on anyflash, as a kernel."""

from anyflash.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
'''


def write(folder: str | Path) -> str:
    """Write the kernel's build for the CPU into `folder`; returns what LOCAL_KERNELS must be.

    Raises ValueError if the path has a colon, which LOCAL_KERNELS cannot hold.
    """
    build = Path(folder).resolve() / "build"
    if ":" in str(build):
        raise ValueError(f"folder: {build} has a colon, which separates kernels in LOCAL_KERNELS")
    variant = build / "torch-cpu"
    variant.mkdir(parents=True, exist_ok=True)
    (variant / "__init__.py").write_text(_MODULE, "utf-8")
    metadata = {
        "name": "flash-attn",
        "id": f"anyflash_{anyflash.__version__.replace('.', '_')}_cpu",
        "version": 1,
        "license": "BSD-3-Clause",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
    return ":".join(f"{name}={build}" for name in (STANDS_FOR, NAME))


if __name__ == "__main__":
    sys.stdout.write(write(sys.argv[1]) + "\n")
