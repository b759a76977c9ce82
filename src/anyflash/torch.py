"""anyflash on torch tensors: the calls of `anyflash`, and what torch makes of them.

`import anyflash` knows torch tensors already; this module is for what is torch's own. Importing it registers
the operators `anyflash::attention` and `anyflash::attention_varlen`, which a program saved by torch.export
needs before it is loaded.

- Gradients of q, k, v and of every floating table, bias, slope and sink that requires one, through `out` and
  through `lse`. There is no second derivative and no forward mode; asking for one raises Unsupported.
- torch.compile takes a call as one node of its graph (fullgraph), score and mask functions included: tensors
  that they close over become inputs of the graph. torch.func.grad, vmap and their nestings work.
- Under autocast q, k and v are cast to its dtype; float64 stays.
- Without `seed` dropout draws one from torch's CPU generator, so torch.manual_seed repeats it and activation
  checkpointing drops the same elements twice.
- The CPU kernels take torch.get_num_threads() threads unless ANYFLASH_NUM_THREADS is set.
- With layout "bhsd" the memory of `out` is ordered as "bshd", so `out.transpose(1, 2).flatten(2)` copies
  nothing.
- `activate()` puts anyflash behind torch's own attention, `deactivate()` takes it away; see docs/systems.md.
- `flex_attention` has the signature of torch's, and gradients on the CPU.

    >>> import anyflash as af, torch
    >>> q = torch.randn(1, 16, 4, 32, requires_grad=True)
    >>> slopes = torch.rand(4, requires_grad=True)
    >>> out = af.attention(q, q, q, score=lambda s, at: s - af.table(slopes)[at.head] * (at.q - at.k))
    >>> out.sum().backward()
    >>> slopes.grad.shape
    torch.Size([4])
"""

from __future__ import annotations

from anyflash.adapters._pytorch.flex import flex_attention
from anyflash.adapters.pytorch import install as activate
from anyflash.adapters.pytorch import register as _register
from anyflash.adapters.pytorch import remove as deactivate
from anyflash.api import attention, attention_varlen, explain, merge, table
from anyflash.frontends.registry import load

__all__ = [
    "activate",
    "attention",
    "attention_varlen",
    "deactivate",
    "explain",
    "flex_attention",
    "merge",
    "table",
]

load("torch")
_register()
