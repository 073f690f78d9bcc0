"""Our attention under a name of its own in transformers, for training on a CPU.

`model.set_attn_implementation(NAME)` is all it takes. What the kernel does not compute (masks,
sliding windows, caches, dropout) goes to transformers' `sdpa`, which it equals up to rounding.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from halfbyte.kernels.attention import causal_attention

NAME = "halfbyte"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return the attention `[B, S, N, D]` of query `[B, N, S, D]`, key and value `[B, M, S, D]`.

    The arguments are those of transformers' attention functions.
    """
    is_causal = kwargs.get("is_causal")
    is_plain = (
        attention_mask is None
        and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and query.shape[2] == key.shape[2]
        and query.shape[-1] == value.shape[-1]
        and not kwargs.get("dropout")
        and kwargs.get("position_bias") is None
        and kwargs.get("softcap") is None
    )
    if not is_plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return causal_attention(query, key, value, scale=scale).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)


def use_cpu_attention(model: PreTrainedModel) -> bool:
    """Let a model on a CPU that uses transformers' `sdpa` train with our attention instead.

    Returns:
        Whether it does so now.
    """
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    return bool(model.config._attn_implementation == NAME)
