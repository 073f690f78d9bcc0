"""What an adapter does to one tensor of its base, in float32, a slab of rows at a time.

LoRA (Hu et al. 2021, arXiv:2106.09685) adds scaling * B @ A to a weight; DoRA (Liu et al. 2024,
arXiv:2402.09353, section 4) then gives every output row a trained length. Trained copies and
trained rows replace what was there. Every row of a result depends on the same row of the base
alone, so that a large tensor can be worked on in slabs. Nothing here rounds: the caller rounds
once, at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import AdapterError

Load = Callable[[str], Tensor]
"""Returns one tensor of the adapter, in the dtype that it was saved in."""


def _expect(key: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise AdapterError(
            f"{key} should be {list(shape)} to fit the base, but is {list(tensor.shape)}",
            hint="give the base that the adapter was trained on with base=...",
        )


@dataclass(frozen=True)
class LoraUpdate:
    """W + scaling * B @ A, with DoRA's row lengths where there are any.

    Args:
        lora_A: Key of A, [rank, in].
        lora_B: Key of B, [out, rank].
        rank: Rank that the settings give this module.
        scaling: alpha / rank, or alpha / sqrt(rank) with rsLoRA.
        magnitude: Key of DoRA's trained row lengths, [out].
        is_transposed: The module stores [in, out] (transformers' Conv1D).
    """

    lora_A: str
    lora_B: str
    rank: int
    scaling: float
    magnitude: str | None = None
    is_transposed: bool = False

    def check(self, shape: tuple[int, ...], load: Load) -> tuple[int, ...]:
        """Return the shape after the update of a weight [out, in]: the same."""
        if len(shape) != 2:
            raise AdapterError(
                f"{self.lora_A} adapts a tensor of shape {list(shape)}; merging is for matrices",
                hint="keep the adapter beside its base, or merge with peft's merge_and_unload",
            )
        _expect(self.lora_A, load(self.lora_A), (self.rank, shape[1]))
        _expect(self.lora_B, load(self.lora_B), (shape[0], self.rank))
        if self.magnitude is not None:
            _expect(self.magnitude, load(self.magnitude), (shape[0],))
        return shape

    def apply(self, weight_OI: Tensor, rows: slice, load: Load) -> Tensor:
        """Return the updated rows of the float32 [out, in] weight."""
        A, B = (load(key).to(weight_OI) for key in (self.lora_A, self.lora_B))
        merged = torch.addmm(weight_OI, B[rows], A, alpha=self.scaling)
        if self.magnitude is not None:
            magnitude = load(self.magnitude)[rows].to(weight_OI)
            merged *= (magnitude / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
        return merged


@dataclass(frozen=True)
class EmbeddingUpdate:
    """E + scaling * (B @ A)^T for an embedding E [vocab, dim], A [rank, vocab], B [dim, rank]."""

    lora_A: str
    lora_B: str
    rank: int
    scaling: float

    def check(self, shape: tuple[int, ...], load: Load) -> tuple[int, ...]:
        """Return the shape after the update of a table [vocab, dim]: the same."""
        _expect(self.lora_A, load(self.lora_A), (self.rank, shape[0]))
        _expect(self.lora_B, load(self.lora_B), (shape[1], self.rank))
        return shape

    def apply(self, table: Tensor, rows: slice, load: Load) -> Tensor:
        """Return the updated rows of the float32 [vocab, dim] table."""
        A, B = load(self.lora_A)[:, rows].to(table), load(self.lora_B).to(table)
        return torch.addmm(table, A.T, B.T, alpha=self.scaling)


@dataclass(frozen=True)
class BiasUpdate:
    """bias + scaling * (the bias of B): `lora_bias` in peft."""

    lora_bias: str
    scaling: float

    def check(self, shape: tuple[int, ...], load: Load) -> tuple[int, ...]:
        """Return the shape after the update of a bias [out]: the same."""
        _expect(self.lora_bias, load(self.lora_bias), shape)
        return shape

    def apply(self, bias: Tensor, rows: slice, load: Load) -> Tensor:
        """Return the updated elements of the float32 [out] bias."""
        return bias + self.scaling * load(self.lora_bias)[rows].to(bias)


@dataclass(frozen=True)
class RowsUpdate:
    """Trained rows of an embedding take the places of the old ones: `trainable_token_indices`.

    Rows behind the last one of the base are those of new tokens; all of them must be trained.
    """

    rows: str
    indices: tuple[int, ...]

    def check(self, shape: tuple[int, ...], load: Load) -> tuple[int, ...]:
        """Return the shape after the update of a table [vocab, dim]: with rows for new tokens."""
        _expect(self.rows, load(self.rows), (len(self.indices), shape[1]))
        last = max(self.indices)
        if not set(range(shape[0], last + 1)) <= set(self.indices):
            raise AdapterError(
                f"{self.rows} trains token {last}, but the base's table has {shape[0]} rows, "
                "and some between are not trained",
                hint="give the base that the adapter was trained on with base=...",
            )
        return (max(shape[0], last + 1), shape[1])

    def apply(self, table: Tensor, rows: slice, load: Load) -> Tensor:
        """Return the float32 rows of the [vocab, dim] table, the trained ones among them."""
        trained = load(self.rows)
        places = [
            (place, index - rows.start)
            for place, index in enumerate(self.indices)
            if rows.start <= index < rows.start + len(table)
        ]
        if not places:
            return table
        sources, targets = torch.tensor(places, device=table.device).T
        return table.index_copy(0, targets, trained[sources.to(trained.device)].to(table))


@dataclass(frozen=True)
class ReplaceUpdate:
    """A trained copy takes the tensor's place: `modules_to_save`, or `bias` in peft."""

    copy: str

    def check(self, shape: tuple[int, ...], load: Load) -> tuple[int, ...]:
        """Return the shape of the copy; only the number of rows may differ (a grown vocabulary)."""
        copy = load(self.copy)
        _expect(self.copy, copy, (*copy.shape[:1], *shape[1:]))
        return tuple(copy.shape)

    def apply(self, tensor: Tensor, rows: slice, load: Load) -> Tensor:
        """Return the rows of the float32 copy."""
        return load(self.copy)[rows].to(tensor)


Update = LoraUpdate | EmbeddingUpdate | BiasUpdate | RowsUpdate | ReplaceUpdate
