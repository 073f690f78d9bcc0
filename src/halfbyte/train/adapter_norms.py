"""How large each adapter is, measured where it lies and read a step later, without waiting.

The norms are computed behind the step's own work and copied to the host; when the next step has
told its loss they have long arrived, so nothing of the training waits for them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfbyte.memory.host_copy import HostBuffers, HostCopy

_A, _B = ".lora_A.", ".lora_B."


@dataclass(frozen=True)
class AdapterNorms:
    """Root mean squares of one layer's A and B, which the update B A is made of."""

    rms_a: float
    rms_b: float


class AdapterProbe:
    """Measures the trained LoRA layers of a model.

    Args:
        model: With adapters; those whose A and B are trained count.
    """

    def __init__(self, model: nn.Module) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._pairs = {
            name.split(_A)[0]: (parameter, trained[name.replace(_A, _B)])
            for name, parameter in trained.items()
            if _A in name and name.replace(_A, _B) in trained
        }
        self._buffers = HostBuffers()
        self._copy: HostCopy | None = None

    def measure(self) -> None:
        """Begin to measure; `read` returns it."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for pair in self._pairs.values():
            norms = by_device.setdefault(pair[0].device, [])
            norms += [torch.linalg.vector_norm(p.detach(), dtype=torch.float32) for p in pair]
        stacked = {str(device): torch.stack(norms) for device, norms in by_device.items()}
        self._copy = self._buffers.copy(stacked)

    def read(self) -> dict[str, AdapterNorms] | None:
        """Return what was measured last, once, by the layer's name."""
        if self._copy is None:
            return None
        norms = {device: iter(values.tolist()) for device, values in self._copy.wait().items()}
        self._copy = None
        found = {}
        for name, pair in self._pairs.items():
            values = norms[str(pair[0].device)]
            rms_a, rms_b = (next(values) / math.sqrt(p.numel()) for p in pair)
            found[name] = AdapterNorms(rms_a, rms_b)
        return found
