"""What the projections' tests compare with."""

import pytest
import torch

from halfbyte.quant.weight import QuantizedWeight


@pytest.fixture(scope="session")
def plain_outputs():
    """Return a function of siblings, x and what adapters read to their outputs, in float64."""

    def outputs_of(group, x, read):
        outputs = []
        for p in group.projections:
            weight = p.weight
            if isinstance(weight, QuantizedWeight):
                weight = weight.dequantize().double()
            y = x @ weight.t()
            if p.lora_A is not None:
                y = y + p.scaling * (read @ p.lora_A.t()) @ p.lora_B.t()
            outputs.append(y if p.bias is None else y + p.bias)
        return torch.cat(outputs, 1)

    return outputs_of
