"""RMSNorm on a CPU: one pass of `decoder_loops.c` over each row that lies in cache."""

import torch
from torch import Tensor

from halfbyte.kernels import native, rms_norm
from halfbyte.kernels.border import new_with_border


def add_rms_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    columns: int = 0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    library = native.library()
    if library is None or scale is not None or not _fits(x, delta, x, weight):
        return rms_norm.add_rms_norm.__wrapped__(  # type: ignore[attr-defined]
            x, delta, weight, eps, columns=columns, scale=scale
        )
    rows, size = x.shape
    residual = x if delta is None else x.new_empty(rows, size)
    normed = new_with_border(x, rows, size, columns)
    library.hb_add_rms_norm(
        x.data_ptr(),
        None if delta is None else delta.data_ptr(),
        weight.data_ptr(),
        eps,
        residual.data_ptr(),
        normed.data_ptr(),
        rows,
        size,
        x.stride(0),
        0 if delta is None else delta.stride(0),
        normed.stride(0),
        torch.get_num_threads(),
    )
    return residual, normed


def rms_norm_backward(
    grad_normed: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    grad_residual: Tensor | None,
    *,
    columns: int = 0,
) -> Tensor:
    library = native.library()
    if library is None or not _fits(x, grad_normed, grad_residual, weight):
        return rms_norm.rms_norm_backward.__wrapped__(  # type: ignore[attr-defined]
            grad_normed, x, weight, eps, grad_residual, columns=columns
        )
    rows, size = x.shape
    out = new_with_border(x, rows, size, columns)
    library.hb_rms_norm_backward(
        grad_normed.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        eps,
        None if grad_residual is None else grad_residual.data_ptr(),
        out.data_ptr(),
        rows,
        size,
        grad_normed.stride(0),
        x.stride(0),
        0 if grad_residual is None else grad_residual.stride(0),
        out.stride(0),
        torch.get_num_threads(),
    )
    return out


def _fits(x: Tensor, one: Tensor | None, other: Tensor | None, weight: Tensor) -> bool:
    """Whether the loops can read them; else the reference says what is wrong."""
    return (
        native.has_rows(x, one, other)
        and native.is_vector(weight, torch.float32, x.shape[-1])
        and all(t is None or t.shape == x.shape for t in (one, other))
    )
