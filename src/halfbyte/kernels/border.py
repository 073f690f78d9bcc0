"""Matrices with room for a few more columns in each row, a border, and how far apart rows lie.

A border of LoRA's ranks makes rows of odd lengths, and a product of such rows reads each 128 bytes
of them from two lines of the cache. So rows begin at multiples of 256 bytes, whatever they hold.
The products of a layer of Llama 8B, forward and backward, took an H100 10,576 us with rows as long
as what is in them, 10,552 with rows at multiples of 64 bytes, 10,486 of 128 and 10,311 of 256;
without a border 10,253 (8,192 tokens, rank 16, the card at its limit of power).
"""

from torch import Tensor

from halfbyte.kernels.dispatch import accelerated
from halfbyte.kernels.sizes import cdiv

_ROW_BYTES = 256


def pitch(width: int, columns: int, itemsize: int) -> int:
    """Return how many elements rows of `width` and a border of `columns` lie apart on a GPU."""
    if columns == 0:
        return width
    unit = _ROW_BYTES // itemsize
    return cdiv(width + columns, unit) * unit


def new_with_border(like: Tensor, rows: int, width: int, columns: int) -> Tensor:
    """Return an unwritten `[rows, width + columns]` of the dtype and on the device of `like`."""
    return like.new_empty(rows, _pitch_of(like, width, columns))[:, : width + columns]


def _pitch_of(x: Tensor, width: int, columns: int) -> int:
    if x.device.type == "cpu" and x.element_size() == 2:
        # oneDNN, which multiplies these for torch, also multiplies what lies between rows, by
        # zero: NaN there, as unwritten memory may hold, would be NaN in the product.
        return width + columns
    return pitch(width, columns, x.element_size())


def with_border(x: Tensor, columns: int) -> Tensor:
    """Return `x` `[T, K]` as the first K columns of a `[T, K + columns]` matrix.

    Where the rows of `x` already lie exactly that far apart, as those do that `rms_norm_backward`
    and this function made, the room behind them is used and nothing is copied.
    """
    rows, width = x.shape
    if columns == 0:
        return x
    apart = _pitch_of(x, width, columns)
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
