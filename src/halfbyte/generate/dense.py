"""On a CPU, 4-bit weights are dequantized once for many tokens, where memory allows.

A token needs every weight once. A GPU unpacks codes about as fast as it could read 16-bit weights;
a CPU does not, and decoding spends most of its time there. The dense weights are what the 4-bit
layer multiplies with anyway, so the answers are the same.
"""

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from halfbyte.device import available_bytes
from halfbyte.quant.linear import NF4Linear

_SHARE = 0.5  # of the available memory that dense weights may take


@contextlib.contextmanager
def dense_weights(model: nn.Module, *, limit_bytes: int | None = None) -> Iterator[bool]:
    """Hold the 4-bit layers of a model on a CPU dense while the block runs.

    Args:
        model: Any model; without 4-bit layers on a CPU nothing happens.
        limit_bytes: What the dense weights may take; by default half of the available memory.

    Yields:
        Whether layers are dense now.
    """
    dtype = cast(torch.dtype, getattr(model, "dtype", torch.float32))
    layers = {
        name: cast(NF4Linear, module)
        for name, module in model.named_modules()
        if _can_be_dense(module, dtype)
    }
    num_bytes = sum(layer.in_features * layer.out_features for layer in layers.values())
    limit = (available_bytes("cpu") or 0) * _SHARE if limit_bytes is None else limit_bytes
    is_dense = bool(layers) and num_bytes * dtype.itemsize <= limit
    try:
        if is_dense:
            for name, layer in layers.items():
                model.set_submodule(name, _dense(layer, dtype))
        yield is_dense
    finally:
        if is_dense:
            for name, layer in layers.items():
                model.set_submodule(name, layer)


def _can_be_dense(module: nn.Module, dtype: torch.dtype) -> bool:
    return (
        isinstance(module, NF4Linear)
        and module.is_quantized
        and module.weight.device.type == "cpu"
        and module.compute_dtype in (None, dtype)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _dense(layer: NF4Linear, dtype: torch.dtype) -> nn.Linear:
    """Return the layer with its weight dequantized; the bias is shared."""
    dense = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    weight = layer.dequantize(dtype)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    dense.bias = layer.bias
    return dense.train(layer.training)
