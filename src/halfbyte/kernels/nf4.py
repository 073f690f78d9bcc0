"""Block-wise four-bit quantization: contract, plain-torch reference, and ops.

A weight of n elements is flattened row by row and cut into blocks of `block_size`; the last one
may be short. Each block keeps its largest magnitude, `absmax`, and each element the code of the
level that is nearest to element / absmax. Byte j holds code 2j in its high nibble, code 2j + 1 in
its low one. Double quantization holds `absmax` itself in eight bits: its mean is taken off, the
rest is cut into blocks of 256 and coded with a signed dynamic map.

Method: Dettmers et al., "QLoRA" (arXiv 2305.14314), sections 2 and 3. The results equal those of
bitsandbytes 0.50 bit for bit: for bfloat16 weights on every device, for float16 and float32 on the
same device (its CPU and CUDA code round differently). One exception is meant: an all-zero NF4 block
is code 7 everywhere, which decodes to zeros; bitsandbytes on CUDA writes code 0, which double
quantization decodes to small non-zeros. A block with a NaN or Inf gets an `absmax` that is not
finite, so whoever must refuse such weights looks at `absmax` only.

Twins: `nf4_cpu` (a small C library where there is a compiler) and `nf4_triton` (CUDA).
"""

import math
from collections.abc import Sequence

import torch

from halfbyte.errors import QuantizationError
from halfbyte.kernels import codebooks
from halfbyte.kernels.registry import register_op

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK_SIZE = 256

_SOURCE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# bitsandbytes' CPU code divides by nothing smaller than this.
SMALLEST_ABSMAX_CPU = 1e-38
# Below this CUDA flushes to zero; the kernels of bitsandbytes are built with --use_fast_math.
_SMALLEST_NORMAL = 2.0**-126
# bitsandbytes' CPU code finds the nearest of the 256 values through a table of this many bins.
_NESTED_BINS = 65536


def quantize_4bit(
    weight: torch.Tensor, *, block_size: int = 64, quant_type: str = "nf4"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `weight` (float32, float16 or bfloat16, any shape, n elements) to four bits.

    Returns:
        packed uint8 [(n + 1) // 2, 1] and absmax float32 [ceil(n / block_size)].

    Raises:
        QuantizationError: The weight is empty or not of these dtypes, or a setting is unknown.
    """
    _check_settings(block_size, quant_type)
    if weight.dtype not in _SOURCE_DTYPES or weight.numel() == 0:
        raise QuantizationError(
            "expected a float32, float16 or bfloat16 weight with at least one element,"
            f" got {weight.dtype} of shape {list(weight.shape)}"
        )
    return torch.ops.halfbyte.quantize_4bit.default(
        weight.detach(), block_size=block_size, quant_type=quant_type
    )


def dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int = 64,
    quant_type: str = "nf4",
) -> torch.Tensor:
    """Return level[code] * absmax, multiplied in float32 and rounded once to `dtype`, as `shape`.

    Raises:
        QuantizationError: The lengths or dtypes of `packed` and `absmax` do not belong to `shape`.
    """
    _check_settings(block_size, quant_type)
    check_tensors(packed, absmax, shape=shape, block_size=block_size)
    return torch.ops.halfbyte.dequantize_4bit(
        packed, absmax, shape=shape, dtype=dtype, block_size=block_size, quant_type=quant_type
    )


def quantize_absmax(absmax: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize float32 scales [B] to eight bits (Double Quantization).

    Returns:
        absmax_u8 uint8 [B], nested_absmax float32 [ceil(B / 256)] and their offset, float32 [].
    """
    offset = absmax.mean()
    absmax_u8, nested_absmax = torch.ops.halfbyte.quantize_blockwise.default(absmax, offset)
    return absmax_u8, nested_absmax, offset


def dequantize_absmax(
    absmax_u8: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_map: torch.Tensor,
    offset: torch.Tensor,
) -> torch.Tensor:
    """Return nested_map[absmax_u8] * nested_absmax + offset, float32 [B], each step rounded."""
    scale = nested_absmax.repeat_interleave(NESTED_BLOCK_SIZE)[: absmax_u8.numel()]
    return nested_map[absmax_u8.int()] * scale + offset


def dequantize_nested(  # noqa: PLR0913 - a double-quantized weight is five tensors
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
    """Dequantize codes and both levels of scales, as `dequantize_4bit(dequantize_absmax(...))`.

    Raises:
        QuantizationError: The lengths or dtypes of the tensors do not belong to `shape`.
    """
    _check_settings(block_size, quant_type)
    nested = (nested_absmax, nested_map, offset)
    check_tensors(packed, absmax_u8, nested, shape=shape, block_size=block_size)
    return torch.ops.halfbyte.dequantize_nested(
        packed,
        absmax_u8,
        nested_absmax,
        nested_map,
        offset,
        shape=shape,
        dtype=dtype,
        block_size=block_size,
        quant_type=quant_type,
    )


def _check_settings(block_size: int, quant_type: str) -> None:
    if quant_type not in QUANT_TYPES or block_size not in BLOCK_SIZES:
        raise QuantizationError(
            f"expected a quant_type of {QUANT_TYPES} and a block_size of {BLOCK_SIZES},"
            f" got {quant_type!r} and {block_size!r}"
        )


def check_tensors(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested: Sequence[torch.Tensor] | None = None,
    *,
    shape: Sequence[int],
    block_size: int,
) -> None:
    """Refuse tensors that a kernel would read past, because they are too short or too narrow.

    Args:
        packed: The codes, uint8.
        absmax: The scales, float32; uint8 where there are nested ones.
        nested: The scales of the scales, their map and their offset, float32.
        shape: Of the weight.
        block_size: Elements that share a scale.

    Raises:
        QuantizationError: A tensor has another length or dtype.
    """
    numel = math.prod(shape)
    num_blocks = -(-numel // block_size)
    num_groups = -(-num_blocks // NESTED_BLOCK_SIZE)
    expected = [((numel + 1) // 2, torch.uint8)]
    expected.append((num_blocks, torch.float32 if nested is None else torch.uint8))
    expected += [(length, torch.float32) for length in (num_groups, 256, 1) if nested is not None]
    found = [(tensor.numel(), tensor.dtype) for tensor in (packed, absmax, *(nested or ()))]
    if found != expected:
        raise QuantizationError(
            f"expected codes and scales of {_described(expected)} for shape {list(shape)} in "
            f"blocks of {block_size}, got {_described(found)}"
        )


def _described(tensors: Sequence[tuple[int, torch.dtype]]) -> str:
    return ", ".join(f"{length} {str(dtype)[6:]}" for length, dtype in tensors)


def reference_quantize_4bit(
    weight: torch.Tensor, *, block_size: int = 64, quant_type: str = "nf4", rule: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain-torch `quantize_4bit`, by the rule of `rule` ("cpu" or "cuda"), else of its device.

    CUDA's reciprocal is approximate, this one is not: see `nf4_triton`.
    """
    device, rule = weight.device, rule or weight.device.type
    flat = weight.reshape(-1).float()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % block_size)).view(-1, block_size)
    absmax = padded.abs().amax(dim=1)
    if rule == "cuda":
        absmax = _flush(absmax)
        inverse = torch.where(absmax > 0, 1.0 / absmax, 0.0)
        scaled = _flush(_flush(padded) * inverse[:, None])
    else:
        divisor = absmax.clamp(min=SMALLEST_ABSMAX_CPU)
        scaled = padded * (1.0 / divisor)[:, None]
        if flat.numel() % block_size:
            absmax[-1] = divisor[-1]
            scaled[-1] = padded[-1] / divisor[-1]
        scaled = scaled.clamp(-1, 1)
    rank = torch.bucketize(scaled.flatten(), codebooks.thresholds(quant_type, rule).to(device))
    codes = codebooks.codes_by_rank(quant_type, rule).to(device)[rank]
    codes = codes[: flat.numel() + flat.numel() % 2]
    return (codes[::2] << 4 | codes[1::2]).unsqueeze(1), absmax


def _flush(x: torch.Tensor) -> torch.Tensor:
    """Return x with denormals as zeros."""
    return torch.where(x.abs() < _SMALLEST_NORMAL, 0.0, x)


def reference_dequantize_4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    *,
    shape: Sequence[int],
    dtype: torch.dtype,
    block_size: int = 64,
    quant_type: str = "nf4",
) -> torch.Tensor:
    """Plain-torch `dequantize_4bit`."""
    numel = math.prod(shape)
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1)[:numel]
    levels = codebooks.levels(quant_type, packed.device.type).to(packed.device)
    values = levels[codes.int()] * absmax.repeat_interleave(block_size)[:numel]
    return values.to(dtype).view(*shape)


def reference_quantize_blockwise(
    values: torch.Tensor, offset: torch.Tensor | None = None, *, rule: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize float32 [B] to the signed dynamic map in blocks of 256: codes uint8 [B], absmax.

    Where there is an `offset`, float32 [], it is subtracted first.

    An all-zero block is code 0, as in bitsandbytes: with scale 0 every code decodes to 0.
    """
    values = values if offset is None else values - offset
    device, numel = values.device, values.numel()
    padded = torch.nn.functional.pad(values, (0, -numel % NESTED_BLOCK_SIZE))
    padded = padded.view(-1, NESTED_BLOCK_SIZE)
    nested_absmax = padded.abs().amax(dim=1)
    scaled = padded * (1.0 / nested_absmax)[:, None]
    if (rule or device.type) == "cuda":
        codes = torch.bucketize(scaled, codebooks.dynamic_thresholds().to(device))
    else:
        bins = (scaled.clamp(-1, 1) + 1.0) * 0.5 * (_NESTED_BINS - 1) + 0.5
        codes = code_of_bin().to(device)[bins.nan_to_num().int()]
    codes = torch.where(nested_absmax[:, None] > 0, codes, 0).to(torch.uint8)
    return codes.view(-1)[:numel], nested_absmax


def code_of_bin() -> torch.Tensor:
    """Return uint8 [65536]: the index nearest to each bin's centre; a tie goes to the lower one."""
    table = codebooks.dynamic_map()
    centre = torch.arange(_NESTED_BINS, device="cpu").float() / (_NESTED_BINS - 1) * 2.0 - 1.0
    upper = torch.bucketize(centre, table).clamp(1, 255)
    lower = upper - 1
    nearest = torch.where(table[upper] - centre < centre - table[lower], upper, lower)
    return nearest.to(torch.uint8)


def reference_dequantize_nested(  # noqa: PLR0913 - a double-quantized weight is five tensors
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
    """Plain-torch `dequantize_nested`."""
    absmax = dequantize_absmax(absmax_u8, nested_absmax, nested_map, offset)
    return reference_dequantize_4bit(
        packed, absmax, shape=shape, dtype=dtype, block_size=block_size, quant_type=quant_type
    )


def _fake_quantize_4bit(
    weight: torch.Tensor, *, block_size: int = 64, quant_type: str = "nf4"
) -> tuple[torch.Tensor, torch.Tensor]:
    numel = weight.numel()
    packed = weight.new_empty(((numel + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty(((numel + block_size - 1) // block_size,), dtype=torch.float32)


def _fake_dequantize(
    packed: torch.Tensor,
    *scales: torch.Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    **_: object,
) -> torch.Tensor:
    return packed.new_empty(tuple(shape), dtype=dtype)


def _fake_quantize_blockwise(
    values: torch.Tensor, _offset: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    num_blocks = (values.numel() + NESTED_BLOCK_SIZE - 1) // NESTED_BLOCK_SIZE
    return values.new_empty(values.shape, dtype=torch.uint8), values.new_empty((num_blocks,))


_FORMAT = 'int block_size=64, str quant_type="nf4"'

register_op(
    f"quantize_4bit(Tensor weight, *, {_FORMAT}) -> (Tensor, Tensor)",
    reference_quantize_4bit,
    _fake_quantize_4bit,
    module=__name__,
)
register_op(
    "dequantize_4bit(Tensor packed, Tensor absmax, *, SymInt[] shape, ScalarType dtype,"
    f" {_FORMAT}) -> Tensor",
    reference_dequantize_4bit,
    _fake_dequantize,
    module=__name__,
)
register_op(
    "quantize_blockwise(Tensor values, Tensor? offset=None) -> (Tensor, Tensor)",
    reference_quantize_blockwise,
    _fake_quantize_blockwise,
    module=__name__,
)
register_op(
    "dequantize_nested(Tensor packed, Tensor absmax_u8, Tensor nested_absmax, Tensor nested_map,"
    f" Tensor offset, *, SymInt[] shape, ScalarType dtype, {_FORMAT}) -> Tensor",
    reference_dequantize_nested,
    _fake_dequantize,
    module=__name__,
)
