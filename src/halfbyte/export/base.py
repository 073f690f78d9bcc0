"""The base under an adapter, as dense tensors, one at a time.

"dequantized" is the base as training saw it: weights that were held in 4 bits are dequantized (or
quantized and dequantized again, when the checkpoint is a 16-bit one). "original" is the 16-bit
checkpoint as it is. NF4 moves a weight by about 9 % of its norm, often more than the adapter does,
so which of the two an adapter is added to matters.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.reader import CheckpointReader
from halfbyte.device import default_device
from halfbyte.errors import CheckpointError
from halfbyte.export.names import TensorNames
from halfbyte.quant.layout import STATE_PREFIX, SUFFIXES, from_tensors
from halfbyte.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class Recipe:
    """How training held the weights of some modules in 4 bits.

    Args:
        modules: Modules of the model in memory that were quantized.
        quant_type: "nf4" or "fp4".
        block_size: Weights that share one absmax.
        double_quant: Whether the absmax values were quantized too.
        dtype: dtype of the weights at the moment they were quantized; None for the checkpoint's.
    """

    modules: frozenset[str]
    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    dtype: torch.dtype | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model's config.json.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", hint="name the folder of a transformers model"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is a {type(config).__name__}, expected an object")
    return config


class BaseWeights:
    """A checkpoint's tensors under their own names, with 4-bit weights as dense ones.

    Args:
        reader: A transformers checkpoint, 16-bit or in bitsandbytes' 4-bit layout.
        names: What its tensors are called in memory.
        recipe: What to quantize and dequantize on the way; None leaves all as it is.
    """

    def __init__(
        self, reader: CheckpointReader, names: TensorNames, recipe: Recipe | None = None
    ) -> None:
        self.reader = reader
        modules = recipe.modules if recipe is not None else frozenset()
        weights = {f"{module}.weight" for module in modules}
        self._recipe = recipe
        self._round_trips = {
            there for name, there in names.in_checkpoint.items() if name in weights
        }
        turned = {f"{module}.weight" for module in names.transposed}
        self._transposed = {there for name, there in names.in_checkpoint.items() if name in turned}
        self._packed = packed_names(reader)

    def tensor(self, name: str) -> Tensor:
        """Return one dense tensor in the dtype that it was quantized from, on the CPU."""
        is_transposed = name in self._transposed
        if name in self._packed:
            quantized = self._read_packed(name)
        elif name in self._round_trips and self._recipe is not None:
            quantized = self._quantize(name, self._recipe)
        else:
            return self.reader.tensor(name)
        dense = quantized.dequantize().cpu()
        return dense.T.contiguous() if is_transposed else dense

    def _read_packed(self, name: str) -> QuantizedWeight:
        parts = {name + suffix for suffix in SUFFIXES} & set(self.reader.names())
        tensors = {part: self.reader.tensor(part) for part in parts}
        return from_tensors(name, tensors).to(default_device())

    def _quantize(self, name: str, recipe: Recipe) -> QuantizedWeight:
        """Quantize as training did: on the GPU where there is one."""
        weight = self.reader.tensor(name, default_device())
        weight = weight.to(recipe.dtype or weight.dtype)
        return QuantizedWeight.quantize(
            weight.T.contiguous() if name in self._transposed else weight,
            quant_type=recipe.quant_type,
            block_size=recipe.block_size,
            double_quant=recipe.double_quant,
        )


def packed_names(reader: CheckpointReader) -> set[str]:
    """Return the names of the weights that the checkpoint holds in 4 bits."""
    return {name.partition(STATE_PREFIX)[0] for name in reader.names() if STATE_PREFIX in name}


def dense_names(reader: CheckpointReader) -> list[str]:
    """Return the tensors that a model has, without the scales and states of 4-bit weights."""
    extra = {name + suffix for name in packed_names(reader) for suffix in SUFFIXES if suffix}
    return [name for name in reader.names() if name not in extra]


def is_four_bit(config: dict[str, Any]) -> bool:
    """Whether config.json says that the checkpoint holds 4-bit weights.

    Raises:
        CheckpointError: it holds weights of another quantization.
    """
    quantization = config.get("quantization_config")
    if not quantization:
        return False
    method = quantization.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes" or not quantization.get("load_in_4bit", False):
        raise CheckpointError(
            f"the base is quantized with {method!r}; merging reads bitsandbytes' 4-bit layout",
            hint="give the 16-bit base with base=... and onto=original",
        )
    return True
