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
        device: Where weights are quantized and dequantized; by default the GPU where there is one.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        recipe: Recipe | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._skeleton = skeleton
        self._recipe = recipe
        self._device = device or default_device()
        self._shapes = {name: tuple(t.shape) for name, t in skeleton.model.state_dict().items()}
        turned = conv1d_weights(skeleton.model)
        self.transposed = {name for name, there in skeleton.names.items() if there in turned}
        self._round_trips = set() if recipe is None else self.held_in_4_bits(recipe.config)

    @property
    def names(self) -> list[str]:
        """Names of all dense tensors, in the order of the checkpoint."""
        held = {*self._skeleton.names, *self._skeleton.converted}
        return [name for name in self._skeleton.reader.names() if name in held]

    def held_in_4_bits(self, config: NF4Config) -> set[str]:
        """Return the names of the weights that `config` quantizes."""
        chosen = weights_to_quantize(self._skeleton.model, config)
        return {name for name, there in self._skeleton.names.items() if there in chosen}

    def is_as_stored(self, name: str) -> bool:
        """Whether a tensor is what the checkpoint holds, bit for bit."""
        return name not in self._skeleton.packed and name not in self._round_trips

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a dense tensor, without reading it."""
        there = self._skeleton.names.get(name)
        return self._skeleton.reader.info(name).shape if there is None else self._shapes[there]

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """Return a tensor's dtype on disk; None for 4-bit weights, which have one when dense."""
        packed = name in self._skeleton.packed
        return None if packed else self._skeleton.reader.info(name).dtype

    def tensor(self, name: str) -> Tensor:
        """Return one dense tensor in the dtype that it was quantized from, for the caller to keep.

        It is on the device if it went through 4 bits, else on the CPU.
        """
        if name in self._skeleton.packed:
            weight = self._read_packed(name)
        elif name in self._round_trips and self._recipe is not None:
            weight = self._quantize(name, self._recipe)
        else:
            return self._skeleton.reader.tensor(name)
        dense = weight.dequantize()
        return dense.T.contiguous() if name in self.transposed else dense

    def _read_packed(self, name: str) -> QuantizedWeight:
        reader = self._skeleton.reader
        parts = {name + suffix for suffix in SUFFIXES} & set(reader.names())
        tensors = {part: reader.tensor(part) for part in parts}
        return from_tensors(name, tensors).to(self._device)

    def _quantize(self, name: str, recipe: Recipe) -> QuantizedWeight:
        """Quantize as training did."""
        weight = self._skeleton.reader.tensor(name, self._device)
        weight = weight.to(recipe.dtype or weight.dtype)
        return quantized(
            weight.T.contiguous() if name in self.transposed else weight, recipe.config
        )


def quantized(weight: Tensor, config: NF4Config) -> QuantizedWeight:
    """Return a float weight [out, in] in the 4 bits of `config`.

    Raises:
        QuantizationError: it holds NaN or Inf.
    """
    return QuantizedWeight.quantize(
        weight,
        quant_type=config.quant_type,
        block_size=config.block_size,
        double_quant=config.double_quant,
    )
