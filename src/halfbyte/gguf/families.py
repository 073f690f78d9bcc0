"""The architectures that can be exported, and how each one's weights and settings are written.

A family says what llama.cpp's graph expects where it differs from transformers' own: rows of q and
k interleaved for its rotary embedding, Gemma's norms with their 1 added. What llama.cpp has fixed
in its code (Gemma's pattern of windows, its attention scale) must be as in the model's settings, or
the export is refused: it would run, and say something else.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from gguf import MODEL_ARCH
from torch import Tensor
from transformers import PreTrainedConfig

from halfbyte.errors import CheckpointError
from halfbyte.gguf.rope import write_rope

_NOT_EXPORTED = "use the merged folder with transformers or vLLM"


def _interleave(weight: Tensor, heads: int) -> Tensor:
    """Put the two halves of each head's rows side by side: what ggml's rotation turns together."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


@dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        arch: llama.cpp's name for it.
        interleaves: Rows of q and k are interleaved.
        adds_one: Norms are stored without their 1.
        activation: The MLP's activation function.
        window_pattern: Of so many layers the last one attends to everything, the others to a
            window; 0 where every layer attends to everything.
        can_untie: The output may be another matrix than the embedding.
        large_layers: Number of layers of the one size with another attention scale.
    """

    arch: MODEL_ARCH
    interleaves: bool = False
    adds_one: bool = False
    activation: str = "silu"
    window_pattern: int = 0
    can_untie: bool = True
    large_layers: int = 0

    def convert(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """Return a tensor of the model as llama.cpp wants it.

        Args:
            name: Its name in transformers, `.weight` or `.bias` included.
            tensor: A weight or bias, or the B of an adapter on it, float32.
            config: Settings of the text model.
        """
        module = name.rpartition(".")[0]
        if self.interleaves and module.endswith("q_proj"):
            return _interleave(tensor, config.num_attention_heads)
        if self.interleaves and module.endswith("k_proj"):
            return _interleave(tensor, config.num_key_value_heads)
        if self.adds_one and module.endswith("norm"):
            return tensor + 1
        return tensor

    def check(self, config: PreTrainedConfig, *, is_tied: bool) -> None:
        """Refuse settings with which llama.cpp would compute something else.

        Raises:
            CheckpointError: names the setting.
        """
        activation = getattr(config, "hidden_activation", None) or config.hidden_act
        self._require("hidden_act", activation, self.activation)
        if not self.can_untie and not is_tied:
            raise CheckpointError(
                f"llama.cpp's {self.name} has one matrix for embedding and output, and this model "
                "has two: the adapter trained only one of them",
                hint="train without embed_tokens and lm_head, or with ensure_weight_tying",
            )
        if self.window_pattern:
            kinds = ["sliding_attention"] * (self.window_pattern - 1) + ["full_attention"]
            count = config.num_hidden_layers
            expected = (kinds * count)[:count]
            self._require("layer_types", list(config.layer_types), expected)
        if hasattr(config, "query_pre_attn_scalar"):
            is_large = config.num_hidden_layers == self.large_layers
            per_head = config.hidden_size // config.num_attention_heads
            scalar = per_head if is_large else config.head_dim
            self._require("query_pre_attn_scalar", config.query_pre_attn_scalar, scalar)

    def _require(self, setting: str, value: object, expected: object) -> None:
        if value != expected:
            raise CheckpointError(
                f"llama.cpp's {self.name} computes with {setting}={expected!r}, and this model has "
                f"{value!r}",
                hint=_NOT_EXPORTED,
            )

    @property
    def name(self) -> str:
        """llama.cpp's name of the architecture."""
        return gguf.MODEL_ARCH_NAMES[self.arch]


_GELU = "gelu_pytorch_tanh"
FAMILIES: Mapping[str, Family] = {
    "llama": Family(MODEL_ARCH.LLAMA, interleaves=True),
    "mistral": Family(MODEL_ARCH.LLAMA, interleaves=True),
    "qwen2": Family(MODEL_ARCH.QWEN2),
    "qwen3": Family(MODEL_ARCH.QWEN3),
    "phi3": Family(MODEL_ARCH.PHI3),
    "gemma": Family(MODEL_ARCH.GEMMA, adds_one=True, activation=_GELU, can_untie=False),
    "gemma2": Family(
        MODEL_ARCH.GEMMA2,
        adds_one=True,
        activation=_GELU,
        window_pattern=2,
        can_untie=False,
        large_layers=46,
    ),
    "gemma3_text": Family(
        MODEL_ARCH.GEMMA3, adds_one=True, activation=_GELU, window_pattern=6, large_layers=62
    ),
}


def find_family(config: PreTrainedConfig) -> Family:
    """Return the family of a model.

    Raises:
        CheckpointError: it cannot be exported; lists those that can.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise CheckpointError(
            f"models of the type {config.model_type!r} cannot be written as GGUF; those that can "
            f"are {', '.join(FAMILIES)}",
            hint=_NOT_EXPORTED,
        )
    return family


def write_settings(
    writer: gguf.GGUFWriter, family: Family, config: PreTrainedConfig
) -> dict[str, Tensor]:
    """Write the model's settings as metadata.

    Returns:
        Tensors that the settings become: factors of the rotary embedding, by name in the file.

    Raises:
        CheckpointError: a setting has no counterpart in llama.cpp.
    """
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    optional: dict[str, Callable[[Any], None]] = {
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
    }
    for setting, add in optional.items():
        if getattr(config, setting, None):
            add(float(getattr(config, setting)))
    if family.window_pattern or family.arch == MODEL_ARCH.PHI3:
        writer.add_sliding_window(config.sliding_window or 0)
    factors = write_rope(writer, config, head_dim(config))
    return {
        gguf.TENSOR_NAMES[kind] + ".weight": torch.tensor(values, dtype=torch.float32)
        for kind, values in factors.items()
    }


def head_dim(config: PreTrainedConfig) -> int:
    """Return the size of an attention head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def limits(config: PreTrainedConfig) -> list[str]:
    """Return what llama.cpp does otherwise with this model, a line each."""
    window = getattr(config, "sliding_window", None)
    uses_window = getattr(config, "use_sliding_window", True)
    if window and uses_window and window < config.max_position_embeddings:
        is_ours = FAMILIES[config.model_type].window_pattern
        if not is_ours:
            return [
                f"llama.cpp attends to everything where this model sees a window of {window:,} "
                "tokens: texts longer than that differ"
            ]
    return []
