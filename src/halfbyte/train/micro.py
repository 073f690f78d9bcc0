"""A step's batches as micro-steps, cut smaller where memory demands it.

    one micro-step of 3 rows          at most 8 tokens
    ┌ a a a a a a ┐                   ┌ a a a a a a ┐   index 0, first_token 0
    │ b b b b · · │        ──►        ┌ b b b b ┐
    └ c c c · · · ┘                   └ c c c · ┘       index 0, first_token 6

The pieces keep the number of the micro-step that they come from, and with it the seed of its
dropout; the fused layers also count on from the tokens before, so that they drop the same elements.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.data.chat import IGNORE_INDEX
from halfbyte.data.loader import Batch
from halfbyte.engine.packed import Packed, merge
from halfbyte.train.loss import LanguageModel


@dataclass(frozen=True)
class MicroStep:
    """What goes through the model together.

    Attributes:
        batches: One, or several that are packed into one row.
        index: Of the uncut micro-step, from 0; seeds its dropout.
        first_token: Tokens of the uncut micro-step before these.
        packed: The batches as `LanguageModel.prepare` made them ready, if it did already.
    """

    batches: tuple[Batch, ...]
    index: int
    first_token: int = 0
    packed: Packed | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model, padding included where the model sees it."""
        return sum(map(num_positions, self.batches))


def cut(
    model: LanguageModel, batches: Sequence[Batch], max_tokens: int | None = None
) -> list[MicroStep]:
    """Return a step's micro-steps, of at most `max_tokens` tokens where they can be cut so far.

    A batch is cut between rows, and a packed row between documents; a document stays whole.
    """
    found: list[MicroStep] = []
    for index, group in enumerate(model.micro_steps(batches)):
        whole = MicroStep(tuple(group), index)
        if max_tokens is None or whole.num_tokens <= max_tokens:
            found.append(whole)
            continue
        pieces = [piece for batch in group for piece in _halve(batch, max_tokens)]
        parts = merge(pieces, max_tokens) if model.is_fused else [[piece] for piece in pieces]
        first = 0
        for part in parts:
            found.append(MicroStep(tuple(part), index, first))
            first += found[-1].num_tokens
    return found


def num_positions(batch: Batch) -> int:
    """Return the tokens of a batch without its padding; a packed row's filling counts."""
    mask = batch.attention_mask
    return batch.input_ids.numel() if mask is None else int(mask.sum())


def _halve(batch: Batch, max_tokens: int) -> list[Batch]:
    """Halve a batch until its pieces are small enough or single documents."""
    if num_positions(batch) <= max_tokens:
        return [batch]
    rows = batch.input_ids.shape[0]
    if rows > 1:
        halves = [_rows(batch, 0, rows // 2), _rows(batch, rows // 2, rows)]
    else:
        starts = (batch.position_ids[0] == 0).nonzero().flatten()[1:]
        if batch.attention_mask is not None or not len(starts):
            return [batch]
        width = batch.input_ids.shape[1]
        middle = int(starts[(starts - width / 2).abs().argmin()])
        halves = [_columns(batch, 0, middle), _columns(batch, middle, width)]
    return [piece for half in halves for piece in _halve(half, max_tokens)]


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    """Return some rows, without columns that are all padding."""
    mask = batch.attention_mask
    width = None if mask is None else int(mask[start:stop].any(0).nonzero().max()) + 1
    part = _part(batch, slice(start, stop), slice(0, width))
    is_numbered = len(batch.rows) == batch.input_ids.shape[0]
    return replace(part, rows=batch.rows[start:stop]) if is_numbered else part


def _columns(batch: Batch, start: int, stop: int) -> Batch:
    """Return some documents of a packed row; nothing before the first predicts its first token."""
    part = _part(batch, slice(None), slice(start, stop))
    labels = part.labels.clone()
    labels[:, 0] = IGNORE_INDEX
    return replace(part, labels=labels)


def _part(batch: Batch, rows: slice, columns: slice) -> Batch:
    def of(tensor: Tensor) -> Tensor:
        return tensor[rows, columns].contiguous()

    labels = of(batch.labels)
    mask = None if batch.attention_mask is None else of(batch.attention_mask)
    return replace(
        batch,
        input_ids=of(batch.input_ids),
        labels=labels,
        position_ids=of(batch.position_ids),
        attention_mask=None if mask is not None and bool(torch.all(mask)) else mask,
        num_supervised=int((labels[:, 1:] != IGNORE_INDEX).sum()),
        num_tokens=labels.numel() if mask is None else int(mask.sum()),
    )
