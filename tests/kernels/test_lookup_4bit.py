"""The PTX of the lookup, run on words of codes by an interpreter of its five instructions."""

import re
import struct

import pytest
import torch

from halfbyte.kernels import codebooks
from halfbyte.kernels.lookup_4bit import by_bytes, lookup


def _prmt(a, b, selector):
    entries = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    result = 0
    for i in range(4):
        nibble = (selector >> 4 * i) & 15
        byte = entries[nibble & 7]
        if nibble & 8:
            byte = 0xFF if byte & 0x80 else 0
        result |= byte << 8 * i
    return result


_RUN = {
    "mov": lambda a: a,
    "xor": lambda a, b: a ^ b,
    "shr": lambda a, b: a >> b,
    "prmt": _prmt,
}


def _execute(program, operands):
    registers = {f"${8 + i}": value for i, value in enumerate(operands)}
    for line in program.splitlines():
        found = re.fullmatch(r"(\w+)\.\w+ (.+);", line)
        if not found:
            assert line in ("{", "}") or line.startswith(".reg")
            continue
        target, *sources = found[2].split(", ")
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = _RUN[found[1]](*values)
    return [struct.unpack("<f", registers[f"${i}"].to_bytes(4, "little"))[0] for i in range(8)]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_code_becomes_its_level_in_every_place(quant_type):
    levels = codebooks.levels(quant_type).tolist()
    how = by_bytes(quant_type)
    tables = [word & 0xFFFFFFFF for word in how.tables.tolist()]
    for start in range(16):
        codes = [(start + 3 * i) % 16 for i in range(8)]
        packed = bytes(codes[2 * i] << 4 | codes[2 * i + 1] for i in range(4))
        values = _execute(how.asm, [int.from_bytes(packed, "little"), *tables])
        for code, value in zip(codes, values, strict=True):
            level = value * how.x_scale * how.scale + how.shift
            assert level == pytest.approx(levels[code], abs=3.4e-5)


def test_where_triton_is_interpreted_the_levels_are_the_table():
    how = lookup("nf4", torch.device("cpu"))
    assert (how.asm, how.x_scale, how.scale, how.shift) == ("", 1.0, 1.0, 0.0)
    assert torch.equal(how.tables, codebooks.levels("nf4"))
