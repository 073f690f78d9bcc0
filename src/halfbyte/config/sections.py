"""The settings that are written here because their owners are not pydantic: quantization, LoRA.

Data and training have their own, in `halfbyte.data.config` and `halfbyte.train.config`.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:  # settings are read without importing torch
    from peft import LoraConfig

    from halfbyte.quant.config import NF4Config

FROZEN = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
DTypeName = Literal["bfloat16", "float16", "float32"]


class QuantSection(BaseModel):
    """How the base is held in 4 bits: the fields of `NF4Config`."""

    model_config = FROZEN

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The sixteen levels: quantiles of a normal distribution, or 4-bit floats."""
    block_size: int = 64
    """Weights that share one scale."""
    double_quant: bool = True
    """Hold the scales in 8 bits too."""
    compute_dtype: DTypeName | None = None
    """What matrices are multiplied in; by default what the device is good at."""
    skip_modules: list[str] | None = None
    """Modules that keep 16 bits, besides the output embedding."""

    def build(self) -> "NF4Config":
        """Return the quantizer's own configuration."""
        from halfbyte.quant.config import NF4Config

        return NF4Config(**self.model_dump())


class LoraSection(BaseModel):
    """Which adapters are trained: fields of peft's `LoraConfig`."""

    model_config = FROZEN

    r: int = Field(default=16, ge=1)
    """Rank of the update."""
    lora_alpha: float = 32
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of a layer's inputs that are dropped before A, in training."""
    target_modules: str | list[str] = "all-linear"
    """Names, one regular expression, or `all-linear` (every one but the output embedding)."""
    exclude_modules: str | list[str] | None = None
    """Names or one regular expression that are left out."""
    layers_to_transform: int | list[int] | None = None
    """Only these layers, by number."""
    modules_to_save: list[str] | None = None
    """Modules that are trained whole and saved beside the adapter."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r)."""
    use_dora: bool = False
    """Train the length of each row apart from its direction."""
    rank_pattern: dict[str, int] = Field(default_factory=dict)
    """Other ranks for some modules."""
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    """Other alphas for some modules."""
    init_lora_weights: bool | str = True
    """How A and B begin: one of peft's names."""

    def build(self) -> "LoraConfig":
        """Return peft's configuration."""
        from peft import LoraConfig

        return LoraConfig(task_type="CAUSAL_LM", **self.model_dump())
