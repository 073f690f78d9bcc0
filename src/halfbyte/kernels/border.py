"""Matrices with room for a few more columns in each row, a border, and how far apart rows lie.

A border of LoRA's ranks makes rows of odd lengths, which slow products down. So rows begin at
multiples of 256 bytes, whatever they hold. The products of a layer of Llama 8B, forward and
backward, took an H100 10,576 us with rows as long as what is in them, 10,552 with rows at multiples
of 64 bytes, 10,486 of 128 and 10,311 of 256; without a border 10,253 (8,192 tokens, rank 16, the
card at its limit of power).
"""

from torch import Tensor

from halfbyte.kernels.dispatch import accelerated
from halfbyte.kernels.sizes import cdiv

_ROW_BYTES = 256


def pitch(width: int, columns: int, itemsize: int) -> int:
    """Return how many elements rows of `width` and a border of `columns` lie apart."""
    if columns == 0:
        return width
    unit = _ROW_BYTES // itemsize
    return cdiv(width + columns, unit) * unit


def new_with_border(like: Tensor, rows: int, width: int, columns: int) -> Tensor:
    """Return an unwritten `[rows, width + columns]` of the dtype and on the device of `like`."""
    # oneDNN, which multiplies 16 bits on a CPU, also multiplies what lies between rows, by zero:
    # NaN there, as unwritten memory may hold, would be NaN in the product.
    is_read = columns > 0 and like.device.type == "cpu" and like.element_size() == 2
    new = like.new_zeros if is_read else like.new_empty
    return new(rows, pitch(width, columns, like.element_size()))[:, : width + columns]


def with_border(x: Tensor, columns: int) -> Tensor:
    """Return `x` `[T, K]` as the first K columns of a `[T, K + columns]` matrix.

    Where the rows of `x` lie as far apart as those of `new_with_border`, what lies between them is
    taken to be room: so it must not be a slice of a matrix that holds something there. Else it is
    copied.
    """
    rows, width = x.shape
    if columns == 0:
        return x
    apart = pitch(width, columns, x.element_size())
    end = x.storage_offset() + rows * apart
    if x.stride() == (apart, 1) and x.untyped_storage().nbytes() >= end * x.element_size():
        return x.as_strided((rows, width + columns), (apart, 1))
    return copy_with_border(x, columns)


@accelerated
def copy_with_border(x: Tensor, columns: int) -> Tensor:
    """Return a `[T, K + columns]` copy of `x` `[T, K]`, its last columns left unwritten."""
    wide = new_with_border(x, x.shape[0], x.shape[1], columns)
    wide[:, : x.shape[1]] = x
    return wide
