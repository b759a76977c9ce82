"""Composer: its Trainer trains a GPT-2 on bytes of real text, our attention swapped in by an algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from anyflash.adapters import composer as adapter
from anyflash.adapters._composer import importing
from anyflash.adoption import corpus
from anyflash.adoption.row import Requirement, Result, Role, Row, Variant, Workload

_LAYERS, _VOCABULARY, _BATCHES = 2, 256, 2


@contextmanager
def _swapped(role: Role) -> Iterator[None]:
    """What the algorithm has done to models is taken back."""
    try:
        yield
    finally:
        adapter.remove()


def _network(role: Role, length: int) -> Any:
    """GPT-2 as Composer wraps it. Ours starts with eager attention, which the algorithm swaps."""
    import torch

    importing.composer()
    from composer.models import HuggingFaceModel
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=_VOCABULARY,
        n_positions=length,
        n_layer=_LAYERS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa" if role == "best" else "eager",
    )
    model = HuggingFaceModel(GPT2LMHeadModel(config))
    model.train_metrics = model.val_metrics = {}
    return model


def _fit(
    role: Role, model: Any, batches: list[dict[str, Any]], rate: float
) -> tuple[list[float], dict[str, np.ndarray]]:
    """The loss of each batch, and the gradients of the last."""
    import torch
    from composer import Callback, Trainer
    from torch.utils.data import DataLoader

    losses: list[float] = []
    gradients: dict[str, np.ndarray] = {}

    class Watch(Callback):
        def after_loss(self, state: Any, logger: Any) -> None:
            losses.append(float(state.loss.detach()))

        def after_backward(self, state: Any, logger: Any) -> None:
            if len(losses) == len(batches):
                found = state.model.named_parameters()
                gradients.update({n: p.grad.numpy().copy() for n, p in found if p.grad is not None})

    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
        optimizers=torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0),
        max_duration=f"{len(batches)}ba",
        algorithms=[adapter.algorithm()] if role == "ours" else [],
        callbacks=[Watch()],
        device_train_microbatch_size=1,
        device="cpu",
        progress_bar=False,
        seed=0,
    )
    trainer.fit()
    trainer.close()
    return losses, gradients


def _batches(count: int, length: int) -> list[dict[str, Any]]:
    import torch

    text = torch.tensor(list(corpus.text(count * length).encode("ascii", "replace")))
    return [{"input_ids": ids, "labels": ids} for ids in text.view(count, 1, length)]


def _build(quick: bool) -> Workload:
    length = 512 if quick else 2048
    batches = _batches(_BATCHES, length)
    models = {role: _network(role, length) for role in ("eager", "best", "ours")}

    def train(role: Role, model: Any) -> Result:
        """At a rate of 0 the weights stay, so every step does the same."""
        losses, gradients = _fit(role, model, batches, 0.0)
        return Result({"losses": np.asarray(losses)}, gradients)

    def reference() -> Result:
        # Under SDPA: transformers' eager attention takes its softmax in float32.
        return train("best", _network("best", length).double())

    def curve(role: Role, steps: int) -> list[float]:
        return _fit(role, _network(role, 256), _batches(steps, 256), 1e-3)[0]

    parameters = sum(p.numel() for p in models["ours"].parameters())
    labels: dict[Role, str] = {"eager": "eager", "best": "sdpa", "ours": "anyflash by an algorithm"}
    return Workload(
        f"Composer's Trainer fits GPT-2's layers, {_LAYERS} of 12, {parameters / 1e6:.1f} M parameters "
        f"(random), 12 heads of 64, causal, to {_BATCHES} batches of {length} bytes of text: everything that "
        "the Trainer does. The curve: 256 bytes a step, AdamW",
        "float32",
        lambda role: train(role, models[role]),
        reference,
        tuple(Variant(role, label, partial(_swapped, role)) for role, label in labels.items()),
        curve,
    )


ROWS = [
    Row(
        "composer-gpt2-fit",
        "Composer",
        "Trainer.fit of a GPT-2",
        (
            Requirement("mosaicml", importing.COMPOSER),
            Requirement("transformers", "pip install transformers"),
        ),
        _build,
    )
]
