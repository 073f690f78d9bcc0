"""The model of a run without its weights: built from config.json, on the meta device.

Layers are four-bit and adapted exactly as in the run, so what holds bytes there holds them here, as
shapes. Nothing is read but config.json, and nothing of the model takes memory.
"""

from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from torch import nn
from transformers.quantizers.base import HfQuantizer

from halfbyte.adapters.inject import add_lora
from halfbyte.models.skeleton import read_outline
from halfbyte.quant.config import NF4Config, to_dtype
from halfbyte.quant.linear import NF4Linear
from halfbyte.quant.quantizer import quantizable_modules
from halfbyte.quant.weight import QuantizedWeight

_NESTED_BLOCK = 256


def blueprint(
    folder: Path, *, quant: NF4Config | None, lora: peft.LoraConfig, dtype: torch.dtype | None
) -> PeftModel:
    """Return the adapted model of a run on the meta device.

    Args:
        folder: Has a config.json; what that says of 4 bits wins over `quant`, as in loading.
        quant: How linear layers are held; None for 16 bits.
        lora: The adapters.
        dtype: Of what is not in 4 bits; None takes float32 where config.json says so, else bfloat16
            (float16 becomes what a GPU multiplies well, as in loading).

    Raises:
        CheckpointError: config.json is missing, damaged or of no language model.
        ConfigError, AdapterError: the adapters' settings do not fit the model.
    """
    outline = read_outline(folder)
    said = to_dtype("dtype", getattr(outline.config, "dtype", None))
    is_wide = said is not None and said.itemsize > torch.bfloat16.itemsize
    model = outline.model.to(dtype or (said if is_wide else torch.bfloat16))
    if quant is not None and outline.quantization is not None:
        recipe = {k: v for k, v in outline.quantization.items() if not k.startswith("load_in")}
        quant = NF4Config(**{**recipe, "quant_method": None, "bnb_4bit_compute_dtype": None})
    if quant is not None:
        _quantize(model, quant)
    with torch.device("meta"):
        return add_lora(model, lora)


def _quantize(model: Any, quant: NF4Config) -> None:
    skipped = HfQuantizer.get_modules_to_not_convert(
        model, quant.skip_modules, model._keep_in_fp32_modules
    )
    for name, module in quantizable_modules(model, skipped):
        rows, columns = module.weight.shape
        if not isinstance(module, nn.Linear):  # Conv1D
            rows, columns = columns, rows
        layer = NF4Linear(columns, rows, module.bias is not None, dtype=module.weight.dtype)
        layer.quantized = empty_weight(torch.Size((rows, columns)), quant)
        model.set_submodule(name, layer)


def empty_weight(shape: torch.Size, quant: NF4Config) -> QuantizedWeight:
    """Return a 4-bit weight of this shape on the meta device."""

    def empty(count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    numel = shape.numel()
    blocks = -(-numel // quant.block_size)
    nested = quant.double_quant
    return QuantizedWeight(
        packed=empty((numel + 1) // 2, torch.uint8).unsqueeze(1),
        absmax=empty(blocks, torch.uint8 if nested else torch.float32),
        nested_absmax=empty(-(-blocks // _NESTED_BLOCK), torch.float32) if nested else None,
        nested_map=empty(256, torch.float32) if nested else None,
        offset=torch.empty((), device="meta") if nested else None,
        shape=shape,
        dtype=torch.bfloat16,
        block_size=quant.block_size,
        quant_type=quant.quant_type,
    )
