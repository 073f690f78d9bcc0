"""The base under an adapter, as dense tensors, one at a time.

"dequantized" is the base as training saw it: weights that were held in 4 bits are dequantized (or
quantized and dequantized again, when the checkpoint is a 16-bit one). "original" is the 16-bit
checkpoint as it is. NF4 moves a weight by about 9 % of its norm, often more than the adapter does,
so which of the two an adapter is added to matters.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.device import default_device
from halfbyte.models.quantize import weights_to_quantize
from halfbyte.models.skeleton import Skeleton, conv1d_weights
from halfbyte.quant.config import NF4Config
from halfbyte.quant.layout import SUFFIXES, from_tensors
from halfbyte.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class Recipe:
    """How training held a 16-bit base in 4 bits.

    Args:
        config: The quantizer's settings.
        dtype: dtype of the weights at the moment they were quantized; None for the checkpoint's.
    """

    config: NF4Config
    dtype: torch.dtype | None = None


class BaseWeights:
    """A checkpoint's tensors under their own names, with 4-bit weights as dense ones.

    Args:
        skeleton: A transformers checkpoint, 16-bit or in bitsandbytes' 4-bit layout.
        recipe: What to quantize and dequantize on the way; None leaves all as it is.
    """

    def __init__(self, skeleton: Skeleton, recipe: Recipe | None = None) -> None:
        self._skeleton = skeleton
        self._recipe = recipe
        self._device = default_device()
        turned = conv1d_weights(skeleton.model)
        chosen = set() if recipe is None else weights_to_quantize(skeleton.model, recipe.config)
        self._transposed = {name for name, there in skeleton.names.items() if there in turned}
        self._round_trips = {name for name, there in skeleton.names.items() if there in chosen}

    @property
    def names(self) -> list[str]:
        """Names of all dense tensors, in the order of the checkpoint."""
        held = {*self._skeleton.names, *self._skeleton.converted}
        return [name for name in self._skeleton.reader.names() if name in held]

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """Return a tensor's dtype on disk; None for 4-bit weights, which have one when dense."""
        packed = name in self._skeleton.packed
        return None if packed else self._skeleton.reader.info(name).dtype

    def tensor(self, name: str) -> Tensor:
        """Return one dense tensor in the dtype that it was quantized from, on the CPU."""
        if name in self._skeleton.packed:
            quantized = self._read_packed(name)
        elif name in self._round_trips and self._recipe is not None:
            quantized = self._quantize(name, self._recipe)
        else:
            return self._skeleton.reader.tensor(name)
        dense = quantized.dequantize().cpu()
        return dense.T.contiguous() if name in self._transposed else dense

    def _read_packed(self, name: str) -> QuantizedWeight:
        reader = self._skeleton.reader
        parts = {name + suffix for suffix in SUFFIXES} & set(reader.names())
        tensors = {part: reader.tensor(part) for part in parts}
        return from_tensors(name, tensors).to(self._device)

    def _quantize(self, name: str, recipe: Recipe) -> QuantizedWeight:
        """Quantize as training did: on the GPU where there is one."""
        weight = self._skeleton.reader.tensor(name, self._device)
        weight = weight.to(recipe.dtype or weight.dtype)
        return QuantizedWeight.quantize(
            weight.T.contiguous() if name in self._transposed else weight,
            quant_type=recipe.config.quant_type,
            block_size=recipe.config.block_size,
            double_quant=recipe.config.double_quant,
        )
