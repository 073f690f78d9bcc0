"""The gated activation of a decoder's MLP: `act(gate) * up`, from one buffer that holds both.

Shape letters: T tokens, I intermediate size. `act` is SiLU (SwiGLU) or the tanh form of GELU
(GeGLU); Shazeer 2020, arXiv 2002.05202.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.kernels.dispatch import accelerated

ACTIVATIONS = ("silu", "gelu_tanh")


def _activation(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


@accelerated
def gated_forward(gate_up: Tensor, size: int, activation: str, *, columns: int = 0) -> Tensor:
    """Return `act(gate) * up` as `[T, I + columns]`, the last `columns` left unwritten.

    Args:
        gate_up: `[T, >= 2 I]`, gate in the first I columns, up in the next I (rows may have a
            pitch).
        size: I.
        activation: One of `ACTIVATIONS`.
        columns: Room after the result, for a product with LoRA inside.
    """
    wide = gate_up[:, : 2 * size].to(torch.promote_types(gate_up.dtype, torch.float32))
    hidden = _activation(wide[:, :size], activation) * wide[:, size:]
    out = gate_up.new_empty(gate_up.shape[0], size + columns)
    out[:, :size] = hidden.to(gate_up.dtype)
    return out


@accelerated
def gated_backward(
    gate_up: Tensor, grad_hidden: Tensor, size: int, activation: str
) -> tuple[Tensor, Tensor]:
    """Return `(grad_gate_up, hidden)`; the gradient takes `gate_up`'s place in memory.

    Args:
        gate_up: `[T, >= 2 I]` as in the forward; overwritten by its gradient in columns `[0, 2 I)`.
        grad_hidden: `[T, I]`; overwritten by `hidden`, the forward's result again.
        size: I.
        activation: One of `ACTIVATIONS`.
    """
    with torch.enable_grad():
        wide = gate_up[:, : 2 * size].to(torch.promote_types(gate_up.dtype, torch.float32))
        wide = wide.detach().requires_grad_()
        hidden = _activation(wide[:, :size], activation) * wide[:, size:]
        (grad,) = torch.autograd.grad(hidden, wide, grad_hidden[:, :size].to(wide.dtype))
    gate_up[:, : 2 * size] = grad.to(gate_up.dtype)
    grad_hidden[:, :size] = hidden.detach().to(grad_hidden.dtype)
    return gate_up, grad_hidden
