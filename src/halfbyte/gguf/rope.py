"""The rotary embedding's settings as GGUF metadata and tensors.

llama.cpp knows linear and YaRN scaling by their numbers. Llama 3's scaling and Phi-3's LongRoPE are
tensors of one factor per frequency, by which it is divided.
"""

import math
from collections.abc import Mapping
from typing import Any

import gguf
from gguf import MODEL_TENSOR, RopeScalingType
from transformers import PreTrainedConfig

from halfbyte.errors import CheckpointError

Factors = dict[MODEL_TENSOR, list[float]]
_YARN = {"attention_factor", "beta_fast", "beta_slow", "original_max_position_embeddings"}


def write_rope(writer: gguf.GGUFWriter, config: PreTrainedConfig, head_dim: int) -> Factors:
    """Write what rotates q and k, and return the tensors of factors that go with it.

    Args:
        writer: Gets the metadata.
        config: Settings of the text model.
        head_dim: Size of an attention head.

    Raises:
        CheckpointError: llama.cpp has no such scaling.
    """
    every = config.rope_parameters
    local = every.get("sliding_attention")
    rope = every.get("full_attention", every)
    if local is not None:
        _check_local(local)
        writer.add_rope_freq_base_swa(float(local["rope_theta"]))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    rotated = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(rotated)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        return {MODEL_TENSOR.ROPE_FREQS: llama3_factors(rope, rotated)}
    if kind == "longrope":
        return _longrope(writer, rope, config)
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(_original_length(rope, config))
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        _yarn(writer, rope, config)
    elif kind != "default":
        raise CheckpointError(
            f"llama.cpp has no counterpart to rope_type={kind!r}; it has default, linear, llama3, "
            "yarn and longrope",
            hint="use the merged folder with transformers or vLLM",
        )
    return {}


def llama3_factors(rope: Mapping[str, Any], rotated: int) -> list[float]:
    """Return by what each frequency is divided: 1 for short wavelengths, `factor` for long ones."""
    factor, old_length = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for index in range(0, rotated, 2):
        turns = old_length / (2 * math.pi * rope["rope_theta"] ** (index / rotated))
        smooth = min(max((turns - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def _check_local(local: Mapping[str, Any]) -> None:
    if local.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"llama.cpp does not scale the windows' rotary embedding, and this model has {local!r}"
        )


def _original_length(rope: Mapping[str, Any], config: PreTrainedConfig) -> int:
    found = rope.get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    return int(found or config.max_position_embeddings)


def _longrope(
    writer: gguf.GGUFWriter, rope: Mapping[str, Any], config: PreTrainedConfig
) -> Factors:
    original = _original_length(rope, config)
    scale = rope.get("factor") or config.max_position_embeddings / original
    default = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_scaling_attn_factors(float(rope.get("attention_factor") or default))
    return {
        MODEL_TENSOR.ROPE_FACTORS_LONG: list(rope["long_factor"]),
        MODEL_TENSOR.ROPE_FACTORS_SHORT: list(rope["short_factor"]),
    }


def _yarn(writer: gguf.GGUFWriter, rope: Mapping[str, Any], config: PreTrainedConfig) -> None:
    factor = float(rope["factor"])
    known = _YARN | {"rope_type", "rope_theta", "factor"}
    odd = {name: value for name, value in rope.items() if value is not None and name not in known}
    attention = rope.get("attention_factor")
    if attention is not None and not math.isclose(attention, 0.1 * math.log(factor) + 1):
        odd["attention_factor"] = attention  # llama.cpp always takes the paper's
    if odd:
        raise CheckpointError(
            f"llama.cpp has no counterpart to these YaRN settings: {odd}",
            hint="use the merged folder with transformers or vLLM",
        )
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(_original_length(rope, config))
    if rope.get("beta_fast") is not None:
        writer.add_rope_scaling_yarn_beta_fast(float(rope["beta_fast"]))
    if rope.get("beta_slow") is not None:
        writer.add_rope_scaling_yarn_beta_slow(float(rope["beta_slow"]))
