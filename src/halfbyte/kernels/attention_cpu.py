"""The gradient of causal attention on a CPU: a head at a time in cache, by `decoder_loops.c`."""

import ctypes

import torch
from torch import Tensor

from halfbyte.kernels import attention, native

_LANES = 16


def causal_attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum_exp: Tensor,
    grad_out: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, ...]:
    library = native.library()
    tensors = (query, key, value, out, grad_out)
    batch, heads, length, size = query.shape
    fits = all(t.shape == query.shape for t in tensors) and log_sum_exp.shape == query.shape[:3]
    fits = fits and size % _LANES == 0 and native.has_rows(*tensors)
    if library is None or not fits:
        return attention.causal_attention_backward.__wrapped__(  # type: ignore[attr-defined]
            query, key, value, out, log_sum_exp, grad_out, scale=scale
        )
    grads = [query.new_empty(batch, length, heads, size).transpose(1, 2) for _ in range(3)]
    log_sum_exp = log_sum_exp.float().contiguous()
    strides = [t.stride(dim) for t in (*tensors, grads[0]) for dim in range(3)]
    is_short = library.hb_attention_backward(
        *(t.data_ptr() for t in (*tensors, log_sum_exp, *grads)),
        (ctypes.c_int64 * len(strides))(*strides),
        batch,
        heads,
        length,
        size,
        scale,
        torch.get_num_threads(),
    )
    if is_short:
        raise MemoryError(f"no memory for the scores of a head of {length} tokens")
    return tuple(grads)
