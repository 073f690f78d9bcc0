"""A proof at start-up that packed examples do not see each other, on the attention in use.

    a a a a a a a a b b b b b b b b c c c c c c c c      one sequence of three examples
                    ↑ all tokens replaced: the losses of a and c must stay the same

Whether an attention honours the bounds depends on model, implementation and versions; transformers
does not say when one does not, and the loss looks normal. So it is tried, with the weights that are
trained and the code that trains them.
"""

import torch
from torch import Tensor, nn

from halfbyte.data.chat import IGNORE_INDEX
from halfbyte.data.loader import Batch
from halfbyte.errors import ConfigError
from halfbyte.train.loss import LanguageModel

_LENGTH = 8
# Masked terms are exact zeros, so what is computed is the same to the bit; this allows for kernels
# that add in another order from call to call.
_TOLERANCE = 1e-5


def prove_packing(parts: LanguageModel) -> str:
    """Return a line that says what was proven.

    Raises:
        ConfigError: replacing one packed example changes what is computed for another.
    """
    size = int(_embedding(parts.model).shape[0])
    names = ("before", "behind")
    model, attention = parts.model, attention_name(parts)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            first, second = (
                [float(parts.loss_sum(_packed(size, shift, learned))) for learned in (0, 2)]
                for shift in (0, 1)
            )
    finally:
        model.train(was_training)
    for name, before, after in zip(names, first, second, strict=True):
        if not abs(before - after) <= _TOLERANCE * abs(before):
            raise ConfigError(
                f"packed examples see each other on the attention {attention!r}: replacing one "
                f"example changed the loss of the one {name} it from {before:.6f} to {after:.6f}",
                hint="set attn_implementation to sdpa or flash_attention_2, or packing: false",
            )
    return f"packing: examples do not see each other on the attention {attention!r} (tried)"


def attention_name(parts: LanguageModel) -> str:
    """Return what the attention in use is called."""
    config = getattr(parts.model, "config", None)
    name = str(getattr(config, "_attn_implementation", None) or "eager")
    return f"fused {name}" if parts.is_fused else name


def _embedding(model: nn.Module) -> Tensor:
    weight: Tensor = model.get_input_embeddings().weight  # type: ignore[operator]
    return weight


def _packed(vocabulary: int, shift: int, learned: int) -> Batch:
    """Return three packed examples; `shift` replaces the middle one, `learned` has the labels."""
    ids = torch.arange(3 * _LENGTH) * 7 % vocabulary
    ids[_LENGTH : 2 * _LENGTH] = (ids[_LENGTH : 2 * _LENGTH] + 3 * shift) % vocabulary
    labels = torch.full_like(ids, IGNORE_INDEX)
    chosen = slice(learned * _LENGTH + 1, (learned + 1) * _LENGTH)
    labels[chosen] = ids[chosen]
    positions = torch.arange(_LENGTH).repeat(3)
    return Batch(ids[None], labels[None], positions[None], None, _LENGTH - 1, 3 * _LENGTH)
