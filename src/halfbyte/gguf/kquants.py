"""Q4_K and Q6_K: 256 weights a super-block, in small blocks whose scales are quantized too.

Q4_K (144 bytes): eight blocks of 32 weights, w = d * scale * q - dmin * min, q of 4 bits, scale and
min of 6. Q6_K (210 bytes): sixteen blocks of 16, w = d * scale * (q - 32), q of 6 bits, scale of 8.
The searches for scales are those of ggml's reference (`make_qkx2_quants`, `make_qx_quants` in
ggml-quants.c), for all blocks at once. Suffixes: N super-blocks, B blocks of one, W weights of one.
"""

import torch
from torch import Tensor

SUPER_BLOCK = 256
_TINY = 1e-15  # ggml's GROUP_MAX_EPS: blocks that are smaller are all zeros


def quantize_q4_k(weight: Tensor) -> Tensor:
    """Return uint8 [rows, columns / 256 * 144] for float32 [rows, columns]."""
    x_NBW = weight.reshape(-1, 8, 32)
    scale_NB, min_NB = _scales_and_mins(x_NBW)
    d_N, scale_codes_NB = _six_bits(scale_NB)
    dmin_N, min_codes_NB = _six_bits(min_NB)
    step_NB = d_N.float()[:, None] * scale_codes_NB
    offset_NB = dmin_N.float()[:, None] * min_codes_NB
    divisor_NB = torch.where(step_NB == 0, 1.0, step_NB)
    codes_NBW = torch.round((x_NBW + offset_NB[..., None]) / divisor_NB[..., None]).clamp_(0, 15)
    codes_NBW = torch.where(step_NB[..., None] == 0, 0.0, codes_NBW).to(torch.uint8)
    pairs = codes_NBW.view(-1, 4, 2, 32)
    packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)
    parts = [_bytes(d_N), _bytes(dmin_N), _pack_six_bits(scale_codes_NB, min_codes_NB), packed]
    return torch.cat(parts, dim=1).view(weight.shape[0], -1)


def quantize_q6_k(weight: Tensor) -> Tensor:
    """Return uint8 [rows, columns / 256 * 210] for float32 [rows, columns]."""
    x_NBW = weight.reshape(-1, 16, 16)
    scale_NB = _symmetric_scales(x_NBW)
    largest_N1 = scale_NB.gather(1, scale_NB.abs().argmax(dim=1, keepdim=True))
    is_zero_N1 = largest_N1.abs() < _TINY
    inverse_N1 = -128.0 / torch.where(is_zero_N1, 1.0, largest_N1)
    d_N1 = torch.where(is_zero_N1, 0.0, 1.0 / inverse_N1).half()
    scale_codes_NB = torch.round(inverse_N1 * scale_NB).clamp_(-128, 127)
    step_NB = d_N1.float() * scale_codes_NB
    divisor_NB = torch.where(step_NB == 0, 1.0, step_NB)
    codes_NBW = torch.round(x_NBW / divisor_NB[..., None]).clamp_(-32, 31) + 32
    halves = codes_NBW.to(torch.uint8).view(-1, 2, 4, 32)  # two halves of four rows of 32
    low, high = halves & 15, halves >> 4
    low = torch.cat([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], dim=2)
    high = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    scales = scale_codes_NB.to(torch.int8).view(torch.uint8)
    parts = [low.flatten(1), high.flatten(1), scales, _bytes(d_N1.squeeze(1))]
    return torch.cat(parts, dim=1).view(weight.shape[0], -1)


def _scales_and_mins(x_NBW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the step and the (positive) offset of each block with the least weighted error."""
    weights = x_NBW.square().mean(-1, keepdim=True).sqrt() + x_NBW.abs()
    low, high = x_NBW.amin(-1).clamp_(max=0), x_NBW.amax(-1)
    width = high - low
    is_flat = width == 0
    width = torch.where(is_flat, 1.0, width)
    sum_w, sum_x = weights.sum(-1), (weights * x_NBW).sum(-1)
    best_scale, best_low = width / 15, low
    best_error = _error(x_NBW, weights, _codes(x_NBW, low, 15 / width), best_scale, best_low)
    for step in range(21):
        codes = _codes(x_NBW, low, (14 + 0.1 * step) / width)
        weighted = weights * codes
        sum_l, sum_l2 = weighted.sum(-1), (weighted * codes).sum(-1)
        sum_xl = (weighted * x_NBW).sum(-1)
        determinant = sum_w * sum_l2 - sum_l.square()
        is_solved = determinant > 0
        divisor = torch.where(is_solved, determinant, 1.0)
        scale = (sum_w * sum_xl - sum_x * sum_l) / divisor
        offset = (sum_l2 * sum_x - sum_l * sum_xl) / divisor
        is_above = offset > 0
        scale = torch.where(is_above, sum_xl / sum_l2.clamp_min(_TINY), scale)
        offset = torch.where(is_above, 0.0, offset)
        error = _error(x_NBW, weights, codes, scale, offset)
        is_better = is_solved & (error < best_error)
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, scale, best_scale)
        best_low = torch.where(is_better, offset, best_low)
    return torch.where(is_flat, 0.0, best_scale), -torch.where(is_flat, low, best_low)


def _codes(x_NBW: Tensor, low_NB: Tensor, inverse_NB: Tensor) -> Tensor:
    return torch.round(inverse_NB[..., None] * (x_NBW - low_NB[..., None])).clamp_(0, 15)


def _error(
    x_NBW: Tensor, weights: Tensor, codes: Tensor, scale_NB: Tensor, low_NB: Tensor
) -> Tensor:
    apart = codes * scale_NB[..., None] + low_NB[..., None] - x_NBW
    return (weights * apart.square()).sum(-1)


def _symmetric_scales(x_NBW: Tensor) -> Tensor:
    """Return the signed step of each block for codes from -32 to 31; errors weigh by x squared."""
    weights = x_NBW.square()
    peak = x_NBW.gather(-1, x_NBW.abs().argmax(-1, keepdim=True)).squeeze(-1)
    is_zero = peak.abs() < _TINY
    peak = torch.where(is_zero, 1.0, peak)
    best_scale = torch.zeros_like(peak)
    best = torch.zeros_like(peak)
    for step in (0, *range(-9, 0), *range(1, 10)):
        inverse = -(32 + 0.1 * step) / peak
        codes = torch.round(inverse[..., None] * x_NBW).clamp_(-32, 31)
        weighted = weights * codes
        sum_lx, sum_l2 = (weighted * x_NBW).sum(-1), (weighted * codes).sum(-1)
        is_better = (sum_l2 > 0) & (sum_lx.square() > best * sum_l2)
        scale = sum_lx / torch.where(sum_l2 > 0, sum_l2, 1.0)
        best_scale = torch.where(is_better, scale, best_scale)
        best = torch.where(is_better, scale * sum_lx, best)
    return torch.where(is_zero, 0.0, best_scale)


def _six_bits(values_NB: Tensor) -> tuple[Tensor, Tensor]:
    """Return a float16 step for each super-block, and 6-bit codes (as float32)."""
    peak_N1 = values_NB.amax(1, keepdim=True).clamp_(min=0)
    inverse_N1 = torch.where(peak_N1 > 0, 63 / peak_N1, 0.0)
    codes_NB = torch.round(inverse_N1 * values_NB).clamp_(0, 63)
    return (peak_N1 / 63).squeeze(1).half(), codes_NB


def _pack_six_bits(scale_codes_NB: Tensor, min_codes_NB: Tensor) -> Tensor:
    """Pack eight scales and eight mins into twelve bytes: the last four of each are split up."""
    scale, low = scale_codes_NB.to(torch.uint8), min_codes_NB.to(torch.uint8)
    first = scale[:, :4] | scale[:, 4:] >> 4 << 6
    second = low[:, :4] | low[:, 4:] >> 4 << 6
    third = scale[:, 4:] & 15 | (low[:, 4:] & 15) << 4
    return torch.cat([first, second, third], dim=1)


def _bytes(values_N: Tensor) -> Tensor:
    return values_N.contiguous().view(torch.uint8).view(-1, 2)
