"""Sizes of launches and tiles, computed on the host.

Triton's functions of these names may be called in kernels too, and take the host 5 us each time: 7
ms for a prompt of 32 layers, which asks 1,473 times. Decoding's kernels, recorded once, use those.
"""


def cdiv(dividend: int, divisor: int) -> int:
    """Return the quotient of two integers, rounded up."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is not less than a number; 0 for 0."""
    return 1 << (number - 1).bit_length() if number else 0
