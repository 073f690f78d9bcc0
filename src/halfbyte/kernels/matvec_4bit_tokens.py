"""Products of several tokens with sibling 4-bit weights: the formula of `kernels.matvec_4bit`.

On CUDA 2 to 128 tokens take tensor cores, which read x as float16 times a power of two for each
token, so that its largest element fits; weights are good to 4e-4 of their block's largest. This is
what runs elsewhere, and for more tokens, dense weights and blocks of 32: weights are dequantized to
the dtype of x and multiplied.
"""

import torch
from torch import Tensor

from halfbyte.kernels.matvec_4bit_parts import Before, Group, before_product, dense


def several_tokens(
    x: Tensor, group: Group, before: Before | None, residual: Tensor | None
) -> Tensor:
    """Return `y`, `[T, N]`: see `kernels.matvec_4bit`."""
    x = before_product(x, before)
    wide_type = torch.promote_types(x.dtype, torch.float32)
    y = torch.cat([x @ dense(weight, x.dtype).t() for weight in group.weights], 1).to(wide_type)
    if group.lora_A is not None and group.lora_B is not None:
        xa = (x @ group.lora_A.t()).to(wide_type).unflatten(1, (len(group.weights), -1))
        sizes = [int(weight.shape[0]) for weight in group.weights]
        lora_B = group.lora_B.to(wide_type).split(sizes)
        y += torch.cat([xa[:, i] @ lora_B[i].t() for i in range(len(sizes))], 1)
    if group.bias is not None:
        y += group.bias
    if residual is not None:
        y += residual
    return y.to(x.dtype)
