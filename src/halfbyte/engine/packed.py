"""Micro-batches as one run of tokens: padding left out, documents told apart by their bounds.

    micro-batches            one packed row
    ┌ a a a · ┐
    └ b b b b ┘       ──►    a a a b b b b c c · · ·
    ┌ c c · · ┐              └─ 3 ─┘└─ 4 ──┘└2┘└ 3 ┘   cu_seqlens 0 3 7 9 12

The loss of a step is a sum over its tokens, so how they are cut into micro-batches is free: short
examples become few long rows, which is what a GPU is quick at. The row is filled up to a multiple
of `ALIGNMENT` with a document without labels, so that matrix products keep to fast shapes and the
kernels are compiled for few sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.data.chat import IGNORE_INDEX
from halfbyte.data.loader import Batch
from halfbyte.engine.attention import Layout

ALIGNMENT = 128


@dataclass(frozen=True)
class Packed:
    """Tokens, ready for `FusedBody` and the loss.

    Args:
        input_ids: int64 `[B, S]`; B is 1 unless all rows are whole and equally long.
        position_ids: int64 `[B, S]`, restarting for each document.
        rows: int64 `[n]`, which of the B * S positions have a label.
        labels: int64 `[n]`, the token that each of `rows` shall predict.
        layout: The bounds of documents.
        angles: Cos and sin of the positions, where they were made ahead of the step.
    """

    input_ids: Tensor
    position_ids: Tensor
    rows: Tensor
    labels: Tensor
    layout: Layout
    angles: tuple[Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> "Packed":
        """Return it on `device`; copies to a GPU go through pinned memory and do not wait."""
        tensors = [self.input_ids, self.position_ids, self.rows, self.labels]
        bounds = self.layout.cu_seqlens
        if device.type == "cuda":
            tensors = [
                t.contiguous().pin_memory() if t.device.type == "cpu" else t for t in tensors
            ]
            bounds = None if bounds is None else bounds.pin_memory()
        ids, positions, rows, labels = (t.to(device, non_blocking=True) for t in tensors)
        if bounds is not None:
            bounds = bounds.to(device, non_blocking=True)
        layout = Layout(self.layout.batch, self.layout.length, bounds, self.layout.max_length)
        return Packed(ids, positions, rows, labels, layout)


def merge(batches: Sequence[Batch], max_tokens: int) -> list[list[Batch]]:
    """Return the micro-batches in groups of at most `max_tokens` real tokens, order kept."""
    groups: list[list[Batch]] = []
    tokens = 0
    for batch in batches:
        if not groups or tokens + batch.num_tokens > max_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(batch)
        tokens += batch.num_tokens
    return groups


def pack(batches: Sequence[Batch]) -> Packed:
    """Return the tokens of some micro-batches, which must lie on the CPU, as one packed row.

    A single batch of whole rows stays `[B, S]`: dense attention is quicker than packed.
    """
    if len(batches) == 1 and _is_whole(batches[0]):
        batch = batches[0]
        targets = torch.nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        size, length = batch.input_ids.shape
        layout = Layout(size, length, max_length=length)
        return _with_rows(batch.input_ids, batch.position_ids, targets.flatten(), layout)
    ids, labels, positions = [], [], []
    for batch in batches:
        real = slice(None) if batch.attention_mask is None else batch.attention_mask.bool()
        ids.append(batch.input_ids[real].flatten())
        labels.append(batch.labels[real].flatten())
        positions.append(batch.position_ids[real].flatten())
    filling = -sum(t.numel() for t in ids) % ALIGNMENT
    positions.append(torch.arange(filling))
    all_ids = torch.cat([*ids, ids[0].new_zeros(filling)])
    all_labels = torch.cat([*labels, labels[0].new_full((filling,), IGNORE_INDEX)])
    all_positions = torch.cat(positions)
    starts = (all_positions == 0).nonzero().flatten()
    # A document's first token is nobody's target, whatever its label says.
    all_labels[starts] = IGNORE_INDEX
    bounds = torch.cat([starts, starts.new_tensor([all_ids.numel()])])
    longest = int(bounds.diff().max())
    layout = Layout(1, all_ids.numel(), bounds.to(torch.int32), longest)
    targets = torch.nn.functional.pad(all_labels[1:], (0, 1), value=IGNORE_INDEX)
    return _with_rows(all_ids[None], all_positions[None], targets, layout)


def _is_whole(batch: Batch) -> bool:
    """Whether nothing is padded and every row is one document."""
    if batch.attention_mask is not None and not bool(batch.attention_mask.all()):
        return False
    return bool((batch.position_ids[:, 1:] != 0).all())


def _with_rows(ids: Tensor, positions: Tensor, targets: Tensor, layout: Layout) -> Packed:
    rows = (targets != IGNORE_INDEX).nonzero().flatten()
    return Packed(ids, positions, rows, targets[rows], layout)
