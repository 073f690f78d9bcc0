"""A linear layer whose weight stays in four bits.

Forward and backward each dequantize the weight into a temporary and multiply: between the two only
the packed codes are kept. The weight itself gets no gradient.
"""

import math
from collections.abc import Callable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from halfbyte.errors import HalfbyteError
from halfbyte.kernels import linear_4bit as products
from halfbyte.quant import layout
from halfbyte.quant.weight import QuantizedWeight

_SCALES = ("absmax", "nested_absmax", "nested_map", "offset")


class _Multiply(torch.autograd.Function):
    """`x W^T + b` with gradients to x and b; W is dequantized to the dtype of x, twice.

    The quantized weight arrives field by field, since `torch.compile` traces tensors and constants.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *fields: Any) -> Tensor:
        weight = QuantizedWeight(*fields)
        tensors, ctx.constants = fields[:5], fields[5:]
        ctx.save_for_backward(*tensors)
        return products.linear_4bit(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: under gradient checkpointing saved tensors can be unpacked a single time.
        fields = (*ctx.saved_tensors, *ctx.constants)
        weight = QuantizedWeight(*fields)
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = products.grad_input_4bit(grad_output, weight)
        if ctx.needs_input_grad[1]:
            grad_bias = grad_output.sum(0)
        return grad_x, grad_bias, *[None] * len(fields)


def linear_4bit(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Return `x W^T + b` in the dtype of `x`, differentiable in `x` and `b`.

    Args:
        x: `[..., in]`, floating point.
        weight: The quantized `[out, in]`.
        bias: `[out]` in the dtype of `x`, or None.
    """
    # Rows in and rows out: a view made inside the Function could not be changed in place outside.
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = _Multiply.apply(
        rows,
        bias,
        weight.packed,
        weight.absmax,
        weight.nested_absmax,
        weight.nested_map,
        weight.offset,
        weight.shape,
        weight.dtype,
        weight.block_size,
        weight.quant_type,
    )
    return y.view(*x.shape[:-1], y.shape[-1])


class NF4Linear(nn.Linear):
    """`nn.Linear` with a 4-bit weight: `weight` holds the packed codes, buffers hold the scales.

    A new layer is empty: its `weight` is a placeholder on the meta device until `quantized` is set
    (by a checkpoint loader, or by `from_linear`). The state dict has bitsandbytes' names. Codes and
    scales move with `.to(device)` and never change dtype.

    Args:
        in_features: Columns of the weight.
        out_features: Rows of the weight.
        bias: Whether there is a bias.
        compute_dtype: Dtype of the multiplication; None means autocast's, or else the input's.
        dtype: Dtype of the placeholder and of the bias.
        is_conv1d: Whether it stands for a transformers `Conv1D`, whose weight is `[in, out]`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,  # noqa: FBT001, FBT002  (as nn.Linear)
        *,
        compute_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        is_conv1d: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        self.requires_grad_(requires_grad=False)
        self.compute_dtype = compute_dtype
        self.is_conv1d = is_conv1d
        self.weight_dtype: torch.dtype | None = None
        self.block_size = 64
        self.quant_type = "nf4"
        for name in _SCALES:
            self.register_buffer(name, None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> "NF4Linear":
        """Return `linear` with its weight quantized where it is; the bias is shared, not copied.

        Raises:
            QuantizationError: the weight is not floating point, or holds NaN or Inf.
        """
        layer = cls(
            linear.in_features, linear.out_features, bias=False, compute_dtype=compute_dtype
        )
        layer.bias = linear.bias
        layer.quantized = QuantizedWeight.quantize(
            linear.weight, quant_type=quant_type, block_size=block_size, double_quant=double_quant
        )
        return layer

    def reset_parameters(self) -> None:
        """Do nothing: a quantized weight comes from a checkpoint."""

    @property
    def is_quantized(self) -> bool:
        """Whether the layer holds codes (and not a placeholder)."""
        return self._buffers["absmax"] is not None

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight as a value that shares this layer's memory."""
        scales: dict[str, Any] = {name: self._buffers[name] for name in _SCALES}
        return QuantizedWeight(
            packed=self.weight,
            **scales,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.weight_dtype or self.weight.dtype,
            block_size=self.block_size,
            quant_type=self.quant_type,
        )

    @quantized.setter
    def quantized(self, value: QuantizedWeight) -> None:
        if tuple(value.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"expected [{self.out_features}, {self.in_features}], got {list(value.shape)}"
            )
        self.weight = nn.Parameter(value.packed, requires_grad=False)
        for name in _SCALES:
            self._buffers[name] = getattr(value, name)
        self.weight_dtype = value.dtype
        self.block_size = value.block_size
        self.quant_type = value.quant_type

    @property
    def W_q(self) -> Tensor:  # noqa: N802
        """The packed codes. peft takes a layer with this name for a quantized one, and asks
        `dequantize()` for its weight (DoRA needs it).
        """
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight `[out, in]` in `dtype` (by default the dtype that was quantized)."""
        return self.quantized.dequantize(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Return `input W^T + b`; under autocast in its dtype, else in the dtype of `input`."""
        device_type = input.device.type
        if torch.is_autocast_enabled(device_type):
            dtype = output_dtype = torch.get_autocast_dtype(device_type)
        else:
            dtype, output_dtype = self.compute_dtype or input.dtype, input.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return linear_4bit(input.to(dtype), self.quantized, bias).to(output_dtype)

    def extra_repr(self) -> str:
        """Describe the layer in `print(model)`."""
        kind = f"{self.quant_type}, block_size={self.block_size}" if self.is_quantized else "empty"
        return f"{super().extra_repr()}, {kind}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":  # noqa: FBT001, FBT002
        scales = {name: self._buffers[name] for name in _SCALES}
        super()._apply(fn, recurse)
        for name, before in scales.items():
            after = self._buffers[name]
            # `model.to(bfloat16)` means the activations' dtype, never that of codes and scales.
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _save_to_state_dict(
        self,
        destination: MutableMapping[str, Any],
        prefix: str,
        keep_vars: bool,  # noqa: FBT001
    ) -> None:
        if self.is_quantized and not self.weight.is_meta:
            destination.update(layout.to_tensors(f"{prefix}weight", self.quantized))
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: MutableMapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,  # noqa: FBT001
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        keys = [name + suffix for suffix in layout.SUFFIXES]
        tensors = {key: state_dict[key] for key in keys if key in state_dict}
        if name in tensors:
            try:
                value = layout.from_tensors(
                    name, tensors, shape=(self.out_features, self.in_features)
                )
                self.quantized = value if self.weight.is_meta else value.to(self.weight.device)
            except HalfbyteError as error:
                error_msgs.append(str(error))
        elif strict:
            missing_keys.append(name)
        if strict:
            known = {*keys, f"{prefix}bias"} if self.bias is not None else set(keys)
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known]
        if self.bias is not None:
            key = f"{prefix}bias"
            if key in state_dict:
                self._load_bias(key, state_dict[key], error_msgs)
            elif strict:
                missing_keys.append(key)

    def _load_bias(self, key: str, value: Tensor, error_msgs: list[str]) -> None:
        if value.shape != self.bias.shape:
            error_msgs.append(
                f"expected {key!r} to be {list(self.bias.shape)}, got {list(value.shape)}"
            )
        elif self.bias.is_meta:
            self.bias = nn.Parameter(value.detach(), self.bias.requires_grad)
        else:
            with torch.no_grad():
                self.bias.copy_(value)
