"""How decoding kernels turn 4-bit codes into numbers, without a table in memory.

At 3 TB/s of codes an H100 has five instructions for a weight, and only a quarter of its lanes can
load from a table or shuffle at a time. Byte permutes look four codes up at once, in registers.
"""

import functools
import struct
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.kernels import codebooks


@dataclass(frozen=True)
class Lookup:
    """How codes become numbers: `level = (value * x_scale) * scale + shift`.

    Args:
        tables: What the values are looked up in: int32 `[8]` for `asm`, or the levels.
        asm: PTX from a word of eight codes (and the tables) to eight values; empty where Triton is
            interpreted, which reads the levels from memory.
        x_scale: Exact; a product's x may be scaled instead of its values.
    """

    tables: Tensor
    asm: str = ""
    x_scale: float = 1.0
    scale: float = 1.0
    shift: float = 0.0


# Steps of a level from 0 to 1, and the integer that stands for 0: see `by_bytes`.
_STEPS = {"nf4": (15150, 15232), "fp4": (16100, 16185)}
_X_SCALE = 2.0**64


@functools.cache
def lookup(quant_type: str, device: torch.device) -> Lookup:
    """Return how the codes of a type become numbers on a device; sent there once."""
    if device.type != "cuda":
        return Lookup(codebooks.levels(quant_type))
    how = by_bytes(quant_type)
    return replace(how, tables=how.tables.to(device))


def by_bytes(quant_type: str) -> Lookup:
    """Return the lookup by byte permutes, its tables on the CPU.

    A level becomes an integer v of 15 bits, `level * steps + zero`, in bytes 1 and 2 of a word.
    Read as float32 such a word is the denormal v * 2^-141, which products take at full speed; x is
    scaled up, so that products are normal numbers. The error, 3e-5 of absmax, is a hundredth of
    what rounding a weight to bf16 makes.

    `prmt` picks one of eight bytes by three bits of a nibble; with the fourth bit set it gives
    eight copies of that byte's sign. So all nibbles look into the tables of codes 0 to 7 and (with
    the bit flipped) of 8 to 15, and an exclusive or joins the two: the copies of signs cancel,
    because `_STEPS` are such that entries i and i + 8 have the same sign bit.
    """
    steps, zero = _STEPS[quant_type]
    words = torch.tensor(_tables(quant_type, steps, zero), dtype=torch.int32)
    return Lookup(words, _asm(), _X_SCALE, 2.0**141 / _X_SCALE / steps, -zero / steps)


def _tables(quant_type: str, steps: int, zero: int) -> list[int]:
    """Return the low bytes of codes 0 to 7 and of 8 to 15, then the high ones, as int32 `[8]`."""
    values = [round(level * steps) + zero for level in codebooks.levels(quant_type).tolist()]
    tables = b""
    for plane in ([v & 0xFF for v in values], [v >> 8 for v in values]):
        flipped = [b ^ (0xFF if a & 0x80 else 0) for a, b in zip(plane[:8], plane[8:], strict=True)]
        tables += bytes(plane[:8] + flipped)
    return list(struct.unpack("=8i", tables))


def _asm() -> str:
    """Return PTX that makes values $0 to $7 of the codes $8, through the tables $9 to $16."""
    lines = ["{", ".reg .b32 c, f, l, h, t;", "mov.b32 c, $8;", "xor.b32 f, c, 0x88888888;"]
    for half in range(2):
        for name, first in (("l", 9), ("h", 13)):
            lines += [
                f"prmt.b32 {name}, ${first}, ${first + 1}, c;",
                f"prmt.b32 t, ${first + 2}, ${first + 3}, f;",
                f"xor.b32 {name}, {name}, t;",
            ]
        for i in range(4):
            # Bytes: sign of h (0), value of l, value of h, sign of h; the high nibble comes first.
            selector = (12 + i) << 12 | (4 + i) << 8 | i << 4 | (12 + i)
            lines.append(f"prmt.b32 ${4 * half + (i ^ 1)}, l, h, {selector};")
        if half == 0:
            lines += ["shr.u32 c, c, 16;", "shr.u32 f, f, 16;"]
    return "\n".join([*lines, "}"])


@dataclass(frozen=True)
class PairLookup:
    """How codes become pairs of float16: `level = (value - zero) * scale`.

    Args:
        levels: The levels, for where `pick` is empty.
        pick: PTX from a word of two units of four codes to bytes, of the first two codes of each
            unit and of the last two; empty strings where Triton is interpreted.
        join: PTX from these bytes to the values of the first code of both, and of the second.
        scale: What a value has to be multiplied with.
        zero: The value of zero.
    """

    levels: Tensor
    pick: tuple[str, str] = ("", "")
    join: tuple[str, str] = ("", "")
    scale: float = 1.0
    zero: float = 0.0


# Steps from 0 to 1 and the integer for 0: all fit into 11 bits, where float16 counts by 2^-24.
_PAIR_STEPS = {"nf4": (967, 994), "fp4": (948, 958)}


@functools.cache
def pair_lookup(quant_type: str, device: torch.device) -> PairLookup:
    """Return how the codes of a type become pairs on a device."""
    levels = codebooks.levels(quant_type)
    if device.type != "cuda":
        return PairLookup(levels)
    return replace(pairs_by_bytes(quant_type), levels=levels.to(device))


def pairs_by_bytes(quant_type: str) -> PairLookup:
    """Return the lookup of pairs by byte permutes, its levels on the CPU.

    As in `by_bytes` a level becomes an integer, here of 11 bits, whose bits are those of a float16
    2^-24 times as large. The error is 4e-4 of absmax at most, less than bf16 makes.
    """
    steps, zero = _PAIR_STEPS[quant_type]
    tables = [word & 0xFFFFFFFF for word in _tables(quant_type, steps, zero)]
    return PairLookup(
        codebooks.levels(quant_type),
        (_pick(tables, 0), _pick(tables, 16)),
        # The high nibble of a byte comes first.
        ("prmt.b32 $0, $1, $2, 0x7351;", "prmt.b32 $0, $1, $2, 0x6240;"),
        2.0**24 / steps,
        zero * 2.0**-24,
    )


def _pick(tables: list[int], shift: int) -> str:
    """Return PTX from codes $2 to the low bytes $0 and the high bytes $1 of four of them."""
    # ptxas would put constants into registers anew for each use; it cannot tell that z is 0.
    lines = ["{", ".reg .b32 c, f, t, z;", ".reg .b32 a<8>;"]
    lines += ["mov.u32 z, %lanemask_lt;", "shr.u32 z, z, 31;"]
    lines += [f"xor.b32 a{i}, z, {word};" for i, word in enumerate(tables)]
    lines += ["prmt.b32 c, $2, $2, 0x3120;", "xor.b32 f, c, 0x88888888;"]
    if shift:
        lines += [f"shr.u32 c, c, {shift};", f"shr.u32 f, f, {shift};"]
    for plane, i in ((0, 0), (1, 4)):
        lines += [
            f"prmt.b32 t, a{i}, a{i + 1}, c;",
            f"prmt.b32 z, a{i + 2}, a{i + 3}, f;",
            f"xor.b32 ${plane}, t, z;",
        ]
    return "\n".join([*lines, "}"])
