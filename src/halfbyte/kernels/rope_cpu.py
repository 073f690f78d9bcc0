"""Rotary position embedding on a CPU: a loop of `decoder_loops.c`."""

import ctypes

import torch
from torch import Tensor

from halfbyte.kernels import native, rope


def rope_(qkv: Tensor, cos: Tensor, sin: Tensor, num_rotated: int) -> Tensor:
    library = native.library()
    fits = native.has_rows(qkv) and qkv.stride(1) == qkv.shape[2] and num_rotated <= qkv.shape[1]
    if library is None or not fits or not _angles_fit(qkv, cos, sin):
        return rope.rope_.__wrapped__(qkv, cos, sin, num_rotated)  # type: ignore[attr-defined]
    angles = (cos.float().contiguous(), sin.float().contiguous())
    _turn(library, qkv[:, :num_rotated], qkv, angles, 1.0)
    return qkv


def rope_backward(
    grad_query: Tensor, grad_key: Tensor, grad_value: Tensor, cos: Tensor, sin: Tensor, out: Tensor
) -> Tensor:
    library = native.library()
    grads = (grad_query, grad_key, grad_value)
    width = sum(grad.shape[1] * grad.shape[2] for grad in grads)
    fits = native.has_rows(*grads, out) and out.shape[0] == len(cos) and width <= out.shape[1]
    if library is None or not fits or not all(_angles_fit(grad, cos, sin) for grad in grads):
        return rope.rope_backward.__wrapped__(*grads, cos, sin, out)  # type: ignore[attr-defined]
    angles = (cos.float().contiguous(), sin.float().contiguous())
    still = (cos.new_empty(0, dtype=torch.float32),) * 2
    start = 0
    for grad, turn in zip(grads, (angles, angles, still), strict=True):
        width = grad.shape[1] * grad.shape[2]
        _turn(library, grad, out[:, start : start + width], turn, -1.0)
        start += width
    return out


def _angles_fit(heads: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether there are angles for each token of `heads` `[T, N, D]`, and no more than fit."""
    tokens, _, size = heads.shape
    rotated = cos.shape[-1]
    return cos.shape == sin.shape == (tokens, rotated) and rotated <= size and rotated % 2 == 0


def _turn(
    library: ctypes.CDLL, source: Tensor, target: Tensor, angles: tuple[Tensor, Tensor], sign: float
) -> None:
    """Write `source` `[T, N, D]` into `target`, whose first N * D columns are its heads."""
    tokens, heads, size = source.shape
    cos, sin = angles
    library.hb_rope(
        source.data_ptr(),
        target.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        sign,
        tokens,
        heads,
        size,
        cos.shape[-1],
        source.stride(0),
        source.stride(1),
        target.stride(0),
        torch.get_num_threads(),
    )
