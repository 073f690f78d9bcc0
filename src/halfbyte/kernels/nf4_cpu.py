"""Four-bit blocks on a CPU: the loops of `cpu_loops.c`, or plain torch where there is no compiler.

Both ways give the same bits. [3072, 768] in bfloat16 on 2 cores of a Sapphire Rapids Xeon: see
`benchmarks/kernels_cpu.py`.
"""

import ctypes
import functools
import math
from collections.abc import Sequence

import torch

from halfbyte.kernels import codebooks, native, nf4

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Bytes of codes that plain torch looks up at a time: 1 MiB of float32 pairs, which stays in cache.
_CHUNK_BYTES = 2**17


def quantize_4bit(
    weight: torch.Tensor, *, block_size: int = 64, quant_type: str = "nf4"
) -> tuple[torch.Tensor, torch.Tensor]:
    library = native.library()
    if library is None:
        return nf4.reference_quantize_4bit(weight, block_size=block_size, quant_type=quant_type)
    weight = weight.contiguous()
    numel = weight.numel()
    thresholds, order = codebooks.thresholds(quant_type), codebooks.codes_by_rank(quant_type)
    is_sorted = quant_type == "nf4"
    packed = weight.new_empty(((numel + 1) // 2, 1), dtype=torch.uint8)
    absmax = weight.new_empty((-(-numel // block_size),), dtype=torch.float32)
    library.hb_quantize(
        weight.data_ptr(),
        thresholds.data_ptr(),
        None if is_sorted else order.data_ptr(),
        nf4.SMALLEST_ABSMAX_CPU,
        packed.data_ptr(),
        absmax.data_ptr(),
        numel,
        block_size,
        _DTYPE_CODES[weight.dtype],
        torch.get_num_threads(),
    )
    return packed, absmax


def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int = 64,
    quant_type: str = "nf4",
) -> torch.Tensor:
    library = native.library()
    if library is None:
        return torch_dequantize_4bit(
            packed, absmax, shape=shape, dtype=dtype, block_size=block_size, quant_type=quant_type
        )
    out = packed.new_empty(tuple(shape), dtype=dtype)
    fill_(library, out, packed, absmax, None, block_size=block_size, quant_type=quant_type)
    return out


def dequantize_nested(
    packed: torch.Tensor,
    absmax_u8: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_map: torch.Tensor,
    offset: torch.Tensor,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int = 64,
    quant_type: str = "nf4",
) -> torch.Tensor:
    library = native.library()
    if library is None:
        absmax = nf4.dequantize_absmax(absmax_u8, nested_absmax, nested_map, offset)
        return torch_dequantize_4bit(
            packed, absmax, shape=shape, dtype=dtype, block_size=block_size, quant_type=quant_type
        )
    out = packed.new_empty(tuple(shape), dtype=dtype)
    nested = (nested_absmax, nested_map, offset)
    fill_(library, out, packed, absmax_u8, nested, block_size=block_size, quant_type=quant_type)
    return out


def quantize_blockwise(
    values: torch.Tensor, offset: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    values = values if offset is None else values - offset
    library = native.library()
    if library is None or values.dtype != torch.float32:
        return nf4.reference_quantize_blockwise(values)
    values = values.contiguous()
    codes = torch.empty_like(values, dtype=torch.uint8)
    absmax = values.new_empty((-(-values.numel() // nf4.NESTED_BLOCK_SIZE),))
    library.hb_quantize_blockwise(
        values.data_ptr(),
        _code_of_bin(),
        codes.data_ptr(),
        absmax.data_ptr(),
        values.numel(),
        torch.get_num_threads(),
    )
    return codes, absmax


@functools.cache
def _code_of_bin() -> bytes:
    return nf4.code_of_bin().numpy().tobytes()


def fill_(
    library: ctypes.CDLL,
    out: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    *,
    block_size: int,
    quant_type: str,
) -> None:
    """Fill `out`, which is in one piece, from tensors that `nf4.check_tensors` has seen.

    Args:
        library: The compiled loops.
        out: As many elements as there are codes.
        packed: The codes.
        absmax: Their scales.
        nested: The scales of the scales, their map and their offset.
        block_size: Elements that share a scale.
        quant_type: "nf4" or "fp4".
    """
    packed, absmax, *scales = (t.contiguous() for t in (packed, absmax, *(nested or ())))
    levels = _levels(quant_type)
    of_scales = [t.data_ptr() for t in (absmax, *scales)]
    library.hb_dequantize(
        packed.data_ptr(),
        *(of_scales if nested else (None, *of_scales, None, None)),
        levels.data_ptr(),
        out.data_ptr(),
        out.numel(),
        block_size,
        _DTYPE_CODES[out.dtype],
        torch.get_num_threads(),
    )


def torch_dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int = 64,
    quant_type: str = "nf4",
) -> torch.Tensor:
    """Look up a byte's two levels at once, as a 64-bit word, in chunks that stay in cache."""
    numel, flat = math.prod(shape), packed.view(-1)
    levels = _levels(quant_type)
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)
    words = pairs.view(torch.int64).view(-1)
    out = packed.new_empty(numel, dtype=dtype)
    for start in range(0, flat.numel(), _CHUNK_BYTES):
        values = words.index_select(0, flat[start : start + _CHUNK_BYTES].int()).view(torch.float32)
        target = out[2 * start : 2 * (start + _CHUNK_BYTES)]
        scales = absmax[2 * start // block_size :]
        full = target.numel() // block_size * block_size
        blocks = values[:full].view(-1, block_size)
        target[:full] = blocks.mul_(scales[: blocks.shape[0], None]).view(-1)
        if full < target.numel():
            target[full:] = values[full : target.numel()] * scales[blocks.shape[0]]
    return out.view(tuple(shape))


@functools.cache
def _levels(quant_type: str) -> torch.Tensor:
    return codebooks.levels(quant_type)
