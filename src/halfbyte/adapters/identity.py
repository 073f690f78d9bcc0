"""Tell one base model from another, whichever precision it is held in.

An adapter fits its base and nothing else, but on another base of the same shape it loads without
a word and answers nonsense. So a small fingerprint of the base travels with it: SHA-256 over
samples of

    kept        what no quantizer touches (embeddings, norms), the same in 4 and in 16 bits
    quantized   the packed codes, comparable where both bases are quantized alike

Samples are at most 4096 evenly spaced elements of a tensor, so an 8B model takes well under a
second. Adapters, trained copies and biases (which peft may train) do not count.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.quant.linear import NF4Linear

_SAMPLES = 4096
_ADAPTER_PARTS = ("lora_", "modules_to_save", "trainable_tokens")
_WRAPPERS = (".base_layer", ".original_module", ".token_adapter")


def base_fingerprint(model: nn.Module) -> dict[str, str] | None:
    """Return digests of the base below the adapters, or None where weights are not at hand.

    Keys: `kept`, and `quantized` with `quantization` (its settings) for a 4-bit base.
    """
    kept: list[tuple[str, Tensor]] = []
    quantized = hashlib.sha256()
    settings = ""
    for name, module in _base_modules(model):
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        if weight.is_meta or not _is_plain(weight):
            return None
        if isinstance(module, NF4Linear):
            value = module.quantized
            settings = f"{value.quant_type}-{value.block_size}-{value.dtype}"
            quantized.update(f"{name} {tuple(value.shape)}".encode() + _sample(weight))
        elif is_kept(module):
            kept.append((name, weight))
    found = {"kept": kept_fingerprint(kept)}
    if settings:
        found |= {"quantized": quantized.hexdigest(), "quantization": settings}
    return found


def quantized_format(model: nn.Module) -> dict[str, Any] | None:
    """Return what bitsandbytes' settings do not say of a 4-bit base; None for one in 16 bits.

    Keys: `block_size`, elements that share one scale, and `dtype`, that of the weights at the
    moment when they were quantized.
    """
    for _, module in _base_modules(model):
        if isinstance(module, NF4Linear) and module.is_quantized:
            value = module.quantized
            dtype = str(value.dtype).removeprefix("torch.")
            return {"block_size": value.block_size, "dtype": dtype}
    return None


def is_kept(module: nn.Module) -> bool:
    """Whether a module's weight counts as one that no quantizer touches."""
    weight = module._parameters.get("weight")
    return weight is not None and (isinstance(module, nn.Embedding) or weight.dim() == 1)


def kept_fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return the digest `kept` of a base whose tensors are on disk.

    Args:
        weights: Module names and weights of embeddings and norms, in the order of `named_modules`.
    """
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {tuple(weight.shape)}".encode() + _sample(weight))
    return digest.hexdigest()


def is_same_base(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two fingerprints can be of one base model."""
    if first.get("kept") != second.get("kept"):
        return False
    # Codes of float16 and float32 weights depend a little on the device that quantized them.
    is_comparable = first.get("quantization") == second.get("quantization") and str(
        first.get("quantization")
    ).endswith("bfloat16")
    return not is_comparable or first.get("quantized") == second.get("quantized")


def _base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the base's modules under the names that they have without adapters."""
    for name, module in model.named_modules():
        if not any(part in name for part in _ADAPTER_PARTS):
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            yield name.removeprefix("base_model.model."), module


def _is_plain(weight: Tensor) -> bool:
    return type(weight) in (Tensor, nn.Parameter)


def _sample(weight: Tensor) -> bytes:
    """Return the bytes of evenly spaced elements, rounded to bf16: any dtype may be loaded."""
    flat = weight.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    chosen = flat[::step][:_SAMPLES].cpu()
    if chosen.is_floating_point():
        chosen = chosen.to(torch.bfloat16).view(torch.int16)
    return chosen.contiguous().numpy().tobytes()
