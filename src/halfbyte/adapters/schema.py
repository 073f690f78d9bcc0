"""What may stand in the JSON files of an adapter, which a stranger may have written.

peft takes what it finds: it imports the module that `megatron_core` names, allocates whatever rank
is asked for, and matches regular expressions that never end. Here every setting has the type that
peft writes, before peft sees it.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from halfbyte.errors import AdapterError

AGAIN = "save the adapter again, or copy it again from where it came"

_MAX_RANK = 1 << 16
_MAX_PATTERN_LENGTH = 4000
# Each further one multiplies the time by the length of a module's name.
_MAX_REPEATS = 6
_SCHEMA = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


def _ends_soon(pattern: str) -> str:
    """Refuse regular expressions that may take forever: repeated groups, or many repeats."""
    bare = re.sub(r"\\.", "e", pattern, flags=re.DOTALL)
    bare = re.sub(r"\[\^?\]?[^\]]*\]", "c", bare)
    repeats = len(re.findall(r"[*+{]", bare))
    if len(pattern) > _MAX_PATTERN_LENGTH or repeats > _MAX_REPEATS:
        raise ValueError(f"a pattern of {len(pattern)} letters repeats {repeats} times")
    if re.search(r"\)\s*[*+{]|\(\?[^:!=<]", bare):
        raise ValueError("a pattern repeats a group or sets flags")
    return pattern


_Pattern = Annotated[str, AfterValidator(_ends_soon)]
_Rank = Annotated[int, Field(ge=1, le=_MAX_RANK)]


class _Config(BaseModel):
    """The settings of adapter_config.json that decide what is built; peft checks the rest."""

    model_config = _SCHEMA

    r: _Rank = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    rank_pattern: dict[_Pattern, _Rank] | None = None
    alpha_pattern: dict[_Pattern, float] | None = None
    target_modules: _Pattern | list[str] | None = None
    exclude_modules: _Pattern | list[str] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: _Pattern | list[_Pattern] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_lora_weights: bool | str = True
    bias: Literal["none", "all", "lora_only"] = "none"
    fan_in_fan_out: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    base_model_name_or_path: str | None = None
    revision: str | None = None
    megatron_config: None = None
    layer_replication: None = None
    runtime_config: None = None


class _Fingerprint(BaseModel):
    model_config = _SCHEMA

    kept: str | None = None
    quantized: str | None = None
    quantization: (
        Annotated[
            str,
            Field(
                pattern=r"^(nf4|fp4)-(32|64|128|256|512|1024|2048|4096)-torch\.(bfloat16|float16|float32)$"
            ),
        ]
        | None
    ) = None


class _Base(BaseModel):
    model_config = _SCHEMA

    name_or_path: str | None = None
    fingerprint: _Fingerprint | None = None


class _Weights(BaseModel):
    model_config = _SCHEMA

    block_size: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
    dtype: Literal["bfloat16", "float16", "float32"]


class _Identity(BaseModel):
    """What Halfbyte writes beside an adapter."""

    model_config = _SCHEMA

    version: Literal[1] = 1
    base: _Base | None = None
    quantization: dict[str, Any] | None = None
    weights: _Weights | None = None


def check_config(content: dict[str, Any], path: Path) -> None:
    """Check adapter_config.json.

    Raises:
        AdapterError: a setting has another type than peft gives it, or could harm.
    """
    _check(_Config, content, path)


def check_identity(content: dict[str, Any], path: Path) -> None:
    """Check halfbyte.json.

    Raises:
        AdapterError: it is not what Halfbyte writes.
    """
    _check(_Identity, content, path)


def _check(schema: type[BaseModel], content: dict[str, Any], path: Path) -> None:
    try:
        schema.model_validate(content)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = ".".join(str(part) for part in first["loc"])[:80]
        raise AdapterError(
            f"{path} has settings that do not fit: {name}: {first['msg'].lower()}", hint=AGAIN
        ) from error
