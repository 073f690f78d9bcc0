"""The gated activation of a decoder's MLP: `act(gate) * up`, from one buffer that holds both.

Shape letters: T tokens, I intermediate size, R LoRA ranks. `act` is SiLU (SwiGLU) or the tanh form
of GELU (GeGLU); Shazeer 2020, arXiv 2002.05202.

The forward also makes `x A^T` of down, which would read the product again just after it was
written. The backward also makes the gradients of the adapters that stand around it: those of B of
gate and up, and of A of down. All three are sums over tokens of what is in registers just then;
made apart, they would read 6 I elements of a token again, and the gated product would have to be
written. With dropout before down's A, the gradient that comes through it is added there too: its
mask is at hand.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from halfbyte.kernels.border import new_with_border
from halfbyte.kernels.dispatch import accelerated
from halfbyte.kernels.dropout import Mask, add_masked_product_, dropout
from halfbyte.kernels.sizes import cdiv
from halfbyte.kernels.skinny import rank_product_

ACTIVATIONS = ("silu", "gelu_tanh")
# The backward on CUDA: about eight programs for each of the 132 multiprocessors of an H100, and
# what each of them takes. Twice as many took 142 us instead of 128 with 2,048 tokens of Llama 8B,
# and 486 instead of 475 with 8,192: their partial sums are written and read again. Half or twice as
# many columns took a tenth to two fifths more; accumulators of large ranks would not fit into
# registers with them.
_PROGRAMS, _LEAST_TOKENS = 1024, 128
_COLUMNS, LARGE_RANKS, _COLUMNS_OF_LARGE_RANKS = 64, 64, 32


def backward_columns(ranks: int) -> int:
    """Return how many of the I columns a program of the backward on CUDA takes.

    Args:
        ranks: The most that gate, up or down have.
    """
    return _COLUMNS_OF_LARGE_RANKS if ranks > LARGE_RANKS else _COLUMNS


def backward_splits(tokens: int, size: int, ranks: int) -> int:
    """Return how many partial sums over tokens the backward on CUDA makes: memory plans them.

    Args:
        tokens: T.
        size: I.
        ranks: As for `backward_columns`.
    """
    programs = cdiv(size, backward_columns(ranks))
    return max(1, min(cdiv(_PROGRAMS, programs), cdiv(tokens, _LEAST_TOKENS)))


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
    out = new_with_border(gate_up, gate_up.shape[0], size, columns)
    out[:, :size] = hidden.to(gate_up.dtype)
    return out


@accelerated
def gated_product(
    gate_up: Tensor,
    size: int,
    activation: str,
    lora_A: Tensor,
    *,
    scaling: float = 1.0,
    mask: Mask | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `gated_forward` with `x A^T` of its result in R more columns; and that, scaled.

    Args:
        gate_up, size, activation: As for `gated_forward`.
        lora_A: `[R, I]`, down's A (rows may have a pitch).
        scaling: Of the second result only.
        mask: Of the dropout of what A reads, or None.

    Returns:
        `[T, I + R]`, and `[T, R]` of its own memory.
    """
    hidden = gated_forward(gate_up, size, activation, columns=lora_A.shape[0])
    xa = rank_product_(hidden[:, size:], hidden[:, :size], lora_A.t(), mask=mask, scaling=scaling)
    return hidden, xa


@accelerated
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
    """Put the gradient of gate and up in their place; return gradients of the adapters around it.

    Args:
        gate_up: `[T, >= 2 I]` as in the forward; columns `[0, 2 I)` become their gradient.
        grad_hidden: `[T, I]`, the gradient of the gated product (its content may be lost).
        xas: `[T, R]` each, the scaled `x A^T` of gate and of up (rows of one pitch).
        down_gb: `[T, R2]`, the scaled `dy B` of down (rows may have a pitch).
        size: I.
        activation: One of `ACTIVATIONS`.
        mask: Of the dropout of what down's A reads, or None.
        lora_A: `[R2, I]`, down's A; with a mask, `down_gb @ lora_A`, dropped, is added to
            `grad_hidden` first. None: it is in there.

    Returns:
        float32 `[I, R]` each, the gradients of B of gate and of up; and float32 `[R2, I]`, the
        gradient of A of down.
    """
    if mask is not None and lora_A is not None:
        grad_hidden = add_masked_product_(grad_hidden, down_gb, lora_A, mask)
    with torch.enable_grad():
        wide = gate_up[:, : 2 * size].to(torch.promote_types(gate_up.dtype, torch.float32))
        wide = wide.detach().requires_grad_()
        hidden = _activation(wide[:, :size], activation) * wide[:, size:]
        (grad,) = torch.autograd.grad(hidden, wide, grad_hidden.to(wide.dtype))
    gate_up[:, : 2 * size] = grad.to(gate_up.dtype)
    rounded = gate_up[:, : 2 * size].to(wide.dtype)
    hidden = hidden.detach().to(gate_up.dtype)
    if mask is not None:
        hidden = dropout(hidden, mask)
    gate_B = rounded[:, :size].t() @ xas[0].to(wide.dtype)
    up_B = rounded[:, size:].t() @ xas[1].to(wide.dtype)
    return gate_B, up_B, down_gb.to(wide.dtype).t() @ hidden.to(wide.dtype)
