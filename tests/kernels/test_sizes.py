"""Sizes of launches are those that Triton computes."""

import pytest

from halfbyte.kernels.sizes import cdiv, next_power_of_2


def test_they_are_tritons():
    triton = pytest.importorskip("triton")
    for number in (*range(70), 4095, 4096, 4097, (1 << 33) + 1):
        assert next_power_of_2(number) == triton.next_power_of_2(number)
        for divisor in (1, 2, 7, 64):
            assert cdiv(number, divisor) == triton.cdiv(number, divisor)
