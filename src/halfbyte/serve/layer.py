"""A linear layer with another adapter for every row of the batch.

    y[b] = base(x[b]) + x[b] A[slots[b]]^T B[slots[b]]^T

Adapters stand stacked, each in a slot, B with its scaling in it. Slot 0 is all zeros and stands for
"no adapter", so a row without one goes through the same products and comes out as the base left it.
Lower ranks are filled up with zeros, which changes nothing. A layer takes two small batched
products (Punica, Chen et al. 2023, arXiv 2310.18547, calls them shrink and expand).

Shape letters: B rows of the batch, S tokens of a row, I in features, O out features, R rank, N
slots.
"""

import torch
from torch import Tensor, nn


class Selection:
    """Which slot each row of the running batch uses; all layers share one.

    Attributes:
        slots: int64 `[B]`, or None where no row has an adapter.
    """

    def __init__(self) -> None:
        self.slots: Tensor | None = None


class BatchedLoraLinear(nn.Module):
    """A frozen linear layer and the adapters of all slots.

    Args:
        base_layer: Any module from `[B, S, I]` to `[B, S, O]`.
        selection: Says which row uses which slot.
        in_features: I.
        out_features: O.
        device: Where the adapters are held.
        dtype: What they are held in, the dtype of the activations.
    """

    lora_A: Tensor
    lora_B: Tensor

    def __init__(
        self,
        base_layer: nn.Module,
        selection: Selection,
        in_features: int,
        out_features: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.selection = selection
        self.register_buffer("lora_A", torch.zeros(1, 0, in_features, device=device, dtype=dtype))
        self.register_buffer("lora_B", torch.zeros(1, out_features, 0, device=device, dtype=dtype))

    def resize(self, num_slots: int, rank: int) -> None:
        """Make room for so many slots of so high a rank; what is held stays."""
        (old_slots, old_rank, in_features), out_features = self.lora_A.shape, self.lora_B.shape[1]
        lora_A = self.lora_A.new_zeros(num_slots, rank, in_features)
        lora_B = self.lora_B.new_zeros(num_slots, out_features, rank)
        lora_A[:old_slots, :old_rank] = self.lora_A
        lora_B[:old_slots, :, :old_rank] = self.lora_B
        self.lora_A, self.lora_B = lora_A, lora_B

    def put(self, slot: int, lora_A: Tensor, lora_B: Tensor, scaling: float) -> None:
        """Fill a slot with A `[R, I]` and B `[O, R]`; there must be room for their rank."""
        self.clear(slot)
        rank = lora_A.shape[0]
        self.lora_A[slot, :rank] = lora_A
        self.lora_B[slot, :, :rank] = lora_B.float() * scaling

    def clear(self, slot: int) -> None:
        """Make a slot change nothing."""
        self.lora_A[slot] = 0
        self.lora_B[slot] = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return `[B, S, O]`, or in the leading shape of `x` where that is flat, in its dtype."""
        y: Tensor = self.base_layer(x)
        slots = self.selection.slots
        if slots is None:
            return y
        x_BSI = x.reshape(slots.shape[0], -1, x.shape[-1])
        xA_BSR = torch.bmm(x_BSI, self.lora_A[slots].mT)
        y_BSO = y.reshape(slots.shape[0], -1, y.shape[-1])
        return torch.baddbmm(y_BSO, xA_BSR, self.lora_B[slots].mT).view(y.shape)
