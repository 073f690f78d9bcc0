"""A matrix with room for a few more columns, on CUDA.

torch copies into rows with a pitch element by element, at half the memory's speed.
"""

import triton
import triton.language as tl
from torch import Tensor

from halfbyte.kernels.border import new_with_border
from halfbyte.kernels.sizes import cdiv

_BLOCK = 2048


@triton.jit
def _copy_kernel(x_ptr, out_ptr, stride_x, stride_out, K, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K
    value = tl.load(x_ptr + row * stride_x + offs, mask=mask)
    tl.store(out_ptr + row * stride_out + offs, value, mask=mask)


def copy_with_border(x: Tensor, columns: int) -> Tensor:
    rows, width = x.shape
    wide = new_with_border(x, rows, width, columns)
    if x.stride(1) != 1:
        wide[:, :width] = x
    elif rows:
        _copy_kernel[(rows, cdiv(width, _BLOCK))](
            x, wide, x.stride(0), wide.stride(0), width, BLOCK=_BLOCK
        )
    return wide
