"""The trainable parameters of one device as one flat float32 vector.

Adapters are hundreds of small matrices. Laid out end to end, their gradient norm, their clipping
and their update are a few large kernels instead of thousands of small ones, and optimizer state can
be cut into pages wherever it suits memory. A float32 parameter becomes a view of the vector, and so
does its gradient. A parameter of another dtype (a bf16 module trained in full) keeps its own
storage: the vector holds its float32 master copy and sums its gradients over micro-batches in
float32.

    values     | decayed: lora_A  lora_B  lora_A ... | not decayed: biases, norms |
    gradients  | the same layout                                                  |

Each parameter starts at a multiple of `ALIGNMENT` elements; the gap behind it stays zero. So no
block of an 8-bit state spans two parameters, as in bitsandbytes, which keeps state per tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

ALIGNMENT = 256  # elements: the block of an 8-bit state


@dataclass(frozen=True)
class Slot:
    """Where one parameter lies in the vector: elements `start` to `start + numel`."""

    name: str
    parameter: nn.Parameter
    start: int

    @property
    def numel(self) -> int:
        """Elements of the parameter, without the gap behind it."""
        return self.parameter.numel()

    @property
    def stop(self) -> int:
        """Where the next parameter starts."""
        return self.start + -(-self.numel // ALIGNMENT) * ALIGNMENT

    @property
    def has_master(self) -> bool:
        """Whether the vector holds a float32 copy of a parameter of another dtype."""
        return self.parameter.dtype != torch.float32

    def of(self, flat: Tensor) -> Tensor:
        """Return this parameter's part of a flat tensor, as a view in the parameter's shape."""
        return flat[self.start : self.start + self.numel].view(self.parameter.shape)


def is_decayed(parameter: Tensor) -> bool:
    """Whether weight decay shrinks `parameter`: matrices yes, biases and norms (vectors) no.

    This is the rule of transformers' Trainer, except that it also decays DoRA's magnitude vectors.
    """
    return parameter.ndim >= 2


class FlatParameters:
    """Flat float32 values and gradients of the named parameters, which must share one device.

    Attributes:
        slots: Where each parameter lies; decayed ones first.
        values: float32 [n], the parameters (or their master copies).
        gradients: float32 [n], filled by `backward()`.
        num_decayed: Elements at the front that weight decay applies to.
    """

    def __init__(self, named: Sequence[tuple[str, nn.Parameter]]) -> None:
        ordered = sorted(named, key=lambda item: not is_decayed(item[1]))  # stable: keeps the order
        self.slots: list[Slot] = []
        for name, parameter in ordered:
            start = self.slots[-1].stop if self.slots else 0
            self.slots.append(Slot(name, parameter, start))
        self.num_decayed = max(
            (slot.stop for slot in self.slots if is_decayed(slot.parameter)), default=0
        )
        device = self.slots[0].parameter.device
        self.values = torch.zeros(self.slots[-1].stop, dtype=torch.float32, device=device)
        self.gradients = torch.zeros_like(self.values)
        self._hooks = [handle for slot in self.slots if (handle := self._adopt(slot))]

    def _adopt(self, slot: Slot) -> RemovableHandle | None:
        """Take the parameter's value over; return the hook that fetches a gradient of its own."""
        slot.of(self.values).copy_(slot.parameter.detach())
        if slot.has_master:
            gradient = slot.of(self.gradients)

            def add_to_gradient(parameter: Tensor) -> None:
                gradient.add_(parameter.grad)  # type: ignore[arg-type]
                parameter.grad = None

            return slot.parameter.register_post_accumulate_grad_hook(add_to_gradient)
        slot.parameter.data = slot.of(self.values)
        return None

    def zero_gradients(self) -> None:
        """Set every gradient to zero, and attach it again where somebody took it away."""
        self.gradients.zero_()
        for slot in self.slots:
            slot.parameter.grad = None if slot.has_master else slot.of(self.gradients)

    def release(self) -> None:
        """Take gradients and hooks off the parameters, which keep their values."""
        for hook in self._hooks:
            hook.remove()
        for slot in self.slots:
            slot.parameter.grad = None

    def publish_masters(self) -> None:
        """Round the master copies back into the parameters that have one."""
        for slot in self.slots:
            if slot.has_master:
                slot.parameter.data.copy_(slot.of(self.values))
