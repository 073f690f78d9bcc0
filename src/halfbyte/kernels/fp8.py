"""Matrix products in eight bits: rows of e4m3 numbers, each row with one float32 scale.

    y[t, n] = scale_x[t] scale_w[n] sum over k of x8[t, k] w8[n, k]

Shape letters: T tokens, K features, R LoRA ranks, P columns of a border.

An e4m3 number has three bits behind its leading one: it is off by 1/16 of itself at most, by 2.6 %
in the root mean square. That is on the scale of 4-bit weights' own error (9 %) and bears it. LoRA's
part of a product must be better: it is what is trained. So each of its two factors stands there as
a sum of two e4m3 numbers, as good as bfloat16:

    x side   [ x | u_hi | u_lo | u_hi ]        u = x A^T / balance
    w side   [ w | B_hi | B_hi | B_lo ]        B * balance

The balance, a power of two, puts both factors in the middle of what e4m3 can hold beside the rest
of their rows. It is made on the device: nobody waits for it.

Gradients are e4m3 as well; with a scale for each row they need no wider exponent (DeepSeek-V3,
arXiv 2412.19437, section 3.3.2).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from halfbyte.kernels.dispatch import accelerated

DTYPE = torch.float8_e4m3fn
LARGEST = 448.0
# Hopper's tensor cores add e4m3 products in 14 bits. With fast accumulation they do so over a whole
# row, else they pass their sum on to float32 every 128 terms. That takes their time and gives
# nothing here, where e4m3 itself is off by more: the products of an MLP of Llama 8B took 892 to
# 1,494 us instead of 1,266 to 1,824 (8,192 tokens, H100); all are off by 3.67 to 3.78 %, else
# 3.66 to 3.76 %; LoRA's share by 0.34 to 0.35 % both ways.
FAST_ACCUMULATION = True
TINY = 1e-30
"""Rows whose magnitudes stay below are scaled as if they reached it."""
# Bytes that rows of a product start at a multiple of, if their features do. The same products took
# an H100, with borders of 48, 64, 96, 128, 160 and 192 columns (8,192 tokens):
#     28672 x 4096   1,858  1,476  1,626  1,441  1,673  1,559 us
#     4096 x 28672   2,276  1,726  1,991  1,590  1,683  1,586 us
#     4096 x 14336     913    712    771    710    787    733 us
_ALIGNMENT = 128
BALANCES_BYTES = 8
BALANCE = (64.0, 2.0**-30)
"""Product of both factors' magnitudes that is aimed at, and the least magnitude counted of one."""


class Rows(NamedTuple):
    """A matrix in eight bits: values e4m3 `[rows, K + P]`, scale float32 `[rows]`."""

    values: Tensor
    scale: Tensor


def border_columns(ranks: int) -> int:
    """Return P: three columns a rank, padded so that rows stay aligned."""
    return -(-3 * ranks // _ALIGNMENT) * _ALIGNMENT


def factor_bytes(inputs: int, outputs: int, ranks: int, itemsize: int) -> int:
    """Return the bytes of both factors of LoRA, A and B, with a balance for each."""
    return ranks * (inputs + outputs) * itemsize + (BALANCES_BYTES if ranks else 0)


@accelerated
def quantize_rows(x: Tensor, border: Tensor, balance: Tensor | None) -> Rows:
    """Return `x` in eight bits, behind it `border`, split for the product with LoRA inside.

    Args:
        x: `[T, K]` of any float dtype (rows may have a pitch).
        border: `[T, R]` (rows may have a pitch).
        balance: float32 `[1]` of `fp8_weight.factors_`; None: the border counts for nothing, its
            place is filled with zeros.
    """
    main, border = x.to(torch.float32), border.to(torch.float32)
    border = torch.zeros_like(border) if balance is None else border / balance
    largest = torch.cat((main, border), 1).abs().amax(1, keepdim=True).clamp_min(TINY)
    inverse = 1 / largest * LARGEST
    features = x.shape[1]
    columns = border_columns(border.shape[1])
    values = x.new_empty((x.shape[0], features + columns), dtype=DTYPE)
    values[:, :features] = (main * inverse).to(DTYPE)
    high, low = _terms(border * inverse)
    _write_terms(values[:, features:], high, low, high)
    return Rows(values, largest.squeeze(1) / LARGEST)


@accelerated
def split_borders_(balances: Tensor, matrices: Sequence[Rows], factors: Sequence[Tensor]) -> None:
    """Write factors of LoRA into the last P columns of one or two weights.

    Args:
        balances: float32, one a weight, of `fp8_weight.factors_`.
        matrices: The weights, values `[N, K + P]`, N of their own.
        factors: `[N, R]`, B, or for the backward A^T (any strides); R is the same.
    """
    for balance, matrix, factor in zip(balances, matrices, factors, strict=True):
        high, low = _terms(factor.to(torch.float32) / matrix.scale.unsqueeze(1) * balance)
        features = matrix.values.shape[1] - border_columns(factor.shape[1])
        _write_terms(matrix.values[:, features:], high, high, low)


def balance_of(largest: Tensor) -> Tensor:
    """Return the power of two that a factor with this largest magnitude is multiplied by.

    Args:
        largest: float32 `[]`, of the factor in units of its rows' scales.
    """
    target, least = BALANCE
    largest = largest.clamp_min(least)
    wanted = torch.minimum((target / largest).sqrt(), LARGEST / largest)
    return torch.ldexp(torch.full_like(wanted, 0.5), torch.frexp(wanted).exponent)


def product_(x: Rows, weight: Rows, out: Tensor) -> Tensor:
    """Write `x @ weight^T` into `out` `[T, N]` (rows may have a pitch) and return it."""
    if x.values.is_cuda:
        target = out
        if not out.is_contiguous() and not _heeds_pitch(out.device):
            target = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        torch._scaled_mm(
            x.values, weight.values.t(), x.scale.unsqueeze(1), weight.scale.unsqueeze(0),
            out_dtype=out.dtype, use_fast_accum=FAST_ACCUMULATION, out=target,
        )  # fmt: skip
        return out if target is out else out.copy_(target)
    product = x.values.to(torch.float32) @ weight.values.to(torch.float32).t()
    return out.copy_(product * x.scale.unsqueeze(1) * weight.scale)


@functools.cache
def _heeds_pitch(device: torch.device) -> bool:
    """Whether torch's product leaves alone what lies between the rows of `out`.

    cuBLAS does. It multiplies rows with scales of their own on Hopper from CUDA 12.9 on; elsewhere
    torch has kernels of its own (RowwiseScaledMM.cu), most of which write as if there were no
    pitch: wrong numbers, and no error.
    """
    version = tuple(int(number) for number in (torch.version.cuda or "0").split(".")[:2])
    return torch.cuda.get_device_capability(device)[0] == 9 and version >= (12, 9)


def _terms(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return two e4m3 tensors whose sum is `values`, nearly."""
    high = values.to(DTYPE)
    return high, (values - high.to(torch.float32)).to(DTYPE)


def _write_terms(border: Tensor, *terms: Tensor) -> None:
    ranks = terms[0].shape[1]
    border.zero_()
    for index, term in enumerate(terms):
        border[:, index * ranks : (index + 1) * ranks] = term
