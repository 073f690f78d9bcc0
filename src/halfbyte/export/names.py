"""What the tensors of a checkpoint are called in the loaded model.

Adapters name modules of the model in memory; checkpoints may use older names (transformers renames
while loading), leave out the base model's prefix (GPT-2), or hold several tensors that become one
(fused experts). The model is built without memory and transformers' own mapping is asked.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import CheckpointError


@dataclass(frozen=True)
class TensorNames:
    """How a checkpoint and its model in memory name the same tensors.

    Args:
        in_checkpoint: Name in memory to name on disk, for tensors that load as they are.
        converted: Names in memory of tensors that are made from several on disk.
        tied: Name in memory of a tensor that is another's twin, to that other's name in memory.
        transposed: Modules whose weight is [in, out] (transformers' Conv1D).
    """

    in_checkpoint: dict[str, str]
    converted: frozenset[str]
    tied: dict[str, str]
    transposed: frozenset[str]


def empty_model(folder: Path) -> PreTrainedModel:
    """Build the causal language model of `folder` on the meta device: names, shapes, no memory.

    Raises:
        CheckpointError: config.json is missing or names a model that transformers does not know.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} is no causal language model that transformers can build: {error}",
            hint="the folder needs a config.json whose model_type transformers knows",
        ) from error


def tensor_names(model: PreTrainedModel, names: Iterable[str]) -> TensorNames:
    """Match the tensors of a checkpoint with those of `model` (which may be on the meta device)."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    in_checkpoint, converted = {}, set()
    for name in names:
        there, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if there not in state and name in state:
            there, pattern = rename_source_key(name, [], [], prefix, state)
        if pattern is not None:
            converted.add(there)
        elif there in state:
            in_checkpoint[there] = name
    transposed = {name for name, module in model.named_modules() if isinstance(module, Conv1D)}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return TensorNames(in_checkpoint, frozenset(converted), tied, frozenset(transposed))
