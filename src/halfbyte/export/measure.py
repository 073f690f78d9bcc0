"""How far a merged model is from what was trained, measured on the user's own rows.

The reference is what training made: the adapter on its base as training held it. For each
supervised token of the rows its distribution P over the next token is kept, and each candidate's Q
is compared:

    KL(P | Q) = sum_v P(v) (log P(v) - log Q(v))      nats a token, 0 where the two are one model

Models are in memory one after the other. Candidates are not written for this: the base is loaded
dense, and what a merge would write takes the places of its weights.
"""

import gc
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from halfbyte.data.chat import IGNORE_INDEX
from halfbyte.device import available_bytes, release_unused_memory
from halfbyte.errors import DataError, DeviceError
from halfbyte.export.config import Form
from halfbyte.export.source import Source
from halfbyte.export.tensors import Merged
from halfbyte.models.load import load
from halfbyte.train.inputs import tokenized

MAX_TOKENS = 4096
# Distributions of the reference that are held: 4096 tokens of 32,000 words, 512 of 256,000.
_MAX_BYTES = 1 << 29
_MAX_ROW_TOKENS = 1024
# Each changes the weights that the one before changed too, so one dense base serves all.
_ORDER: tuple[Form, ...] = ("original", "dequantized", "quantized")


@dataclass(frozen=True)
class Fidelity:
    """How a merged model compares with what was trained.

    Attributes:
        loss: Mean cross-entropy of a supervised token, in nats.
        kl: Mean KL divergence from the reference, in nats a token.
        kl_error: Standard error of that mean.
        agreement: Share of the tokens whose likeliest next token is the reference's.
    """

    loss: float
    kl: float
    kl_error: float
    agreement: float


@dataclass(frozen=True)
class Measurement:
    """What was measured, and on what.

    Attributes:
        rows: Rows that were used.
        tokens: Supervised tokens in them.
        reference_loss: Loss of the adapter on its base as training held it.
        candidates: Each merged model against that.
    """

    rows: int
    tokens: int
    reference_loss: float
    candidates: dict[Form, Fidelity]


@dataclass(frozen=True)
class _Row:
    """A row's tokens [S], and which positions [N] predict which supervised tokens [N]."""

    input_ids: Tensor
    positions: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Reference:
    """What a model predicts on some rows, to compare others with.

    Attributes:
        rows: The rows.
        log_probs: Of each row its log-probabilities [N, V], float32 on the CPU.
    """

    rows: list[_Row]
    log_probs: list[Tensor]

    @classmethod
    def of(cls, model: Any, table: Dataset) -> "Reference":
        """Let `model` predict rows of `table` (`input_ids`, `labels`), as many as are needed.

        Raises:
            DataError: none has a supervised token.
        """
        rows = _choose_rows(table, model.get_output_embeddings().weight.shape[0])
        return cls(rows, [_log_probs(model, row).cpu() for row in rows])

    @property
    def tokens(self) -> int:
        """Supervised tokens."""
        return sum(len(row.targets) for row in self.rows)

    @property
    def loss(self) -> float:
        """Mean loss of the model that the reference is of."""
        losses = [_losses(p, row) for p, row in zip(self.log_probs, self.rows, strict=True)]
        return float(torch.cat(losses).mean())

    def compare(self, model: Any) -> Fidelity:
        """Return how far `model` is from it."""
        losses, divergences, agreements = [], [], []
        for row, kept in zip(self.rows, self.log_probs, strict=True):
            log_q = _log_probs(model, row)
            log_p = kept.to(log_q.device)
            losses.append(_losses(log_q, row))
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64))
            agreements.append((log_p.argmax(-1) == log_q.argmax(-1)).double())
        kl = torch.cat(divergences)
        return Fidelity(
            loss=float(torch.cat(losses).mean()),
            kl=float(kl.mean()),
            kl_error=float(kl.std() / math.sqrt(len(kl))) if len(kl) > 1 else 0.0,
            agreement=float(torch.cat(agreements).mean()),
        )


def measure(source: Source, forms: Iterable[Form]) -> Measurement:
    """Compare what `source` would merge to with what was trained, on the rows of its settings.

    Raises:
        DataError: there are no rows, or none has a supervised token.
        DeviceError: the models do not fit the memory.
    """
    recipe, device, data = source.recipe, source.device, source.config.data
    if data is None:
        raise DataError("there are no rows to measure on", hint="give some with data=...")
    dtype = recipe.dtype if recipe else None
    _check_memory(source, dtype)
    model, tokenizer = load(
        source.folder,
        quant=source.reference_quant,
        device=device,
        dtype=dtype,
        adapter=source.adapter.folder,
    )
    table = tokenized(data, tokenizer, seed=source.config.seed, prefer_held_out=True)
    reference, dtype = Reference.of(model, table), model.dtype
    del model
    _release(device)
    dense, _ = load(source.folder, quant=None, device=device, dtype=dtype)
    found, wanted = {}, set(forms)
    for form in _ORDER:
        if form in wanted:
            _put(dense, source, source.merger(form).tensors())
            found[form] = reference.compare(dense)
    del dense
    _release(device)
    return Measurement(len(reference.rows), reference.tokens, reference.loss, found)


def _check_memory(source: Source, dtype: torch.dtype | None) -> None:
    """Refuse a model that would not fit rather than die of it."""
    itemsize = (dtype or torch.bfloat16).itemsize
    needed = itemsize * sum(p.numel() for p in source.skeleton.model.parameters()) + _MAX_BYTES
    available = available_bytes(source.device)
    if available is not None and needed > available:
        raise DeviceError(
            f"measuring takes about {needed / 2**30:.1f} GiB on {source.device}, "
            f"and {available / 2**30:.1f} GiB are free",
            hint="name another device, or merge without rows to measure on",
        )


def _choose_rows(table: Dataset, vocabulary: int) -> list[_Row]:
    """Return rows in a fixed random order until they have enough supervised tokens."""
    left = max(1, min(MAX_TOKENS, _MAX_BYTES // (4 * vocabulary)))
    rows: list[_Row] = []
    for index in np.random.default_rng(0).permutation(len(table)).tolist():
        entry: dict[str, Sequence[int]] = table[index]
        ids = torch.as_tensor(entry["input_ids"][:_MAX_ROW_TOKENS], dtype=torch.long)
        targets = torch.as_tensor(entry["labels"][:_MAX_ROW_TOKENS], dtype=torch.long)[1:]
        positions = torch.nonzero(targets != IGNORE_INDEX).flatten()[:left]
        if len(positions):
            rows.append(_Row(ids, positions, targets[positions]))
            left -= len(positions)
        if left <= 0:
            break
    if not rows:
        raise DataError(
            f"none of the {len(table)} rows to measure on has a supervised token",
            hint="check loss_on, max_length and the chat template",
        )
    return rows


@torch.no_grad()
def _log_probs(model: Any, row: _Row) -> Tensor:
    """Return the float32 log-probabilities [N, V] of the next token at the row's positions."""
    ids = row.input_ids.unsqueeze(0).to(model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0]
    return torch.log_softmax(logits[row.positions.to(logits.device)].float(), dim=-1)


def _losses(log_probs: Tensor, row: _Row) -> Tensor:
    targets = row.targets.to(log_probs.device).unsqueeze(1)
    return -log_probs.gather(1, targets).squeeze(1).double()


def _put(model: Any, source: Source, tensors: Iterable[Merged]) -> None:
    """Put merged tensors into the places of a dense base's."""
    in_memory = source.skeleton.names
    for merged in tensors:
        if not merged.is_changed:
            continue
        owner, _, name = in_memory.get(merged.name, merged.name).rpartition(".")
        module = model.get_submodule(owner)
        value = merged.dense().to(model.device, model.dtype)
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    if not source.plan.unties:
        model.tie_weights()


def _release(device: torch.device) -> None:
    gc.collect()
    release_unused_memory(device)
