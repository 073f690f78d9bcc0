"""The formulas by hand; that they are the engine's is in tests/plan/test_fused.py."""

import dataclasses
import itertools
from collections import Counter

import pytest

from halfbyte.memory.fused_shape import FusedShape, Group
from halfbyte.memory.fused_step import FusedStep
from halfbyte.memory.ledger import Ledger

SHAPE = FusedShape(
    hidden=256, heads=4, head_dim=64, intermediate=512,
    qkv=Group(256, 512, 24, 1), o=Group(256, 256, 8, 1),
    gate_up=Group(256, 1024, 16, 1), down=Group(512, 256, 8, 1),
)  # fmt: skip
IN_FP8 = dataclasses.replace(
    SHAPE,
    **{
        name: dataclasses.replace(getattr(SHAPE, name), is_fp8=True)
        for name in ("qkv", "o", "gate_up", "down")
    },
)


def peak(tokens, levels, staying=0, shape=SHAPE, **options):
    ledger = Ledger()
    step = FusedStep(ledger, shape, tokens, levels, staying, **options)
    step.write(labels=tokens, vocabulary=128, chunk_rows=1024)
    assert staying or ledger.nbytes == 0
    return ledger.peak


def test_one_more_layer_adds_what_it_saves():
    for level in ("input", "attention", "all"):
        few, many = (peak(4096, [level] * n).nbytes for n in (4, 5))
        assert many - few == SHAPE.saved_bytes(level, 4096)


def test_weights_that_stay_are_counted_for_the_whole_step():
    stays = peak(64, ["all"] * 4, staying=4)
    held = stays.owners["dequantized weights that stay"]
    assert 0 <= held - 4 * SHAPE.weight_bytes() < 4 * 512
    assert "dequantize workspace" not in stays.owners


@pytest.mark.parametrize("tile", [0, 1024, 3000])
def test_offloaded_inputs_take_no_more_than_two_whatever_the_depth(tile):
    levels = [["offload"] * n + ["input"] for n in (2, 3, 9)]
    peaks = [peak(4096, some, tile=tile).nbytes for some in levels]
    assert peaks[0] == peaks[1] == peaks[2]
    kept = peak(4096, ["input"] * 10, tile=tile).nbytes
    assert kept - peaks[2] == 8 * SHAPE.saved_bytes("input", 4096)


def test_smaller_tiles_take_less():
    wide = dataclasses.replace(
        SHAPE, intermediate=2048, gate_up=Group(256, 4096, 16, 1), down=Group(2048, 256, 8, 1)
    )
    tiles = (0, 8192, 4096, 1024)
    sizes = [peak(16384, ["offload"] * 4, shape=wide, tile=tile).nbytes for tile in tiles]
    assert all(a > b for a, b in itertools.pairwise(sizes))
    assert peak(1024, ["input"], tile=4096) == peak(1024, ["input"])


@pytest.mark.parametrize("level", ["offload", "input", "attention", "all"])
@pytest.mark.parametrize("tile", [0, 512])
def test_what_is_taken_is_given_back_in_every_family(level, tile):
    shape = dataclasses.replace(SHAPE, normed_heads=6, has_branch_norms=True, num_rotations=2)
    more = peak(2000, [level] * 3, shape=shape, tile=tile, is_recorded=True)
    assert more.nbytes > peak(2000, [level] * 3, tile=tile).nbytes


class Watched(Ledger):
    """Remembers the most that each owner ever held."""

    def __init__(self):
        super().__init__()
        self.most = Counter()

    def take(self, owner, nbytes):
        super().take(owner, nbytes)
        self.most[owner] = max(self.most[owner], self._held[owner])


@pytest.mark.parametrize("level", ["offload", "input", "attention", "all"])
@pytest.mark.parametrize("tile", [0, 512])
def test_eight_bits_take_one_matrix_and_its_rows_at_a_time(level, tile):
    """The most is the gradient of gate and up; tiles share both matrices of all three products."""
    ledger = Watched()
    FusedStep(ledger, IN_FP8, 4096, [level] * 3, tile=tile).write(
        labels=4096, vocabulary=128, chunk_rows=1024
    )
    assert ledger.nbytes == 0
    is_tiled = tile > 0 and level != "all"
    qkv, group = IN_FP8.qkv, IN_FP8.gate_up
    rows = group.quantized_bytes(4096, is_backward=True)
    if is_tiled:
        rows = qkv.quantized_bytes(4096, is_backward=True)
    assert 0 <= ledger.most["activations in eight bits"] - rows < 512
    weights = max(group.matrix_bytes(is_backward=side) for side in (False, True))
    weights += group.wide_bytes(2)
    if is_tiled:
        weights = sum(g.staying_bytes(2) for g in (IN_FP8.o, group, IN_FP8.down))
    assert 0 <= ledger.most["dequantize workspace"] - weights < 4 * 512


def test_what_stays_in_eight_bits_needs_no_workspace():
    ledger = Watched()
    FusedStep(ledger, IN_FP8, 64, ["all"] * 4, 4).write(labels=64, vocabulary=128, chunk_rows=64)
    assert 0 <= ledger.nbytes - 4 * IN_FP8.weight_bytes() < 4 * 512
    assert ledger.most["dequantize workspace"] == 0


def test_sixteen_bits_know_nothing_of_eight():
    assert "activations in eight bits" not in peak(4096, ["all"] * 3).owners
