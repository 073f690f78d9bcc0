"""Rows to conversations: which columns hold what.

| format            | columns                                                                |
|-------------------|------------------------------------------------------------------------|
| messages          | messages: [{role, content, ...}], tools (optional)                     |
| sharegpt          | conversations: [{from, value}], system (optional), tools (optional)    |
| alpaca            | instruction, input (optional), output, system (optional)               |
| prompt_completion | prompt, completion: two texts, or two lists of messages                |
| text              | text                                                                   |

A `Layout` is found once for a data set; then every row is read by it, and a row that does not fit
is an error that names the row.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.errors import DataError

Message = dict[str, Any]

REQUIRED = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
OPTIONAL = {
    "messages": ("tools",),
    "sharegpt": ("system", "tools"),
    "prompt_completion": ("tools",),
    "alpaca": ("input", "system"),
    "text": (),
}
# Data sets call the list of turns by any of these; what its items look like decides the format.
_TURN_COLUMNS = ("messages", "conversations", "conversation", "dialog", "dialogue")
_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_call": "function_call",
}


@dataclass(frozen=True)
class Example:
    """One row, ready for a template: a conversation, or plain text.

    Args:
        messages: Turns with `role`, `content` and whatever else the template reads.
        tools: JSON schemas of the tools that the assistant may call.
        text: The document, where the format is `text` (then there are no messages).
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    text: str | None = None


@dataclass(frozen=True)
class Layout:
    """Which format a data set has, and the column of each role.

    Args:
        format: A key of `REQUIRED`.
        columns: Role to column, for the roles that are there.
        system_prompt: Put before conversations without a system message.
    """

    format: str
    columns: Mapping[str, str]
    system_prompt: str | None = None

    def read(self, row: Mapping[str, Any], where: str) -> Example:
        """Return the example in `row`.

        Raises:
            DataError: a column is missing or holds something else; the message begins with `where`.
        """
        values = self._values(row, where)
        if self.format == "text":
            return Example([], text=_text(values["text"], "text", where))
        if self.format in ("messages", "sharegpt"):
            messages = _turns(values[REQUIRED[self.format][0]], where)
        elif self.format == "alpaca":
            messages = _alpaca(values, where)
        else:
            messages = _prompt_completion(values, where)
        system = values.get("system") or self.system_prompt
        if system and not any(m["role"] in ("system", "developer") for m in messages):
            messages = [{"role": "system", "content": _text(system, "system", where)}, *messages]
        return Example(messages, tools=_tools(values.get("tools"), where))

    def _values(self, row: Mapping[str, Any], where: str) -> dict[str, Any]:
        values = {role: row.get(column) for role, column in self.columns.items()}
        for role in REQUIRED[self.format]:
            if values[role] is None:
                column = self.columns[role]
                state = "is null" if column in row else "is missing"
                raise DataError(
                    f"{where}: the column {column!r} {state}; there are {', '.join(row) or 'none'}",
                    hint=f"the data are read as {self.format!r}: mend or remove the row, "
                    "or set `format` and `columns`",
                )
        return values


def detect(
    setting: str, columns: Mapping[str, str], row: Mapping[str, Any], system_prompt: str | None
) -> Layout:
    """Return the layout of a data set from its first row.

    Args:
        setting: A format, or "auto".
        columns: Role to column, as the user set it.
        row: The first row.
        system_prompt: Passed on.

    Raises:
        DataError: no format fits, or `columns` names a role or column that is not there.
    """
    known = {role for roles in (REQUIRED, OPTIONAL) for some in roles.values() for role in some}
    for role, column in columns.items():
        if role not in known:
            raise DataError(
                f"`columns` has the role {role!r}; known roles are {', '.join(sorted(known))}"
            )
        if column not in row:
            raise DataError(
                f"`columns` says {role}: {column}, but the columns are {', '.join(row)}",
                hint="write it as {role: column}, e.g. {prompt: question, completion: answer}",
            )
    found = {role: columns.get(role, role) for role in known if columns.get(role, role) in row}
    _find_turns(found, row, columns)
    candidates = [setting] if setting != "auto" else list(REQUIRED)
    for name in candidates:
        if all(role in found for role in REQUIRED[name]):
            roles = (*REQUIRED[name], *OPTIONAL[name])
            chosen = {role: found[role] for role in roles if role in found}
            if name == "text" and system_prompt:
                raise DataError(
                    "system_prompt has no place in plain text", hint="leave system_prompt out"
                )
            return Layout(name, chosen, system_prompt)
    raise DataError(
        f"the first row has the columns {', '.join(row) or '(none)'}, "
        + ("which are no known format" if setting == "auto" else f"not those of {setting!r}"),
        hint=_how_to_map(candidates, row),
    )


def _find_turns(found: dict[str, str], row: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    """Give the list of turns to the format that its items have, whatever its column is called."""
    chosen = [columns[role] for role in ("messages", "conversations") if role in columns]
    for column in [*chosen, *_TURN_COLUMNS]:
        turns = row.get(column)
        if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
            is_sharegpt = any("from" in turn for turn in turns)
            found.pop("messages", None)
            found.pop("conversations", None)
            # An explicit `format` may ask for either name: both read both kinds of turn.
            found["conversations"] = column
            if not is_sharegpt:
                found["messages"] = column
            return


def _how_to_map(candidates: Sequence[str], row: Mapping[str, Any]) -> str:
    names = list(row) + ["<column>"] * 2
    if len(candidates) == 1:
        wanted = REQUIRED[candidates[0]]
        pairs = ", ".join(f"{role}: <column>" for role in wanted)
        return f"set `columns: {{{pairs}}}` to say which columns they are"
    example = f"{{prompt: {names[0]}, completion: {names[1]}}}"
    return f"say which columns they are, e.g. `columns: {example}`; formats: {', '.join(REQUIRED)}"


def _text(value: Any, name: str, where: str) -> str:
    if isinstance(value, str):
        return value
    raise DataError(
        f"{where}: {name} must be text, got {type(value).__name__}: {str(value)[:60]}",
        hint="write it in quotes, or choose another column with `columns`",
    )


def _alpaca(values: Mapping[str, Any], where: str) -> list[Message]:
    instruction = _text(values["instruction"], "instruction", where)
    extra = _text(values.get("input") or "", "input", where)
    return [
        {"role": "user", "content": f"{instruction}\n{extra}" if extra else instruction},
        {"role": "assistant", "content": _text(values["output"], "output", where)},
    ]


def _prompt_completion(values: Mapping[str, Any], where: str) -> list[Message]:
    messages: list[Message] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = values[name]
        if isinstance(value, list):
            messages += _turns(value, where)
        else:
            messages.append({"role": role, "content": _text(value, name, where)})
    return messages


def _turns(turns: Any, where: str) -> list[Message]:
    if not isinstance(turns, list):
        raise DataError(
            f"{where}: expected a list of turns, got {type(turns).__name__}: {str(turns)[:60]}"
        )
    return [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]


def _turn(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: expected role and content, got {type(turn).__name__}")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise DataError(
            f"{where}: unknown role {role!r}; known are {', '.join(_ROLES)}",
            hint="rename the role in the data",
        )
    role = _ROLES[role.lower()]
    content = turn.get("content", turn.get("value"))
    if role == "function_call":
        return _function_call(_text(content, "the function call", where), where)
    # Templates ask `'tool_calls' in message`: an absent field must not be there as null.
    extra = {k: v for k, v in turn.items() if k not in _TURN_KEYS and v is not None}
    if content is None and role == "assistant" and extra:
        return {"role": role, **extra}
    return {"role": role, "content": _content(content, where), **extra}


_TURN_KEYS = frozenset({"role", "from", "content", "value"})


def _content(content: Any, where: str) -> str:
    """Return the text of a turn; a list of text parts is joined."""
    if not isinstance(content, list):
        return _text(content, "content", where)
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(f"{where}: content holds {kind!r}; only text can be trained on")
        texts.append(_text(part.get("text"), "content", where))
    return "".join(texts)


def _function_call(value: str, where: str) -> Message:
    """Return ShareGPT's `function_call` turn as the assistant's tool calls."""
    try:
        calls = json.loads(value)
    except ValueError as error:
        raise DataError(f"{where}: the function call is no JSON: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise DataError(f"{where}: a function call needs name and arguments, got {value[:60]}")
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call} for call in calls],
    }


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the row's tools; many data sets keep them as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise DataError(f"{where}: tools are no JSON: {error}") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where}: tools must be a list of JSON schemas")
    return value
