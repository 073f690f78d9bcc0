"""Batches as a pure function of seed, epoch and step.

Nothing is consumed and nothing has a position: a resumed run asks for the next step, and gets
what the undisturbed run would have got.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch import Tensor

from halfbyte.data.chat import IGNORE_INDEX
from halfbyte.data.packing import IntArray, pack, shuffled
from halfbyte.errors import DataError


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B sequences, padded on the right to S tokens.

    Args:
        input_ids: int64 [B, S].
        labels: int64 [B, S], -100 where nothing is learned; not shifted.
        position_ids: int64 [B, S]; they begin again with each packed document.
        attention_mask: int64 [B, S], 1 for tokens and 0 for padding; `None` where nothing is
            padded, and always in packed batches, whose positions say where documents begin
            (transformers reads them when it is called with `use_cache=False`).
        num_supervised: Labels that the shifted loss sees.
        num_tokens: Tokens that are not padding.
        rows: The numbers of the data's rows in it, from 0, where they are known.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    num_supervised: int
    num_tokens: int
    rows: tuple[int, ...] = ()

    def to(self, device: torch.device | str) -> "Batch":
        """Return the batch on `device`; from pinned memory the copy does not wait."""
        mask = self.attention_mask
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.position_ids.to(device, non_blocking=True),
            None if mask is None else mask.to(device, non_blocking=True),
            self.num_supervised,
            self.num_tokens,
            self.rows,
        )


class BatchPlan:
    """Which rows are in which step of which epoch.

    Args:
        dataset: Prepared rows, with `input_ids` and `labels`.
        batch_size: Sequences of a micro-batch.
        gradient_accumulation_steps: Micro-batches of a step.
        packing: Put several rows into one sequence.
        max_length: Tokens of a packed sequence.
        seed: Of the run.
        pad_token_id: What padding is filled with; `None` for 0. It is never seen: padding is told
            by length.
        shuffle: Draw a new order every epoch.

    Raises:
        DataError: there are no rows, or one does not fit into a packed sequence.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        batch_size: int,
        gradient_accumulation_steps: int,
        packing: bool,
        max_length: int,
        seed: int,
        pad_token_id: int | None,
        shuffle: bool = True,
    ) -> None:
        self.dataset = dataset.with_format("numpy")
        self.batch_size = batch_size
        self.rows_per_step = batch_size * gradient_accumulation_steps
        self.packing = packing
        self.max_length = max_length
        self.seed = seed
        self.pad_token_id = pad_token_id or 0
        self.shuffle = shuffle
        self.lengths = row_lengths(dataset)
        if not len(dataset):
            raise DataError("there are no rows to train on")
        if packing and self.lengths.max() > max_length:
            raise DataError(
                f"a row has {self.lengths.max()} tokens, a packed sequence {max_length}",
                hint="raise max_length, or choose over_length",
            )
        self._epoch: tuple[int, list[IntArray]] = (0, self._sequences(0))

    def __len__(self) -> int:
        """Optimizer steps of an epoch; the last one may be smaller."""
        return -(-len(self._epoch[1]) // self.rows_per_step)

    def step(self, epoch: int, index: int) -> list[Batch]:
        """Return the micro-batches of step `index` of `epoch`, both from 0.

        Raises:
            IndexError: there is no such step.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"step {index} of an epoch with {len(self)}")
        if epoch != self._epoch[0]:
            self._epoch = (epoch, self._sequences(epoch))
        first = index * self.rows_per_step
        chosen = self._epoch[1][first : first + self.rows_per_step]
        return [
            make_batch(
                self.dataset,
                chosen[i : i + self.batch_size],
                pad_token_id=self.pad_token_id,
                packing=self.packing,
            )
            for i in range(0, len(chosen), self.batch_size)
        ]

    def digest(self) -> str:
        """Return the SHA-256 of the first epoch's order: which rows are in which sequence."""
        sha = hashlib.sha256()
        for sequence in self._sequences(0):
            sha.update(len(sequence).to_bytes(8, "little") + sequence.astype("<i8").tobytes())
        return sha.hexdigest()

    def _sequences(self, epoch: int) -> list[IntArray]:
        """Return the row numbers of each sequence, in the epoch's order."""
        if self.packing:
            return pack(
                self.lengths, self.max_length, seed=self.seed, epoch=epoch, shuffle=self.shuffle
            )
        count = len(self.dataset)
        order = shuffled(count, seed=self.seed, epoch=epoch) if self.shuffle else np.arange(count)
        return list(order.reshape(-1, 1))


def eval_batches(
    dataset: datasets.Dataset, batch_size: int, pad_token_id: int | None
) -> Iterator[Batch]:
    """Yield every row once, in order."""
    dataset = dataset.with_format("numpy")
    for start in range(0, len(dataset), batch_size):
        rows = range(start, min(start + batch_size, len(dataset)))
        yield make_batch(
            dataset,
            [np.array([row]) for row in rows],
            pad_token_id=pad_token_id or 0,
            packing=False,
        )


def row_lengths(dataset: datasets.Dataset) -> IntArray:
    """Return the tokens of each row."""
    if not len(dataset):
        return np.empty(0, dtype=np.int64)
    column = dataset.with_format("arrow")[:]["input_ids"]
    return np.concatenate([chunk.value_lengths().to_numpy() for chunk in column.chunks]).astype(
        np.int64
    )


def make_batch(
    dataset: datasets.Dataset, sequences: Sequence[IntArray], *, pad_token_id: int, packing: bool
) -> Batch:
    """Return the batch whose sequences hold these rows of `dataset`, formatted as numpy."""
    numbers = [int(row) for sequence in sequences for row in sequence]
    rows = dataset[numbers]
    documents = iter(zip(rows["input_ids"], rows["labels"], strict=True))
    packs = [[next(documents) for _ in sequence] for sequence in sequences]
    width = max(sum(len(ids) for ids, _ in documents_) for documents_ in packs)
    input_ids = np.full((len(packs), width), pad_token_id, dtype=np.int64)
    labels = np.full_like(input_ids, IGNORE_INDEX)
    positions = np.zeros_like(input_ids)
    mask = np.zeros_like(input_ids)
    for row, pieces in enumerate(packs):
        at = 0
        for ids, targets in pieces:
            end = at + len(ids)
            input_ids[row, at:end] = ids
            labels[row, at + 1 : end] = targets[1:]
            positions[row, at:end] = np.arange(len(ids))
            at = end
        mask[row, :at] = 1
        positions[row, at:] = np.arange(width - at) + (0 if packing else at)
    is_padded = not mask.all()
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(positions),
        torch.from_numpy(mask) if is_padded and not packing else None,
        int((labels[:, 1:] != IGNORE_INDEX).sum()),
        int(mask.sum()),
        tuple(map(int, rows.get("source", numbers))),
    )
