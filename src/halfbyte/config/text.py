"""YAML as users write it: read strictly, with the line of every key.

A key may stand once only, 2e-4 is a number (YAML 1.2; PyYAML takes it for text), and there are no
anchors: a few lines of them can stand for more text than fits any memory.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from halfbyte.errors import ConfigError

COMMAND_LINE = "the command line"

_MAX_BYTES = 1 << 20
_MAX_STATES = 40
# What PyYAML's constructors raise for values that their tag does not fit, such as 2024-13-01.
_MISFITS = (ValueError, LookupError, AttributeError, TypeError, RecursionError)


class _Loader(yaml.SafeLoader):
    """YAML where a key may stand once only, 2e-4 is a number, and nothing has an anchor."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "anchors are not read", mark)
        if len(self.states) > _MAX_STATES:  # PyYAML's own; its time grows with the square of them
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, "brackets within brackets", mark)
        return super().compose_node(parent, index)

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


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Return a file's mapping, and the line on which each key (also `section.key`) stands.

    Raises:
        ConfigError: the file is missing, no UTF-8, no YAML, or no mapping.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}",
            hint="save it as UTF-8",
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}", hint="name a YAML file that exists"
        ) from error
    if len(raw) > _MAX_BYTES:
        raise ConfigError(f"{path} has more than {_MAX_BYTES} bytes, too many for settings")
    try:
        root, values = _parse(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: {error.problem}", hint="mend the YAML") from error
    except (yaml.YAMLError, *_MISFITS) as error:
        raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            f"{path} holds {'nothing' if values is None else type(values).__name__}, "
            "expected `key: value` lines",
            hint="begin with `model: ...` and `path: ...`",
        )
    return values, _lines(root)


def _parse(text: str) -> tuple[yaml.Node | None, Any]:
    """Return the one document in `text`, as nodes and as values."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        return root, None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _lines(root: yaml.MappingNode) -> dict[str, int]:
    lines = {}
    for key, value in root.value:
        lines[key.value] = key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            for inner, _ in value.value:
                lines[f"{key.value}.{inner.value}"] = inner.start_mark.line + 1
    return lines


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key=value`; the value is YAML.

    Raises:
        ConfigError: there is no `=`, or the value is no YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"expected key=value, got {text!r}", hint="write for example learning_rate=1e-4"
        )
    try:
        return key.strip(), _parse(value)[1]
    except (yaml.YAMLError, *_MISFITS) as error:
        raise ConfigError(
            f"the value of {key} on {COMMAND_LINE} is no YAML", hint="quote it for the shell"
        ) from error
