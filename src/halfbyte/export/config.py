"""How to merge."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset

from halfbyte.data.config import DataConfig
from halfbyte.errors import ConfigError
from halfbyte.quant.config import NF4Config

Form = Literal["dequantized", "original", "quantized"]
Onto = Literal["auto", "dequantized", "original", "quantized"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ONTO = ("auto", "dequantized", "original", "quantized")
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Settings of a merge.

    Raises:
        ConfigError: a setting has no such value.
    """

    onto: Onto = "auto"
    """dequantized: the base as training saw it through its 4 bits; original: the 16-bit one;
    quantized: the original one, and the sum is quantized again; auto: of the first two the one
    that is measured to be nearer to what was trained."""
    data: str | Path | DataConfig | Dataset | list[dict[str, Any]] | None = None
    """Rows to measure on: a path, a DataConfig (its held-out rows where it names some), rows, or
    rows that are tokenized; None measures nothing."""
    seed: int = 42
    """That of the run, which chose the held-out rows where `data` holds out a fraction."""
    base: str | Path | None = None
    """The base's folder or hub name, where it is not where training found it."""
    dtype: str | torch.dtype | None = None
    """dtype of the merged weights; by default that of the base's."""
    quant: NF4Config | None = None
    """How training held the base in 4 bits, where the adapter's folder does not say."""
    device: str | torch.device | None = None
    """Where sums are formed and models are measured; by default the GPU where there is one."""
    max_shard_size: str = "5GB"
    """Largest file of weights, such as 5GB or 500MB."""
    overwrite: bool = False
    """Replace the folder if it is there."""

    def __post_init__(self) -> None:
        if self.onto not in _ONTO:
            raise ConfigError(f"onto should be {', '.join(_ONTO)}, got {self.onto!r}")
        found = DTYPES.get(self.dtype) if isinstance(self.dtype, str) else self.dtype
        if self.dtype is not None and found not in DTYPES.values():
            raise ConfigError(f"dtype should be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        parse_size(self.max_shard_size)

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """`dtype` as torch's."""
        return DTYPES[self.dtype] if isinstance(self.dtype, str) else self.dtype

    @property
    def max_shard_bytes(self) -> int:
        """`max_shard_size` in bytes."""
        return parse_size(self.max_shard_size)


def parse_size(text: str) -> int:
    """Return the bytes in "500MB" or "2GiB".

    Raises:
        ConfigError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B", text.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise ConfigError(f"expected a size such as 5GB or 500MB, got {text!r}")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2].upper()])
