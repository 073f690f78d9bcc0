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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo

from halfbyte.config.sections import FROZEN, DTypeName, LoraSection, QuantSection
from halfbyte.config.text import COMMAND_LINE, parse_override, read_yaml
from halfbyte.data.config import DataConfig
from halfbyte.errors import ConfigError, without_secrets
from halfbyte.train.config import TrainConfig

_ROW_NAMES = {"path", "name", "split", "eval_path", "eval_split", "eval_fraction"}


class RunConfig(BaseModel):
    """Everything that a run needs."""

    model_config = FROZEN

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
        values, lines = read_yaml(Path(path))
        changes = dict(parse_override(text) for text in overrides)
        places = {key: f"{path}, line {line}" for key, line in lines.items()}
        nested = _nest(values, places)
        for key, value in _nest(changes, {}).items():
            old = nested.get(key)
            if isinstance(value, dict) and isinstance(old, dict):
                value = {**old, **value}
            nested[key] = value
        return cls._build(nested, {**places, **dict.fromkeys(changes, COMMAND_LINE)})

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
    """Return the folder or hub name that `name` means.

    `demo` is the base inside the package; a folder becomes absolute, so that what is written about
    it holds wherever it is read.
    """
    if name != "demo":
        return str(Path(name).resolve()) if Path(name).is_dir() else name
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


def read_data_settings(settings: Iterable[str], *, as_in: Path | None = None) -> DataConfig:
    """Return the data section from `key=value` texts alone.

    Args:
        settings: The texts.
        as_in: A run's YAML file; if it is there, what does not name rows is taken from it.

    Raises:
        ConfigError: a key is no data setting, or a value is wrong.
    """
    changes = dict(parse_override(text) for text in settings)
    nested = _nest(changes, {})
    for section in nested:
        if section != "data":
            raise ConfigError(f"{', '.join(nested[section])} says nothing about the data")
    values = {}
    if as_in is not None and as_in.is_file():
        values = RunConfig.from_yaml(as_in).data.model_dump(exclude=_ROW_NAMES)
    try:
        return DataConfig(**{**values, **nested.get("data", {})})
    except ValidationError as error:
        raise _readable(error, dict.fromkeys(changes, COMMAND_LINE)) from error


def _nest(values: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """Give every key to the section that owns it."""
    _refuse_secrets(values, places)
    nested: dict[str, Any] = {}
    for key, value in values.items():
        section, dot, inner = str(key).partition(".")
        if key in SECTIONS and isinstance(value, Mapping):
            for name, setting in value.items():
                _check_owner(str(name), key, places.get(f"{key}.{name}"))
                _put(nested, key, str(name), setting)
        elif key == "data" and isinstance(value, str):
            _put(nested, "data", "path", value)  # as `halfbyte.train` takes a path for data
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


def _refuse_secrets(value: Any, places: Mapping[str, str], name: str = "") -> None:
    """Refuse access tokens and passwords: settings are printed, saved and sent to trackers."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_secrets(inner, places, f"{name}.{key}".removeprefix("."))
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_secrets(inner, places, name)
    elif isinstance(value, str) and without_secrets(value) != value:
        where = f" ({places[name]})" if name in places else ""
        raise ConfigError(
            f"{name}{where} holds a password or an access token, and settings are saved as text",
            hint="log in once with `hf auth login`, or set HF_TOKEN",
        )


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
