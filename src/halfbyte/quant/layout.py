"""A quantized weight as the tensors that bitsandbytes writes to disk.

Of a weight called P these are `P` (packed codes), `P.absmax`, `P.quant_map`, with double
quantization `P.nested_absmax` and `P.nested_quant_map`, and `P.quant_state.bitsandbytes__nf4`:
UTF-8 JSON held as uint8. bitsandbytes trusts what it reads (a short `absmax` makes it crash); here
everything is checked before use.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from halfbyte.checkpoint.header import parse_json
from halfbyte.errors import CheckpointError
from halfbyte.kernels import codebooks
from halfbyte.kernels.nf4 import BLOCK_SIZES, NESTED_BLOCK_SIZE, QUANT_TYPES
from halfbyte.quant.weight import QuantizedWeight

STATE_PREFIX = ".quant_state.bitsandbytes__"
SCALE_SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
STATE_SUFFIXES = tuple(STATE_PREFIX + quant_type for quant_type in QUANT_TYPES)
SUFFIXES = ("", *SCALE_SUFFIXES, *STATE_SUFFIXES)

_MAX_STATE_BYTES = 4096
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_STORAGE_DTYPES = (torch.uint8, *_DTYPES.values())
_PLAIN_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
_NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}


def to_tensors(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return the tensors to save for the weight called `name`, in bitsandbytes' order."""
    state: dict[str, Any] = {
        "quant_type": weight.quant_type,
        "blocksize": weight.block_size,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    device = weight.device
    tensors = {
        name: weight.packed,
        f"{name}.absmax": weight.absmax,
        f"{name}.quant_map": codebooks.levels(weight.quant_type).to(device),
    }
    if weight.nested is not None:
        nested_absmax, nested_map, offset = weight.nested
        state |= {
            "nested_blocksize": NESTED_BLOCK_SIZE,
            "nested_dtype": "float32",
            "nested_offset": offset.item(),
        }
        tensors[f"{name}.nested_absmax"] = nested_absmax
        tensors[f"{name}.nested_quant_map"] = nested_map
    blob = bytearray(json.dumps(state).encode("utf-8"))
    key = f"{name}{STATE_PREFIX}{weight.quant_type}"
    tensors[key] = torch.frombuffer(blob, dtype=torch.uint8).to(device)
    return tensors


def from_tensors(
    name: str, tensors: Mapping[str, Tensor], *, shape: tuple[int, ...] | None = None
) -> QuantizedWeight:
    """Return the weight called `name` from its tensors, all of them checked.

    Args:
        name: Name of the weight, such as `model.layers.0.mlp.up_proj.weight`.
        tensors: The tensors of this weight by full name; anything else in here is an error.
        shape: Shape `[out, in]` that the model has for this weight.

    Raises:
        CheckpointError: a tensor is missing, unknown, or of a wrong dtype, length or value.
    """
    reader = _Reader(name, tensors)
    quant_type, state = reader.state()
    quantized = shape if shape is not None else tuple(state["shape"])
    reader.require(
        state["shape"] == list(quantized),
        f"expected shape {list(quantized)} as in the model, got {state['shape']}",
    )
    numel = math.prod(quantized)
    num_blocks = -(-numel // state["blocksize"])
    is_nested = "nested_offset" in state
    absmax_dtype = torch.uint8 if is_nested else torch.float32
    absmax = reader.tensor(".absmax", absmax_dtype, num_blocks)
    levels = reader.tensor(".quant_map", torch.float32, 16)
    reader.require(
        torch.allclose(levels.cpu(), codebooks.levels(quant_type), rtol=0, atol=1e-6),
        f"its quant_map is not that of {quant_type}",
    )
    nested_absmax = nested_map = offset = None
    if is_nested:
        num_groups = -(-num_blocks // NESTED_BLOCK_SIZE)
        nested_absmax = reader.tensor(".nested_absmax", torch.float32, num_groups)
        nested_map = reader.tensor(".nested_quant_map", torch.float32, 256)
        reader.require(
            bool((nested_map.diff() >= 0).all()) and bool((nested_map.abs() <= 1).all()),
            "its nested_quant_map is not sorted within [-1, 1]",
        )
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32, device=absmax.device)
    reader.require_nothing_left()
    return QuantizedWeight(
        packed=reader.packed(numel),
        absmax=absmax,
        nested_absmax=nested_absmax,
        nested_map=nested_map,
        offset=offset,
        shape=torch.Size(quantized),
        dtype=_DTYPES[state["dtype"]],
        block_size=state["blocksize"],
        quant_type=quant_type,
    )


class _Reader:
    """Takes the tensors of one weight apart; every complaint names the weight."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.name = name
        self.tensors = tensors
        self.unread = set(tensors)

    def require(self, condition: bool, complaint: str) -> None:  # noqa: FBT001
        if not condition:
            self.fail(complaint)

    def fail(self, complaint: str, cause: Exception | None = None) -> NoReturn:
        raise CheckpointError(
            f"the 4-bit weight {self.name!r} is damaged: {complaint}",
            hint="copy the checkpoint again from where it came, or quantize the model again",
        ) from cause

    def get(self, suffix: str) -> Tensor:
        key = self.name + suffix
        if key not in self.tensors:
            self.fail(f"{key!r} is missing")
        self.unread.discard(key)
        return self.tensors[key]

    def tensor(self, suffix: str, dtype: torch.dtype, numel: int) -> Tensor:
        """Return the one-dimensional tensor called `suffix`, finite, of this dtype and length."""
        tensor = self.get(suffix)
        self.require(
            tensor.dtype == dtype and tuple(tensor.shape) == (numel,),
            f"expected {dtype} [{numel}] for {suffix[1:]}, got {tensor.dtype} {list(tensor.shape)}",
        )
        if dtype.is_floating_point:
            self.require(bool(torch.isfinite(tensor).all()), f"{suffix[1:]} holds NaN or Inf")
        return tensor

    def packed(self, numel: int) -> Tensor:
        """Return the codes as uint8 `[(numel + 1) // 2, 1]`, whatever dtype they are stored in."""
        tensor = self.get("")
        expected_bytes = (numel + 1) // 2
        self.require(
            tensor.dtype in _STORAGE_DTYPES and tensor.nbytes == expected_bytes,
            f"expected {expected_bytes} bytes of codes, "
            f"got {tensor.dtype} {list(tensor.shape)} ({tensor.nbytes} bytes)",
        )
        return tensor.detach().contiguous().view(-1).view(torch.uint8).view(-1, 1)

    def state(self) -> tuple[str, dict[str, Any]]:
        """Return the quantization type and the checked JSON object of the state tensor."""
        present = [kind for kind in QUANT_TYPES if self.name + STATE_PREFIX + kind in self.tensors]
        self.require(len(present) == 1, f"expected one quant_state tensor, got {len(present)}")
        blob = self.get(STATE_PREFIX + present[0])
        self.require(
            blob.dtype == torch.uint8 and blob.dim() == 1 and blob.numel() <= _MAX_STATE_BYTES,
            f"expected a quant_state of at most {_MAX_STATE_BYTES} bytes, "
            f"got {blob.dtype} {list(blob.shape)}",
        )
        try:
            state = parse_json(blob.cpu().numpy().tobytes(), "its quant_state")
        except CheckpointError as error:
            self.fail(error.message, error)
        self._check_state(present[0], state)
        return present[0], state

    def _check_state(self, quant_type: str, state: dict[str, Any]) -> None:
        keys = set(state)
        self.require(
            keys in (_PLAIN_KEYS, _PLAIN_KEYS | _NESTED_KEYS),
            f"its quant_state has the keys {sorted(keys)}",
        )
        self.require(
            state["quant_type"] == quant_type,
            f"its quant_state says {state['quant_type']!r}, its name says {quant_type!r}",
        )
        block_size, dtype = state["blocksize"], state["dtype"]
        self.require(
            type(block_size) is int and block_size in BLOCK_SIZES,
            f"its block size is {block_size!r}",
        )
        self.require(isinstance(dtype, str) and dtype in _DTYPES, f"its dtype is {dtype!r}")
        self.require(_is_shape(state["shape"]), f"its shape is {state['shape']!r}")
        if "nested_offset" in state:
            nested = (state["nested_blocksize"], state["nested_dtype"])
            self.require(
                nested == (NESTED_BLOCK_SIZE, "float32"),
                f"expected nested scales in blocks of {NESTED_BLOCK_SIZE} float32, got {nested}",
            )
            offset = state["nested_offset"]
            self.require(
                type(offset) is float and abs(offset) <= torch.finfo(torch.float32).max,
                f"its nested_offset is {offset!r}",
            )

    def require_nothing_left(self) -> None:
        left = sorted(self.unread - {self.name})
        self.require(not left, f"it comes with the unknown tensors {left}")


def _is_shape(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(type(length) is int and 0 < length < 2**48 for length in value)
    )
