"""How a model is to be held in four bits."""

import copy
from typing import Any

import torch
from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from halfbyte.errors import ConfigError
from halfbyte.kernels.nf4 import BLOCK_SIZES, QUANT_TYPES

METHOD = "halfbyte"

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "uint8": torch.uint8,
}
_ALIASES = {
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "bnb_4bit_quant_storage": "storage_dtype",
    "llm_int8_skip_modules": "skip_modules",
}
# What else stands in bitsandbytes' configuration; None means that no value matters here.
_CONSTANTS: dict[str, Any] = {
    "load_in_4bit": True,
    "_load_in_4bit": True,
    "load_in_8bit": False,
    "_load_in_8bit": False,
    "llm_int8_threshold": None,
    "llm_int8_has_fp16_weight": None,
    "llm_int8_enable_fp32_cpu_offload": None,
    "quant_method": None,
}


@register_quantization_config(METHOD)
class NF4Config(QuantizationConfigMixin):
    """Four-bit quantization as in QLoRA, for `from_pretrained(..., quantization_config=...)`.

    The names of bitsandbytes' configuration work too (`bnb_4bit_quant_type`, ...), so that a script
    changes one line. `to_dict` gives bitsandbytes' configuration: that is what stands in the
    config.json of a saved model, and what bitsandbytes and vLLM read.

    Args:
        quant_type: "nf4", levels at the quantiles of a normal distribution, or "fp4".
        block_size: Elements that share one scale: 32, 64, ... 4096.
        double_quant: Hold the scales in eight bits: 0.37 bits fewer for each element.
        compute_dtype: Dtype of the multiplication; None takes the dtype the model is loaded in.
        skip_modules: Modules that keep their precision, by transformers' rules. None skips the
            output embedding and tied weights; a list is taken as it stands.
        storage_dtype: Dtype of the packed codes in a checkpoint that bitsandbytes wrote.
            In memory, and in what is saved here, they are uint8.
        **bitsandbytes: The same settings under bitsandbytes' names.

    Raises:
        ConfigError: a setting is unknown or has a value that it cannot have.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        *,
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | str | None = None,
        skip_modules: list[str] | None = None,
        storage_dtype: torch.dtype | str | None = None,
        **bitsandbytes: Any,
    ) -> None:
        settings: dict[str, Any] = {
            "quant_type": quant_type,
            "double_quant": double_quant,
            "compute_dtype": compute_dtype,
            "skip_modules": skip_modules,
            "storage_dtype": storage_dtype,
        }
        for key, value in bitsandbytes.items():
            if key in _ALIASES:
                settings[_ALIASES[key]] = value
            elif key not in _CONSTANTS or _CONSTANTS[key] not in (None, value):
                raise ConfigError(
                    f"NF4Config cannot take {key}={value!r}",
                    hint="its settings are quant_type, block_size, double_quant, compute_dtype and "
                    "skip_modules, or bitsandbytes' names for them",
                )
        self.quant_method = METHOD  # type: ignore[assignment]  # registered methods are strings
        self.quant_type: str = settings["quant_type"]
        self.block_size = block_size
        self.double_quant: bool = settings["double_quant"]
        self.compute_dtype = to_dtype("compute_dtype", settings["compute_dtype"])
        self.skip_modules: list[str] | None = settings["skip_modules"]
        self.storage_dtype = to_dtype("storage_dtype", settings["storage_dtype"])
        self._check()

    def _check(self) -> None:
        if self.quant_type not in QUANT_TYPES:
            raise ConfigError(f"expected quant_type nf4 or fp4, got {self.quant_type!r}")
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError(f"expected a block_size of {BLOCK_SIZES}, got {self.block_size!r}")
        if not isinstance(self.double_quant, bool):
            raise ConfigError(f"expected double_quant true or false, got {self.double_quant!r}")
        names = self.skip_modules
        if names is not None and not (
            isinstance(names, list) and all(isinstance(name, str) and name for name in names)
        ):
            raise ConfigError(f"expected skip_modules to be a list of names, got {names!r}")

    @property
    def load_in_4bit(self) -> bool:
        """Always true; bitsandbytes' name for what this configuration does."""
        return True

    def to_dict(self) -> dict[str, Any]:
        """Return bitsandbytes' configuration of the same format, with every key it has."""
        compute_dtype = self.compute_dtype or torch.float32
        return {
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_compute_dtype": str(compute_dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": copy.copy(self.skip_modules),
            "llm_int8_threshold": 6.0,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "quant_method": "bitsandbytes",
        }


def to_dtype(name: str, value: torch.dtype | str | None) -> torch.dtype | None:
    """Return the dtype that `value` names.

    Raises:
        ConfigError: it is none that weights have.
    """
    dtype = _DTYPES.get(value.removeprefix("torch.")) if isinstance(value, str) else value
    if (value is not None and dtype not in _DTYPES.values()) or (
        name == "compute_dtype" and dtype is torch.uint8
    ):
        raise ConfigError(
            f"expected {name} to be bfloat16, float16 or float32, got {value!r}",
            hint="leave it out to take the dtype that the model is loaded in",
        )
    return dtype
