"""Which layers of a model can carry adapters."""

from torch import nn
from transformers.pytorch_utils import Conv1D


def linear_module_names(model: nn.Module) -> list[str]:
    """Return the names of the linear layers, in 4 bits or not, without the output embedding.

    These are the layers that peft's `all-linear` adapts.

    Args:
        model: A model of transformers, or any module.
    """
    find_output = getattr(model, "get_output_embeddings", None)
    output = find_output() if find_output is not None else None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not output
    ]


def linear_suffixes(model: nn.Module) -> list[str]:
    """Return the last parts of those names, each once: what `target_modules` usually lists."""
    return sorted({name.rpartition(".")[2] for name in linear_module_names(model)})
