"""What the forward pass keeps for the backward pass: everything, or only each layer's input."""

from collections.abc import Mapping
from typing import Any

from halfbyte.errors import ConfigError


def checkpoint_activations(model: Any, options: Mapping[str, Any] | None = None) -> None:
    """Recompute each decoder layer in the backward pass instead of keeping its activations.

    Always torch's non-reentrant checkpointing: it gives the same gradients, also where a layer's
    input needs none, as below the first adapter. Dropout masks are replayed, so results do not
    change.

    Args:
        model: A transformers model, or a peft model around one.
        options: `gradient_checkpointing_kwargs` of TrainingArguments; `use_reentrant` has no
            effect.

    Raises:
        ConfigError: the architecture does not support it.
    """
    options = {**(options or {}), "use_reentrant": False}
    # transformers 5.2x renamed it and warns about the old name
    enable = getattr(model, "activation_checkpointing_enable", None)
    try:
        if enable is not None:
            enable(activation_checkpointing_kwargs=options)
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    except ValueError as error:
        raise ConfigError(
            f"{type(model).__name__} cannot recompute activations: {error}",
            hint="set gradient_checkpointing: false",
        ) from error
