"""Sizes of launches, computed on the host.

Triton's functions of these names may be called in kernels too, and take 5 us of the host each time:
of a model's layers, as much as all launches of a prompt.
"""


def cdiv(dividend: int, divisor: int) -> int:
    """Return the quotient of two integers, rounded up."""
    return -(-dividend // divisor)


def next_power_of_2(number: int) -> int:
    """Return the smallest power of two that is not less than a number; 0 for 0."""
    return 1 << (number - 1).bit_length() if number else 0
