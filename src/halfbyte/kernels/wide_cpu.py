"""The matrix of sibling projections on a CPU: dequantized in place where it has no border."""

from collections.abc import Sequence

from torch import Tensor

from halfbyte.kernels import native, nf4, nf4_cpu, wide
from halfbyte.kernels.wide import Part


def assemble_(matrix: Tensor, parts: Sequence[Part], *, only_border: bool = False) -> Tensor:
    library = native.library()
    has_border = matrix.shape[1] != parts[0].weight.shape[1]
    if library is None or has_border or only_border or not matrix.is_contiguous():
        return wide.assemble_.__wrapped__(  # type: ignore[attr-defined]
            matrix, parts, only_border=only_border
        )
    start = 0
    for part in parts:
        weight = part.weight
        rows = matrix[start : start + weight.shape[0]]
        start += weight.shape[0]
        if isinstance(weight, Tensor):
            rows.copy_(weight)
        else:
            nested = None
            if weight.nested_absmax is not None:
                assert weight.nested_map is not None
                assert weight.offset is not None
                nested = (weight.nested_absmax, weight.nested_map, weight.offset)
            block_size = weight.block_size
            nf4.check_tensors(
                weight.packed, weight.absmax, nested, shape=rows.shape, block_size=block_size
            )
            nf4_cpu.fill_(
                library, rows, weight.packed, weight.absmax, nested,
                block_size=block_size, quant_type=weight.quant_type,
            )  # fmt: skip
    return matrix
