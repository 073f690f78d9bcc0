import dataclasses

from halfbyte.kernels.fp8 import border_columns
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
    gate_up = 1152  # 1,024 with 16 ranks behind them, up to a multiple of 256 bytes
    assert SHAPE.saved_bytes("all", 1) == 2 * (attention + 256 + 8 + gate_up + 16) + 24


def test_bytes_of_a_group_in_sixteen_bits():
    group = Group(256, 512, 24, 1)
    assert (
        group.staying_bytes(2) == group.wide_bytes(2) == 536 * 384 * 2
    )  # rows of 280, apart by 768 bytes
    assert group.matrix_bytes(is_backward=True) == group.quantized_bytes(9, is_backward=True) == 0
    assert SHAPE.scale_bytes() == 0


def test_bytes_of_a_group_in_eight_bits():
    group = Group(256, 512, 24, 1, is_fp8=True)
    columns = border_columns(24)
    assert columns >= 3 * 24
    assert group.wide_bytes(2) == 24 * (256 + 512) * 2 + 2 * 4  # a float32 balance for each
    assert group.matrix_bytes(is_backward=False) == 512 * (256 + columns)
    assert group.matrix_bytes(is_backward=True) == 256 * (512 + columns)
    assert group.quantized_bytes(9, is_backward=False) == 9 * (256 + columns + 4)
    assert group.quantized_bytes(9, is_backward=True) == 9 * (512 + columns + 4)
    both = 2 * 256 * 512 + (256 + 512) * columns
    assert group.staying_bytes(2) == both + group.wide_bytes(2)
    assert group.scale_bytes() == 4 * (256 + 512)
    bare = dataclasses.replace(group, rank=0)
    assert bare.staying_bytes(2) == 2 * 256 * 512
