"""One run from one YAML file: the parts' own settings, and which part owns which name.

    model: meta-llama/Meta-Llama-3-8B
    path: train.jsonl          # a bare key goes to the part that has it: here, data
    learning_rate: 2e-4
    lora:                      # or in its section
      r: 32
    quant: none                # the base in 16 bits

The same keys are `key=value` on the command line, values in YAML, and win over the file. Every
name belongs to one part only. Relative paths are relative to the current directory, not to the
file. There is no setting for a secret: tokens for the hub come from huggingface_hub's own login.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from halfbyte.data.config import DataConfig
from halfbyte.errors import ConfigError
from halfbyte.train.config import TrainConfig

if TYPE_CHECKING:  # settings are read without importing torch
    from peft import LoraConfig

    from halfbyte.quant.config import NF4Config

_SECTION = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
DTypeName = Literal["bfloat16", "float16", "float32"]
_COMMAND_LINE = "the command line"


class QuantSection(BaseModel):
    """How the base is held in 4 bits: the fields of `NF4Config`."""

    model_config = _SECTION

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

    model_config = _SECTION

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


class RunConfig(BaseModel):
    """Everything that a run needs."""

    model_config = _SECTION

    model: str
    """A folder, a name on the hub, or `demo` for the base that comes with Halfbyte."""
    device: str | None = None
    """`cuda`, `cuda:1` or `cpu`; by default the GPU where there is one."""
    dtype: DTypeName | None = None
    """What is not in 4 bits; by default what the device is good at."""
    attn_implementation: str | None = None
    """transformers' name of the attention code."""
    quant: QuantSection | None = Field(default_factory=QuantSection)
    """How the base is held in 4 bits; `none` leaves it in 16."""
    lora: LoraSection = Field(default_factory=LoraSection)
    """Which adapters are trained."""
    data: DataConfig = Field(default_factory=DataConfig)
    """What is trained on."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """How it is trained."""

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a YAML file; `overrides` are `key=value` texts that win over it.

        Raises:
            ConfigError: the file is missing or no YAML, a key is unknown, or a value is wrong.
        """
        values, lines = _read_yaml(Path(path))
        changes = dict(_parse_override(text) for text in overrides)
        places = {key: f"{path}, line {line}" for key, line in lines.items()}
        nested = _nest(values, places)
        for key, value in _nest(changes, {}).items():
            old = nested.get(key)
            if isinstance(value, dict) and isinstance(old, dict):
                value = {**old, **value}
            nested[key] = value
        return cls._build(nested, {**places, **dict.fromkeys(changes, _COMMAND_LINE)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a mapping laid out as the YAML file is.

        Raises:
            ConfigError: a key is unknown, or a value is wrong.
        """
        return cls._build(_nest(values, {}), {})

    @classmethod
    def _build(cls, nested: dict[str, Any], places: Mapping[str, str]) -> Self:
        if nested.get("quant") in ("none", False):
            nested["quant"] = None
        try:
            return cls.model_validate(nested)
        except ValidationError as error:
            raise _readable(error, places) from error

    @property
    def model_path(self) -> str:
        """The model's folder or hub name."""
        return resolve_model(self.model)

    def to_yaml(self) -> str:
        """Return every setting, defaults too, as YAML that `from_yaml` reads back."""
        values = self.model_dump(mode="json")
        values["quant"] = values["quant"] or "none"
        return yaml.safe_dump(values, sort_keys=False)


SECTIONS: dict[str, type[BaseModel]] = {
    "quant": QuantSection,
    "lora": LoraSection,
    "data": DataConfig,
    "train": TrainConfig,
}
OWNERS = {name: section for section, part in SECTIONS.items() for name in part.model_fields}
"""Setting to the section that owns it."""


def resolve_model(name: str) -> str:
    """Return the folder or hub name that `name` means: `demo` is the base inside the package."""
    if name != "demo":
        return name
    from halfbyte.demo.base import base_path

    return str(base_path())


def describe_settings() -> dict[str, list[tuple[str, str, str]]]:
    """Return (name, default, meaning) of every setting, by section."""
    parts: dict[str, type[BaseModel]] = {"": RunConfig, **SECTIONS}
    return {
        section or "run": [
            (name, _default_text(field), " ".join((field.description or "").split()))
            for name, field in part.model_fields.items()
            if section or name not in SECTIONS
        ]
        for section, part in parts.items()
    }


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    value = field.get_default(call_default_factory=True)
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def read_data_settings(settings: Iterable[str]) -> DataConfig:
    """Return the data section from `key=value` texts alone.

    Raises:
        ConfigError: a key is no data setting, or a value is wrong.
    """
    changes = dict(_parse_override(text) for text in settings)
    nested = _nest(changes, {})
    for section in nested:
        if section != "data":
            raise ConfigError(f"{', '.join(nested[section])} says nothing about the data")
    try:
        return DataConfig(**nested.get("data", {}))
    except ValidationError as error:
        raise _readable(error, dict.fromkeys(changes, _COMMAND_LINE)) from error


class _Loader(yaml.SafeLoader):
    """YAML where a key may stand once only, and 2e-4 is a number (YAML 1.2)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value in seen:
                problem = (
                    f"the key {getattr(key, 'value', None)!r} stands here twice, or is no name"
                )
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return a file's mapping, and the line on which each key (also `section.key`) stands."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}",
            hint="save it as UTF-8",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", hint="name a YAML file that exists"
        ) from error
    try:
        root = yaml.compose(text, Loader=_Loader)
        values = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {error.problem}", hint="mend the YAML") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{path} holds {'nothing' if values is None else type(values).__name__}, "
            "expected `key: value` lines",
            hint="begin with `model: ...` and `path: ...`",
        )
    return values, _lines(root)


def _lines(root: yaml.MappingNode) -> dict[str, int]:
    lines = {}
    for key, value in root.value:
        lines[key.value] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            for inner, _ in value.value:
                lines[f"{key.value}.{inner.value}"] = inner.start_mark.line + 1
    return lines


def _parse_override(text: str) -> tuple[str, Any]:
    """Split `key=value`; the value is YAML."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"expected key=value, got {text!r}", hint="write for example learning_rate=1e-4"
        )
    try:
        return key.strip(), yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"the value of {key} on {_COMMAND_LINE} is no YAML", hint="quote it for the shell"
        ) from error


def _nest(values: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """Give every key to the section that owns it."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, dot, inner = str(key).partition(".")
        if key in SECTIONS and isinstance(value, Mapping):
            for name, setting in value.items():
                _check_owner(str(name), key, places.get(f"{key}.{name}"))
                _put(nested, key, str(name), setting)
        elif key in RunConfig.model_fields:
            if key in nested and value is not None:
                raise ConfigError(f"{key} is given both as a section and as {value!r}")
            nested[key] = value
        elif dot and section in SECTIONS:
            _check_owner(inner, section, places.get(key))
            _put(nested, section, inner, value)
        else:
            _check_owner(str(key), None, places.get(key))
            _put(nested, OWNERS[key], key, value)
    return nested


def _put(nested: dict[str, Any], section: str, name: str, value: Any) -> None:
    part = nested.setdefault(section, {})
    if not isinstance(part, dict):
        raise ConfigError(
            f"{section}: {part} and {name} contradict each other",
            hint=f"leave {name} out, or give {section} as a section",
        )
    part[name] = value


def _check_owner(name: str, section: str | None, place: str | None) -> None:
    """Refuse a key that no section owns, or not this one."""
    owner = OWNERS.get(name)
    if owner is not None and section in (None, owner):
        return
    where = f" ({place})" if place else ""
    if owner is not None:
        raise ConfigError(
            f"{name} stands in the section {section}{where}, but belongs to {owner}",
            hint=f"move it to {owner}, or out of all sections",
        )
    names = [*RunConfig.model_fields, *OWNERS]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    raise ConfigError(
        f"unknown key {name!r}{where}",
        hint=f"did you mean {' or '.join(near)}?"
        if near
        else "`halfbyte train --help` lists every key",
    )


def _problems(error: ValidationError) -> list[Any]:
    """Return pydantic's findings, those of a section that raised on its own taken apart too."""
    found: list[Any] = []
    for problem in error.errors(include_url=False):
        raised = problem.get("ctx", {}).get("error")
        cause = getattr(raised, "__cause__", None)
        if isinstance(cause, ValidationError):
            inner = cause.errors(include_url=False)
            found += [{**each, "loc": (*problem["loc"], *each["loc"])} for each in inner]
        else:
            found.append(problem)
    return found


def _readable(error: ValidationError, places: Mapping[str, str]) -> ConfigError:
    """Say in one line each which setting is wrong, where it stands and why."""
    messages = []
    for problem in _problems(error):
        keys = [str(key) for key in problem["loc"]]
        name = keys[-1] if keys else "settings"
        place = next((places[key] for key in (".".join(keys[:2]), *keys) if key in places), None)
        where = f" ({place})" if place else ""
        if problem["type"] == "missing":
            messages.append(f"{name} is missing{where}")
        else:
            said = problem["msg"].removeprefix("Value error, ")
            messages.append(f"{'.'.join(keys)}{where}: {said}, got {problem['input']!r}")
    hint = "add it to the file, or as key=value" if messages[0].endswith("is missing") else None
    return ConfigError("; ".join(messages), hint=hint)
