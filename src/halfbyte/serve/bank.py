"""Adapters on the model that is served: read, checked, and put into slots while it runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from halfbyte.adapters.files import AdapterFiles
from halfbyte.errors import AdapterError
from halfbyte.export.adapter import updates_by_tensor
from halfbyte.export.updates import LoraUpdate
from halfbyte.serve.layer import BatchedLoraLinear, Selection

_MERGE = "merge it (`halfbyte merge ADAPTER OUT`) and serve OUT as a model of its own"


@dataclass(frozen=True)
class LoraPair:
    """What an adapter adds to one layer: scaling · B A, with A `[R, I]` and B `[O, R]`."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


def read_pairs(found: AdapterFiles) -> dict[str, LoraPair]:
    """Return the adapter's pairs by the name of the module that each is for.

    rsLoRA, rank patterns and alpha patterns are in ranks and scalings.

    Raises:
        AdapterError: the adapter does more than add low-rank updates to linear layers.
    """
    pairs = {}
    for name, updates in updates_by_tensor(found).items():
        module, _, kind = name.rpartition(".")
        only = updates[0] if len(updates) == 1 else None
        if kind != "weight" or not isinstance(only, LoraUpdate) or only.magnitude is not None:
            raise AdapterError(
                f"the adapter in {found.folder} does more to {module} than plain LoRA "
                "(DoRA, trained biases, tokens or modules), which cannot be batched with others",
                hint=_MERGE,
            )
        pairs[module] = LoraPair(
            found.tensors[only.lora_A], found.tensors[only.lora_B], only.scaling
        )
    return pairs


class AdapterBank:
    """The slots of all adapters on one model, which it changes in place.

    A layer is wrapped when the first adapter for it comes, and stays so. Nothing here may run while
    the model does.

    Args:
        model: The base, without adapters.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._selection = Selection()
        self._layers: dict[str, BatchedLoraLinear] = {}
        self._free: list[int] = []
        self._num_slots = 1

    def check(self, pairs: dict[str, LoraPair], folder: Path) -> None:
        """Check that the model has a linear layer of the right size for every pair.

        Raises:
            AdapterError: names the first layer that does not fit.
        """
        for module, pair in pairs.items():
            found = _size(self._base_layer(module))
            wanted = (pair.lora_A.shape[1], pair.lora_B.shape[0])
            if found != wanted:
                has = "no linear layer" if found is None else f"one of {found[0]} to {found[1]}"
                raise AdapterError(
                    f"the adapter in {folder} is for a layer {module} of {wanted[0]} to "
                    f"{wanted[1]} features; the model has {has} there",
                    hint="serve it on the base that it was trained on",
                )

    def install(self, pairs: dict[str, LoraPair]) -> int:
        """Put a checked adapter into a free slot, and return it."""
        slot = self._free.pop() if self._free else self._grow()
        for module, pair in pairs.items():
            layer = self._layer(module)
            rank = max(layer.lora_A.shape[1], pair.lora_A.shape[0])
            if layer.lora_A.shape[:2] != (self._num_slots, rank):
                layer.resize(self._num_slots, rank)
            layer.put(slot, pair.lora_A, pair.lora_B, pair.scaling)
        return slot

    def remove(self, slot: int) -> None:
        """Empty a slot; another adapter may have it."""
        for layer in self._layers.values():
            layer.clear(slot)
        self._free.append(slot)

    def select(self, slots: Sequence[int]) -> None:
        """Say which slot each row of the next forward pass uses."""
        device = self._model.device
        self._selection.slots = torch.tensor(slots, device=device) if any(slots) else None

    def _grow(self) -> int:
        slot = self._num_slots
        self._num_slots *= 2
        self._free = list(range(self._num_slots - 1, slot, -1))
        for layer in self._layers.values():
            layer.resize(self._num_slots, layer.lora_A.shape[1])
        return slot

    def _base_layer(self, module: str) -> nn.Module | None:
        if module in self._layers:
            return self._layers[module].base_layer
        try:
            return self._model.get_submodule(module)
        except AttributeError:
            return None

    def _layer(self, module: str) -> BatchedLoraLinear:
        if module not in self._layers:
            base = cast(nn.Module, self._base_layer(module))
            in_features, out_features = cast(tuple[int, int], _size(base))
            layer = BatchedLoraLinear(
                base,
                self._selection,
                in_features,
                out_features,
                device=self._model.device,
                dtype=self._model.dtype,
            )
            layer.resize(self._num_slots, 0)
            self._model.set_submodule(module, layer)
            self._layers[module] = layer
        return self._layers[module]


def _size(module: Any) -> tuple[int, int] | None:
    """Return (in features, out features) of a linear layer, None for anything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return None
