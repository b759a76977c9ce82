"""One of two processes that share a sequence; test_deepspeed.py runs it with RANK and the like set.

Every process computes the whole on its own too, and compares its part of the outputs and gradients with that.
"""

from __future__ import annotations

import sys
from functools import partial

import deepspeed
import torch
from deepspeed import comm
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from deepspeed.sequence.layer import DistributedAttention
from transformers import LlamaConfig, LlamaModel

import anyflash
from anyflash.adapters import transformers as adapter

WORLD, S = 2, 16


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    bound = 1024 * torch.finfo(wanted.dtype).eps * float(wanted.detach().abs().max())
    assert float((found - wanted).detach().abs().max()) <= bound


def mine(t: torch.Tensor, rank: int) -> torch.Tensor:
    return t.chunk(WORLD, dim=1)[rank]


def layer(rank: int) -> None:
    """`DistributedAttention` around `anyflash.attention`."""
    generator = torch.Generator().manual_seed(0)
    whole = [
        torch.randn(2, S, 4, 8, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)
    ]
    attend = partial(anyflash.attention, causal=True)
    out = attend(*whole)
    gradients = torch.autograd.grad(out.square().sum(), whole)
    parts = [mine(t.detach(), rank).contiguous().requires_grad_() for t in whole]
    shared = DistributedAttention(attend, comm.get_world_group(), scatter_idx=2, gather_idx=1)(*parts, 0)
    close(shared, mine(out, rank))
    for part, wanted in zip(torch.autograd.grad(shared.square().sum(), parts), gradients, strict=True):
        close(part, mine(wanted, rank))


def model(rank: int) -> None:
    """The form for transformers; positions restart, so two sequences are packed, not at a border of parts."""
    adapter.install()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        vocab_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    llama = LlamaModel(config).double()
    llama.set_attn_implementation("anyflash")
    tokens = torch.randint(64, (1, S))
    positions = torch.cat([torch.arange(5), torch.arange(S - 5)])[None]
    wanted = llama(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
    parameters = list(llama.layers.parameters())
    gradients = torch.autograd.grad(wanted.square().sum(), parameters)
    UlyssesSPAttentionHF.register_with_transformers(
        llama, "AnyFlash", sequence_parallel_size=WORLD, micro_batch_size=1
    )
    found = llama(
        input_ids=mine(tokens, rank), position_ids=mine(positions, rank), use_cache=False
    ).last_hidden_state
    close(found, mine(wanted, rank))
    for part, whole in zip(torch.autograd.grad(found.square().sum(), parameters), gradients, strict=True):
        comm.all_reduce(part)
        close(part, whole)


if __name__ == "__main__":
    deepspeed.init_distributed("gloo")
    rank = comm.get_rank()
    layer(rank)
    model(rank)
    comm.barrier()
    sys.stdout.write("both agree\n")
