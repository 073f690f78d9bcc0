"""An adapter, its base, and the ways in which the two can be put together."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from halfbyte.adapters.files import AdapterFiles, read_adapter_files
from halfbyte.device import resolve_device
from halfbyte.errors import AdapterError
from halfbyte.export.adapter import updates_by_tensor
from halfbyte.export.base import BaseWeights, Recipe
from halfbyte.export.config import Form, MergeConfig
from halfbyte.export.plan import Plan, make_plan
from halfbyte.export.record import check_base, find_base, recorded_recipe
from halfbyte.export.tensors import Merger
from halfbyte.models.skeleton import Skeleton, conv1d_weights, read_skeleton
from halfbyte.quant.config import NF4Config


@dataclass(frozen=True)
class Source:
    """What is merged.

    Attributes:
        adapter: The adapter's files, checked.
        folder: The base's folder.
        skeleton: The base without its weights.
        config: The settings.
    """

    adapter: AdapterFiles
    folder: Path
    skeleton: Skeleton
    config: MergeConfig

    @classmethod
    def find(cls, adapter: str | Path, config: MergeConfig) -> "Source":
        """Find and check both.

        Raises:
            AdapterError: the adapter is damaged, or was trained on another base.
            CheckpointError: the base cannot be found or read.
        """
        files = read_adapter_files(adapter, in_memory=False)
        folder = find_base(files, config.base)
        skeleton = read_skeleton(folder)
        check_base(files, skeleton)
        return cls(files, folder, skeleton, config)

    @property
    def is_packed(self) -> bool:
        """Whether the base is there in 4 bits only."""
        return bool(self.skeleton.packed)

    @cached_property
    def device(self) -> torch.device:
        """Where sums are formed and models are measured."""
        return resolve_device(self.config.device)

    @cached_property
    def recipe(self) -> Recipe | None:
        """How training held a 16-bit base in 4 bits; None if in 16, or if it is packed on disk.

        Raises:
            AdapterError: nothing says so.
        """
        if self.is_packed:
            return None
        if self.config.quant is not None:
            return Recipe(self.config.quant)
        return recorded_recipe(self.adapter)

    @cached_property
    def plan(self) -> Plan:
        """What becomes of which tensor."""
        updates = updates_by_tensor(self.adapter, conv1d_weights(self.skeleton.model))
        names = BaseWeights(self.skeleton).names
        return make_plan(names, self.skeleton, updates, self.adapter.config)

    @property
    def reference_quant(self) -> NF4Config | None:
        """How to load the base as training held it; None for 16 bits."""
        if self.is_packed:
            return NF4Config()  # what is in 4 bits on disk keeps its own settings
        return self.recipe.config if self.recipe else None

    def quant(self, form: Form) -> NF4Config | None:
        """Return how merged weights are held in 4 bits; None for plain ones."""
        if form != "quantized":
            return None
        recipe = None if self.is_packed else self.recipe
        return recipe.config if recipe else NF4Config()

    def merger(self, form: Form) -> Merger:
        """Return what makes the merged tensors.

        Raises:
            AdapterError: the form needs a base that is not there.
        """
        if form != "dequantized" and self.is_packed:
            raise AdapterError(
                f"onto={form} needs the 16-bit base, and the base is a 4-bit checkpoint",
                hint="say where the 16-bit one is with base=..., or use onto=dequantized",
            )
        return Merger(
            plan=self.plan,
            base=BaseWeights(
                self.skeleton, self.recipe if form == "dequantized" else None, self.device
            ),
            adapter=self.adapter,
            dtype=self.config.torch_dtype,
            quant=self.quant(form),
            device=self.device,
        )
