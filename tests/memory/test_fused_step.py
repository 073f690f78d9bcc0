"""The formulas by hand; that they are the engine's is in tests/plan/test_fused.py."""

from halfbyte.memory.fused_step import FusedShape, FusedStep, Group
from halfbyte.memory.ledger import Ledger

SHAPE = FusedShape(
    hidden=256, heads=4, head_dim=64, intermediate=512,
    qkv=Group(256, 512, 24, 1), o=Group(256, 256, 8, 1),
    gate_up=Group(256, 1024, 16, 1), down=Group(512, 256, 8, 1),
)  # fmt: skip


def peak(tokens, levels, staying=0, shape=SHAPE):
    ledger = Ledger()
    step = FusedStep(ledger, shape, tokens, levels, staying)
    step.write(labels=tokens, vocabulary=128, chunk_rows=1024)
    return ledger.peak


def test_saved_bytes_of_a_token():
    attention = 256 + 512 + 24 + 256 + 8
    assert SHAPE.saved_bytes("input", 1) == 512
    assert SHAPE.saved_bytes("attention", 1) == 2 * attention + 16
    assert SHAPE.saved_bytes("all", 1) == 2 * (attention + 256 + 8 + 1024 + 32) + 16


def test_one_more_layer_adds_what_it_saves():
    for level in ("input", "attention", "all"):
        few, many = (peak(4096, [level] * n).nbytes for n in (4, 5))
        assert many - few == SHAPE.saved_bytes(level, 4096)


def test_weights_that_stay_are_counted_for_the_whole_step():
    stays = peak(64, ["all"] * 4, staying=4)
    held = stays.owners["dequantized weights that stay"]
    assert 0 <= held - 4 * SHAPE.weight_bytes() < 4 * 512
    assert "dequantize workspace" not in stays.owners
