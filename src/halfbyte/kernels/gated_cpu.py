"""The gated activation on a CPU: a loop of `decoder_loops.c`, then plain products."""

import torch
from torch import Tensor

from halfbyte.kernels import gated, native
from halfbyte.kernels.border import new_with_border
from halfbyte.kernels.dropout import Mask, add_masked_product_, dropout


def gated_forward(gate_up: Tensor, size: int, activation: str, *, columns: int = 0) -> Tensor:
    library = native.library()
    if library is None or not native.has_rows(gate_up) or gate_up.shape[1] < 2 * size:
        return gated.gated_forward.__wrapped__(gate_up, size, activation, columns=columns)  # type: ignore[attr-defined]
    out = new_with_border(gate_up, gate_up.shape[0], size, columns)
    library.hb_gated_forward(
        gate_up.data_ptr(),
        out.data_ptr(),
        gate_up.shape[0],
        size,
        gate_up.stride(0),
        out.stride(0),
        gated.ACTIVATIONS.index(activation),
        torch.get_num_threads(),
    )
    return out


def gated_backward_(
    gate_up: Tensor,
    grad_hidden: Tensor,
    xas: tuple[Tensor, Tensor],
    down_gb: Tensor,
    size: int,
    activation: str,
    mask: Mask | None = None,
    lora_A: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    library = native.library()
    fits = gate_up.shape[1] >= 2 * size and grad_hidden.shape == (gate_up.shape[0], size)
    if library is None or not fits or not native.has_rows(gate_up, grad_hidden):
        return gated.gated_backward_.__wrapped__(  # type: ignore[attr-defined]
            gate_up, grad_hidden, xas, down_gb, size, activation, mask, lora_A
        )
    if mask is not None and lora_A is not None:
        grad_hidden = add_masked_product_(grad_hidden, down_gb, lora_A, mask)
    hidden = gate_up.new_empty(gate_up.shape[0], size)
    library.hb_gated_backward(
        gate_up.data_ptr(),
        grad_hidden.data_ptr(),
        hidden.data_ptr(),
        gate_up.shape[0],
        size,
        gate_up.stride(0),
        grad_hidden.stride(0),
        gated.ACTIVATIONS.index(activation),
        torch.get_num_threads(),
    )
    if mask is not None:
        hidden = dropout(hidden, mask)
    halves = gate_up[:, :size], gate_up[:, size : 2 * size]
    gate_B, up_B = ((xa.t() @ half).float().t() for xa, half in zip(xas, halves, strict=True))
    return gate_B, up_B, (down_gb.t() @ hidden).float()
