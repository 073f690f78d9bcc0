"""Loss and perplexity on held-out rows: the mean over all their supervised tokens."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from halfbyte.data.config import DataConfig
from halfbyte.data.loader import eval_batches, row_lengths
from halfbyte.errors import DataError
from halfbyte.train.inputs import pad_token_id, tokenized
from halfbyte.train.loss import LanguageModel


@dataclass(frozen=True)
class EvalResult:
    """What held-out rows say of a model.

    Attributes:
        loss: Mean cross-entropy of a supervised token, in nats.
        perplexity: e to the loss.
        tokens: Supervised tokens.
    """

    loss: float
    perplexity: float
    tokens: int


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    data: str | Path | DataConfig | Dataset | list[dict[str, Any]],
    *,
    batch_size: int = 8,
) -> EvalResult:
    """Return the model's loss on `data`.

    Args:
        model: A transformers model, with or without adapters.
        tokenizer: Its tokenizer.
        data: A path, a DataConfig (its held-out rows where it names some, else its rows), rows, or
            a tokenized Dataset with `input_ids` and `labels`.
        batch_size: Rows in one forward pass; the result does not depend on it.

    Raises:
        DataError: no row has a supervised token.
    """
    rows = tokenized(data, tokenizer, seed=0, prefer_held_out=True)
    parts = LanguageModel.of(model)
    result = evaluate_rows(parts, rows, batch_size=batch_size, pad_token_id=pad_token_id(tokenizer))
    if result is None:
        raise DataError("the evaluation was stopped before its first batch")
    return result


@torch.no_grad()
def evaluate_rows(
    model: LanguageModel,
    rows: Dataset,
    *,
    batch_size: int,
    pad_token_id: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> EvalResult | None:
    """Return the loss on tokenized rows, or `None` if `should_stop` said so in between.

    Raises:
        DataError: no row has a supervised token.
    """
    rows = rows.select(np.argsort(row_lengths(rows), kind="stable"))  # alike together: less padding
    losses, tokens = [], 0
    with _evaluating(model.model):
        for batch in eval_batches(rows, batch_size, pad_token_id):
            if should_stop():
                return None
            losses.append(model.loss_sum(batch).double())
            tokens += batch.num_supervised
    if tokens == 0:
        raise DataError(
            f"none of the {len(rows)} rows to evaluate has a supervised token",
            hint="check loss_on, max_length and the chat template",
        )
    loss = torch.stack(losses).sum().item() / tokens
    return EvalResult(loss, _exp(loss), tokens)


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
