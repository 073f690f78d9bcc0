"""Bytes that stay for the whole run, by owner: of a real model, or of one without weights."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from halfbyte.memory.pager import SLOTS
from halfbyte.memory.pages import PAGE_BYTES
from halfbyte.optim.flat import ALIGNMENT
from halfbyte.quant.linear import NF4Linear

CODES = "4-bit codes"
SCALES = "4-bit scales"
DENSE = "weights in 16 and 32 bits"
ADAPTERS = "adapters"
GRADIENTS = "gradients"
OPTIMIZER = "optimizer"
ROW_SCALES = "scales of rows in eight bits"
LIBRARIES = "library workspaces"
# cuBLAS: 32 MiB for the forward's and the backward's thread each (PyTorch's size on Hopper, less
# elsewhere), and as much again on the stream that CUDA graphs are recorded on.
_LIBRARY_BYTES = 128 * 2**20
_STATE_BYTES = {32: 8.0, 8: 2 + 8 / ALIGNMENT}


def persistent_bytes(model: nn.Module) -> dict[str, int]:
    """Return the bytes of weights and adapters by owner; a tied weight counts once."""
    owners: Counter[str] = Counter()
    seen: set[int] = set()
    for module in model.modules():
        is_packed = isinstance(module, NF4Linear) and module.is_quantized
        for name, tensor in (*_own(module.named_parameters), *_own(module.named_buffers)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if is_packed and name != "bias":
                owner = CODES if name == "weight" else SCALES
            elif isinstance(tensor, nn.Parameter) and tensor.requires_grad:
                # Of another dtype, the optimizer keeps a float32 copy beside it.
                owners[ADAPTERS] += 0 if tensor.dtype == torch.float32 else tensor.nbytes
                owners[ADAPTERS] += 4 * aligned(tensor.numel())
                owners[GRADIENTS] += 4 * aligned(tensor.numel())
                continue
            else:
                owner = DENSE
            owners[owner] += tensor.nbytes
    return dict(owners)


def trainable_elements(model: nn.Module) -> int:
    """Return the elements of the optimizer's flat vector."""
    return sum(aligned(p.numel()) for p in model.parameters() if p.requires_grad)


def optimizer_bytes(elements: int, state_bits: int) -> int:
    """Return the bytes of both moments, wherever they are."""
    return int(elements * _STATE_BYTES[state_bits])


def slot_bytes(elements: int, state_bits: int) -> int:
    """Return what pages on their way take on the device during the update."""
    return min(SLOTS * PAGE_BYTES, optimizer_bytes(elements, state_bits))


def library_bytes(device_type: str) -> int:
    """Return what libraries take from the allocator for themselves."""
    return _LIBRARY_BYTES if device_type == "cuda" else 0


def aligned(numel: int) -> int:
    """Return the elements that a parameter takes in the flat vector."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def _own(named: Any) -> Any:
    return named(recurse=False, remove_duplicate=False)
