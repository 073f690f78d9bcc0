"""The same model with smaller adapters, for as long as it takes to plan it."""

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

_ATTENTION = ("attn", "attention")


@contextlib.contextmanager
def smaller_adapters(
    model: PeftModel, *, divisor: int = 1, targets: Collection[str] | None = None
) -> Iterator[None]:
    """Give the active adapter a smaller rank, or fewer layers, inside the block.

    Args:
        model: Real or on the meta device. Its own matrices are set aside and come back.
        divisor: What ranks are divided by.
        targets: Last names of the layers that keep an adapter; None means all of them.
    """
    adapter, found = model.active_adapter, list(_adapted(model))
    before = [(dict(x.lora_A), dict(x.lora_B), *_matrices(x, adapter)) for _, x in found]
    try:
        for name, layer in found:
            if targets is not None and name.rpartition(".")[2] not in targets:
                layer.lora_A.pop(adapter)
                layer.lora_B.pop(adapter)
            elif divisor > 1:
                a, b = _matrices(layer, adapter)
                rank = max(a.shape[0] // divisor, 1)
                layer.lora_A[adapter].weight = _empty(rank, a.shape[1], like=a)
                layer.lora_B[adapter].weight = _empty(b.shape[0], rank, like=b)
        yield
    finally:
        for (_, layer), (all_a, all_b, a, b) in zip(found, before, strict=True):
            for held, own in ((layer.lora_A, all_a), (layer.lora_B, all_b)):
                held.clear()
                held.update(own)
            layer.lora_A[adapter].weight, layer.lora_B[adapter].weight = a, b


def rank_of(model: PeftModel) -> int:
    """Return the largest rank of the active adapter's layers; 0 without any."""
    ranks = (layer.lora_A[model.active_adapter].weight.shape[0] for _, layer in _adapted(model))
    return max(ranks, default=0)


def target_names(model: PeftModel) -> tuple[list[str], list[str]]:
    """Return the last names of all adapted layers, and of those within attention."""
    names = [name for name, _ in _adapted(model)]
    inside = [n for n in names if any(part in n.rpartition(".")[0] for part in _ATTENTION)]
    return _last(names), _last(inside)


def _last(names: list[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _adapted(model: PeftModel) -> Iterator[tuple[str, Any]]:
    adapter = model.active_adapter
    for name, module in model.named_modules():
        has_it = isinstance(module, LoraLayer) and adapter in module.lora_A
        if has_it and isinstance(module.lora_A[adapter], nn.Linear):
            yield name, module


def _matrices(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def _empty(*shape: int, like: Tensor) -> nn.Parameter:
    """Return a parameter without values."""
    empty = torch.empty(shape, dtype=like.dtype, device="meta")
    return nn.Parameter(empty, requires_grad=like.requires_grad)
