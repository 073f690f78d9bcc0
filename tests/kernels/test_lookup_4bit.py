"""The PTX of the lookup, run on words of codes by an interpreter of its five instructions."""

import re
import struct

import pytest
import torch

from halfbyte.kernels import codebooks
from halfbyte.kernels.lookup_4bit import by_bytes, lookup, pair_lookup, pairs_by_bytes


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


def _execute(program, registers):
    """Run PTX on these registers and return all that there are then."""
    registers = {"%lanemask_lt": 0x7FFFFFFF, **registers}
    for line in program.splitlines():
        found = re.fullmatch(r"(\w+)\.\w+ (.+);", line)
        if not found:
            assert line in ("{", "}") or line.startswith(".reg")
            continue
        target, *sources = found[2].split(", ")
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = _RUN[found[1]](*values)
    return registers


def _words_of_codes():
    """Words of eight codes, in which every code comes in every place."""
    for start in range(16):
        codes = [(start + 3 * i) % 16 for i in range(8)]
        packed = bytes(codes[2 * i] << 4 | codes[2 * i + 1] for i in range(4))
        yield codes, int.from_bytes(packed, "little")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_code_becomes_its_level_in_every_place(quant_type):
    levels = codebooks.levels(quant_type).tolist()
    how = by_bytes(quant_type)
    tables = {f"${9 + i}": word & 0xFFFFFFFF for i, word in enumerate(how.tables.tolist())}
    for codes, word in _words_of_codes():
        after = _execute(how.asm, {"$8": word, **tables})
        for i, code in enumerate(codes):
            value = struct.unpack("<f", after[f"${i}"].to_bytes(4, "little"))[0]
            level = value * how.x_scale * how.scale + how.shift
            assert level == pytest.approx(levels[code], abs=3.4e-5)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_pairs_are_the_same_code_of_both_units(quant_type):
    levels = codebooks.levels(quant_type).tolist()
    how = pairs_by_bytes(quant_type)
    for codes, word in _words_of_codes():
        for half, pick in enumerate(how.pick):
            picked = _execute(pick, {"$2": word})
            for i, join in enumerate(how.join):
                pair = _execute(join, {"$1": picked["$0"], "$2": picked["$1"]})["$0"]
                values = struct.unpack("<2e", pair.to_bytes(4, "little"))
                first = 2 * half + i
                for value, code in zip(values, (codes[first], codes[4 + first]), strict=True):
                    level = (value - how.zero) * how.scale
                    assert level == pytest.approx(levels[code], abs=4e-4)


def test_where_triton_is_interpreted_the_levels_are_the_table():
    how = lookup("nf4", torch.device("cpu"))
    assert (how.asm, how.x_scale, how.scale, how.shift) == ("", 1.0, 1.0, 0.0)
    assert torch.equal(how.tables, codebooks.levels("nf4"))
    pairs = pair_lookup("nf4", torch.device("cpu"))
    assert (pairs.pick, pairs.scale, pairs.zero) == (("", ""), 1.0, 0.0)
    assert torch.equal(pairs.levels, codebooks.levels("nf4"))
