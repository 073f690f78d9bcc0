"""A linear layer's weight held in four bits, as a value.

The weight `[out, in]` is flattened row by row and cut into blocks. Each block is divided by its
largest magnitude (`absmax`) and every element becomes the nearest of sixteen levels. With double
quantization (QLoRA, Dettmers et al. 2023, section 3) `absmax` itself is stored in eight bits.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import QuantizationError
from halfbyte.kernels import codebooks, nf4

_LARGEST_SUM = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class QuantizedWeight:
    """Packed codes with the scales that turn them back into a matrix.

    With n elements, B = ceil(n / block_size) blocks and G = ceil(B / 256) groups of blocks:

    Attributes:
        packed: uint8 `[(n + 1) // 2, 1]`, two codes a byte, the first one in the high nibble.
        absmax: float32 `[B]`, or uint8 `[B]` with double quantization.
        nested_absmax: float32 `[G]`, the scale of each 256 codes of `absmax`, or None.
        nested_map: float32 `[256]`, the levels of the codes of `absmax`, or None.
        offset: float32 `[]`, subtracted from `absmax` before it was quantized, or None.
        shape: Shape of the matrix, `[out, in]`.
        dtype: Dtype of the tensor that was quantized; what `dequantize` gives by default.
        block_size: Elements that share one absmax.
        quant_type: "nf4" or "fp4".
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_map: Tensor | None
    offset: Tensor | None
    shape: torch.Size
    dtype: torch.dtype
    block_size: int = 64
    quant_type: str = "nf4"

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
    ) -> "QuantizedWeight":
        """Quantize a float32, float16 or bfloat16 tensor on the device that it is on.

        Raises:
            QuantizationError: it is empty or of another dtype, or holds NaN, Inf or numbers whose
                scales have no mean.
        """
        packed, absmax = nf4.quantize_4bit(weight, block_size=block_size, quant_type=quant_type)
        scales, nested_absmax, nested_map, offset = absmax, None, None, None
        if double_quant:
            scales, nested_absmax, offset = nf4.quantize_absmax(absmax)
            nested_map = codebooks.dynamic_map().to(weight.device, non_blocking=True)
        # Looked at last: on a GPU whoever looks waits for all that was started before.
        _check_scales(absmax, offset, weight.shape)
        return cls(
            packed=packed,
            absmax=scales,
            nested_absmax=nested_absmax,
            nested_map=nested_map,
            offset=offset,
            shape=weight.shape,
            dtype=weight.dtype,
            block_size=block_size,
            quant_type=quant_type,
        )

    @property
    def nested(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """`(nested_absmax, nested_map, offset)` with double quantization, else None."""
        if self.nested_absmax is None or self.nested_map is None or self.offset is None:
            return None
        return self.nested_absmax, self.nested_map, self.offset

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the matrix `[out, in]` in `dtype` (by default the dtype that was quantized)."""
        target = self.dtype if dtype is None else dtype
        block_size, quant_type = self.block_size, self.quant_type
        if self.nested is None:
            return nf4.dequantize_4bit(
                self.packed,
                self.absmax,
                shape=self.shape,
                dtype=target,
                block_size=block_size,
                quant_type=quant_type,
            )
        return nf4.dequantize_nested(
            self.packed,
            self.absmax,
            *self.nested,
            shape=self.shape,
            dtype=target,
            block_size=block_size,
            quant_type=quant_type,
        )

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and of every scale."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that are there, by field name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """Return the same weight on `device`."""
        moved: dict[str, Any] = {name: value.to(device) for name, value in self.tensors().items()}
        return dataclasses.replace(self, **moved)


def _check_scales(absmax: Tensor, mean: Tensor | None, shape: torch.Size) -> None:
    """Refuse a weight by its scales: a block's is finite exactly where all of its elements are.

    Args:
        absmax: The scales.
        mean: Theirs, with double quantization.
        shape: Of the weight.
    """
    # No scale is above their sum. The mean, which is there, spares most weights the largest one.
    if mean is not None and float(mean) * absmax.numel() ** 2 < _LARGEST_SUM / 2:
        return
    largest = float(absmax.amax())  # NaN is a maximum
    if not math.isfinite(largest):
        raise QuantizationError(
            f"a weight of shape {list(shape)} holds NaN or Inf",
            hint="the checkpoint is damaged or its training diverged: take another one",
        )
    if mean is not None and largest * absmax.numel() > _LARGEST_SUM:
        raise QuantizationError(
            f"a weight of shape {list(shape)} holds {largest:.3g}, and the mean of its scales may "
            "overflow",
            hint="the checkpoint is damaged; or set double_quant=False",
        )
