from halfbyte.memory.fused_shape import FusedShape, Group

SHAPE = FusedShape(
    hidden=256, heads=4, head_dim=64, intermediate=512,
    qkv=Group(256, 512, 24, 1), o=Group(256, 256, 8, 1),
    gate_up=Group(256, 1024, 16, 1), down=Group(512, 256, 8, 1),
)  # fmt: skip


def test_saved_bytes_of_a_token():
    attention = 256 + 512 + 24 + 256 + 8
    assert SHAPE.saved_bytes("offload", 1) == 0
    assert SHAPE.saved_bytes("input", 1) == 512
    assert SHAPE.saved_bytes("attention", 1) == 2 * attention + 20
    assert SHAPE.saved_bytes("all", 1) == 2 * (attention + 256 + 8 + 1024 + 32) + 24
