"""Composer's Trainer with our algorithm: the same parameters after the same steps as without it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import pytest

torch = pytest.importorskip("torch")
try:
    importlib.metadata.version("mosaicml")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("needs mosaicml: make test-systems", allow_module_level=True)

from anyflash.adapters import composer as adapter  # noqa: E402
from anyflash.adapters import pytorch  # noqa: E402
from anyflash.adapters import transformers as hf  # noqa: E402
from anyflash.adapters._composer import importing  # noqa: E402

importing.composer()

from composer import Trainer  # noqa: E402
from composer.algorithms import Alibi  # noqa: E402
from composer.models import ComposerModel, HuggingFaceModel  # noqa: E402
from torch.nn.attention import current_flash_attention_impl  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

DOUBLE = torch.float64
S, VOCABULARY, STEPS = 12, 64, 4


@pytest.fixture(autouse=True)
def without() -> Iterator[None]:
    adapter.remove()
    # transformers 4 fills a mask of the default dtype with the least number of the model's.
    torch.set_default_dtype(DOUBLE)
    yield
    torch.set_default_dtype(torch.float32)
    adapter.remove()


def batches(padded: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(STEPS):
        ids = torch.randint(3, VOCABULARY, (3, S), generator=generator)
        present = torch.ones(3, S, dtype=torch.long)
        if padded == "right":
            present[1, 8:] = 0
        elif padded == "left":
            present[1, :4] = 0
        # A padding row, which sees no key, must not be asked for the token behind it.
        asked = present.bool() & present.roll(1, 1).bool()
        labels = ids.masked_fill(~asked, -100)
        found.append({"input_ids": ids, "attention_mask": present, "labels": labels})
    return found


def sharpened(model: Any) -> Any:
    """Random weights start so small that attention is nearly uniform: spread them, or no mask would show."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and any(part in name for part in ("c_attn", "query", "key", "in_proj")):
            parameter.data.mul_(12.0)
    return model.to(DOUBLE)


def gpt2(implementation: str = "eager") -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation=implementation,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def bert(implementation: str = "eager") -> Any:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=S, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, attn_implementation=implementation,
    )  # fmt: skip
    return BertForMaskedLM(config)


class Encoder(ComposerModel):
    """torch's own encoder, which is no transformers model."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCABULARY, 32)
        layer = torch.nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        padding = batch["attention_mask"] == 0
        hidden = self.layers(self.tokens(batch["input_ids"]), src_key_padding_mask=padding)
        return hidden @ self.tokens.weight.T

    def loss(self, outputs: torch.Tensor, batch: dict[str, torch.Tensor], *args: Any) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.flatten(0, 1), batch["labels"].flatten())


def hugging_face(make: Callable[..., Any], *args: str) -> Any:
    model = HuggingFaceModel(make(*args), use_logits=False)
    model.val_metrics = model.train_metrics = {}
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "gpt2-eager": lambda: hugging_face(gpt2),
    "gpt2-sdpa": lambda: hugging_face(gpt2, "sdpa"),
    "bert": lambda: hugging_face(bert),
    "torch": Encoder,
}


def trained(
    name: str, padded: str, algorithms: list[Any], nudged: bool = False
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model and its parameters at the end. `nudged` begins with weights that are off by a rounding."""
    torch.manual_seed(0)
    model = sharpened(MODELS[name]())
    if nudged:
        for parameter in model.parameters():
            parameter.data.mul_(1 + torch.finfo(DOUBLE).eps * torch.randn_like(parameter).sign())
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(batches(padded), batch_size=None),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05),
        max_duration=f"{STEPS}ba",
        algorithms=algorithms,
        device_train_microbatch_size=3,
        device="cpu",
        progress_bar=False,
        seed=3,
    )
    trainer.fit()
    trainer.close()
    return model, {name: p.detach().clone() for name, p in model.named_parameters()}


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], nudged: dict[str, Any]) -> None:
    """Training amplifies rounding: by how much, shows itself where it begins with weights a rounding off."""
    assert found.keys() == wanted.keys()

    def apart(others: dict[str, torch.Tensor]) -> float:
        return max(float((others[name] - own).abs().max()) for name, own in wanted.items())

    assert apart(found) <= 32 * apart(nudged)


@pytest.mark.parametrize("padded", ["none", "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_training(name: str, padded: str) -> None:
    _, before = trained(name, "none", [])
    _, own = trained(name, padded, [])
    _, nudged = trained(name, padded, [], nudged=True)
    model, ours = trained(name, padded, [adapter.algorithm()])
    same(ours, own, nudged)
    if padded != "none":
        assert any(not torch.equal(before[n], own[n]) for n in own)
    if name.startswith("gpt2"):
        tested = hf.target.tested(importlib.metadata.version("transformers"))
        assert model.model.config._attn_implementation == ("AnyFlash" if tested else "sdpa")
    assert current_flash_attention_impl() == pytorch.IMPLEMENTATION


@pytest.mark.parametrize("padded", ["none", "right"])
def test_alibi(padded: str) -> None:
    """Composer's own algorithm on BERT, and ours behind it."""
    if hf.target.tested(importlib.metadata.version("transformers")):
        pytest.skip("Composer's Alibi needs transformers 4: make test-systems")

    def alibi() -> Any:
        return Alibi(max_sequence_length=S, train_sequence_length_scaling=1)

    _, own = trained("bert", padded, [alibi()])
    _, nudged = trained("bert", padded, [alibi()], nudged=True)
    model, ours = trained("bert", padded, [alibi(), adapter.algorithm()])
    same(ours, own, nudged)
    (layer, *_) = (m for m in model.modules() if hasattr(m, "alibi"))
    assert vars(layer)["forward"].__func__.__module__ != type(layer).forward.__module__


def test_install_reaches_every_trainer() -> None:
    own = Trainer.__init__
    adapter.install()
    adapter.install()
    model, ours = trained("gpt2-eager", "left", [])
    assert current_flash_attention_impl() == pytorch.IMPLEMENTATION
    adapter.remove()
    assert Trainer.__init__ is own
    assert current_flash_attention_impl() is None
    assert model.model.config._attn_implementation == "eager"
    adapter.remove()
    _, plain = trained("gpt2-eager", "left", [])
    _, nudged = trained("gpt2-eager", "left", [], nudged=True)
    same(ours, plain, nudged)


def test_doors_that_were_open_stay() -> None:
    with pytorch.use():
        trained("torch", "none", [adapter.algorithm()])
        adapter.remove()
        assert current_flash_attention_impl() == pytorch.IMPLEMENTATION
    assert current_flash_attention_impl() is None


def test_self_check_leaves_no_trace() -> None:
    own = Trainer.__init__
    assert adapter.self_check() is None
    assert Trainer.__init__ is own
    assert current_flash_attention_impl() is None
