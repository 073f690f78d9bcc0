"""Which type each tensor of a GGUF file gets, and its bytes.

f32, f16, bf16 and q8_0 give one type to every matrix; q4_0 keeps the output in Q6_K. q4_k_m is
llama.cpp's mixture: Q4_K, but Q6_K for the output and, in part of the layers, for values and the
MLP's second matrix. Vectors stay float32. A matrix whose rows do not divide into a type's blocks
falls back to one of smaller blocks, as in llama.cpp.
"""

import re
from collections.abc import Sequence
from typing import Literal

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray
from torch import Tensor

from halfbyte.errors import ConfigError
from halfbyte.gguf.kquants import quantize_q4_k, quantize_q6_k

FileType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"]
FILE_TYPES: dict[str, gguf.LlamaFileType] = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
    "q4_k_m": gguf.LlamaFileType.MOSTLY_Q4_K_M,
}
_MATRIX_TYPES = {
    "f32": Type.F32,
    "f16": Type.F16,
    "bf16": Type.BF16,
    "q8_0": Type.Q8_0,
    "q4_0": Type.Q4_0,
    "q4_k_m": Type.Q4_K,
}
_FALLBACKS = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}
_LAYER = re.compile(r"blk\.(\d+)\.(attn_v|attn_qkv|ffn_down)\.weight")
_CHUNK_VALUES = 1 << 22
"""Values that are quantized at a time, so that a large matrix needs little memory beside it."""


def check_file_type(name: str) -> FileType:
    """Return `name` if it is a file type.

    Raises:
        ConfigError: it is none.
    """
    if name not in FILE_TYPES:
        raise ConfigError(f"type should be one of {', '.join(FILE_TYPES)}, got {name!r}")
    return name  # type: ignore[return-value]


def tensor_type(
    name: str, shape: Sequence[int], file_type: FileType, *, num_layers: int, output: str
) -> Type:
    """Return the type of one tensor.

    Args:
        name: Its name in the file.
        shape: Its shape, rows first.
        file_type: What was asked for.
        num_layers: Layers of the model.
        output: Name of the matrix that makes the logits: the embedding, where weights are tied.
    """
    if len(shape) < 2:
        return Type.F32
    kind = _MATRIX_TYPES[file_type]
    if file_type == "q4_k_m" and _wants_more_bits(name, num_layers):
        kind = Type.Q6_K
    if file_type in ("q4_0", "q4_k_m") and name == output:
        kind = Type.Q6_K
    while kind in gguf.GGML_QUANT_SIZES and shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = _FALLBACKS.get(kind, Type.F16)
    return kind


def _wants_more_bits(name: str, num_layers: int) -> bool:
    """Whether q4_k_m keeps this matrix in 6 bits (`use_more_bits` in llama-quant.cpp)."""
    match = _LAYER.fullmatch(name)
    if not match or match[2] == "attn_qkv":
        return False
    layer, eighth = int(match[1]), num_layers // 8
    return layer < eighth or layer >= 7 * num_layers // 8 or (layer - eighth) % 3 == 2


def num_bytes(shape: Sequence[int], kind: Type) -> int:
    """Return the bytes of a tensor."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def encode(tensor: Tensor, kind: Type) -> NDArray[np.generic]:
    """Return a float32 tensor as an array whose bytes are those of `kind`.

    A part of the rows is encoded at a time.
    """
    if tensor.ndim < 2 or kind == Type.F32:
        return tensor.numpy()
    rows = max(1, _CHUNK_VALUES // tensor.shape[-1])
    return np.concatenate([_encode(part.contiguous(), kind) for part in tensor.split(rows)])


def _encode(part: Tensor, kind: Type) -> NDArray[np.generic]:
    if kind == Type.F16:
        return part.half().numpy()
    if kind == Type.BF16:
        return part.bfloat16().view(torch.int16).numpy()
    if kind == Type.Q4_K:
        return quantize_q4_k(part).numpy()
    if kind == Type.Q6_K:
        return quantize_q6_k(part).numpy()
    return gguf.quantize(part.numpy(), kind)
