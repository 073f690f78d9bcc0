"""What an adapter does to one tensor of its base, in float32.

LoRA (Hu et al. 2021, arXiv:2106.09685) adds scaling * B @ A to a weight; DoRA (Liu et al. 2024,
arXiv:2402.09353, section 4) then gives every output row a trained length. Trained copies and
trained rows replace what was there. Nothing here rounds: the caller rounds once, at the end.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import AdapterError

Load = Callable[[str], Tensor]
"""Returns one tensor of the adapter, as float32."""


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

    def apply(self, weight: Tensor, load: Load) -> Tensor:
        """Return the updated float32 [out, in] weight ([in, out] where `is_transposed`)."""
        if weight.ndim != 2:
            raise AdapterError(
                f"{self.lora_A} adapts a tensor of shape {list(weight.shape)}; "
                "merging is for matrices",
                hint="keep the adapter beside its base, or merge with peft's merge_and_unload",
            )
        weight_OI = weight.T if self.is_transposed else weight
        A, B = load(self.lora_A).to(weight.device), load(self.lora_B).to(weight.device)
        _expect(self.lora_A, A, (self.rank, weight_OI.shape[1]))
        _expect(self.lora_B, B, (weight_OI.shape[0], self.rank))
        merged = torch.addmm(weight_OI, B, A, alpha=self.scaling)
        if self.magnitude is not None:
            magnitude = load(self.magnitude).to(weight.device)
            _expect(self.magnitude, magnitude, (weight_OI.shape[0],))
            merged *= (magnitude / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
        return merged.T if self.is_transposed else merged


@dataclass(frozen=True)
class EmbeddingUpdate:
    """E + scaling * (B @ A)^T for an embedding E [vocab, dim], A [rank, vocab], B [dim, rank]."""

    lora_A: str
    lora_B: str
    rank: int
    scaling: float

    def apply(self, weight: Tensor, load: Load) -> Tensor:
        """Return the updated float32 [vocab, dim] table."""
        A, B = load(self.lora_A).to(weight.device), load(self.lora_B).to(weight.device)
        _expect(self.lora_A, A, (self.rank, weight.shape[0]))
        _expect(self.lora_B, B, (weight.shape[1], self.rank))
        return torch.addmm(weight, A.T, B.T, alpha=self.scaling)


@dataclass(frozen=True)
class BiasUpdate:
    """bias + scaling * (the bias of B): `lora_bias` in peft."""

    lora_bias: str
    scaling: float

    def apply(self, bias: Tensor, load: Load) -> Tensor:
        """Return the updated float32 [out] bias."""
        update = load(self.lora_bias).to(bias.device)
        _expect(self.lora_bias, update, tuple(bias.shape))
        return bias + self.scaling * update


@dataclass(frozen=True)
class RowsUpdate:
    """Trained rows of an embedding take the places of the old ones: `trainable_token_indices`."""

    rows: str
    indices: tuple[int, ...]

    def apply(self, weight: Tensor, load: Load) -> Tensor:
        """Return the float32 [vocab, dim] table with its trained rows."""
        rows = load(self.rows).to(weight.device)
        _expect(self.rows, rows, (len(self.indices), weight.shape[1]))
        if max(self.indices) >= weight.shape[0]:
            raise AdapterError(
                f"{self.rows} trains token {max(self.indices)}, "
                f"but the base's table has {weight.shape[0]} rows",
                hint="give the base that the adapter was trained on with base=...",
            )
        return weight.index_copy(0, torch.tensor(self.indices, device=weight.device), rows)


@dataclass(frozen=True)
class ReplaceUpdate:
    """A trained copy takes the tensor's place: `modules_to_save`, or `bias` in peft."""

    copy: str

    def apply(self, tensor: Tensor, load: Load) -> Tensor:
        """Return the float32 copy; only the number of rows may differ (a grown vocabulary)."""
        copy = load(self.copy).to(tensor.device)
        _expect(self.copy, copy, (*copy.shape[:1], *tensor.shape[1:]))
        return copy


Update = LoraUpdate | EmbeddingUpdate | BiasUpdate | RowsUpdate | ReplaceUpdate
