"""An Ollama Modelfile whose template is the one that was trained with.

Ollama has Go templates of its own and does not read the Jinja text in a GGUF file. Which shape the
Jinja template has is found by rendering it: what stands before and after each role's content, where
the system message goes, what asks for an answer. The shape is then rendered for other conversations
and must give the template's own text; a template that is more than such a shape is refused.
BOS is left out: Ollama puts it there, as the file says.
"""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from halfbyte.checkpoint.header import read_json
from halfbyte.errors import ConfigError, DataError
from halfbyte.export.config import MergeConfig
from halfbyte.generate.prompts import end_of_turn_id, rendered
from halfbyte.gguf.source import open_source

Message = dict[str, Any]
# generation_config.json's names to Ollama's.
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
_MARKS = ("Q1q", "Q2q", "Q3q", "Q4q", "Q5q", "Q6q")
_OTHERWISE = (
    "serve the GGUF file with llama.cpp (llama-server --jinja), which reads the template itself, "
    "or train with one of the named templates"
)


@dataclass(frozen=True)
class Shape:
    """What a chat template of the usual kind writes around contents.

    Args:
        opening: At the beginning, where there is no system message (a default one, often).
        system: Before and after the system message; None where the template refuses it.
        user: Before and after what the user says.
        assistant: Before and after what the assistant says.
        prompt: What asks for an answer.
        system_in_user: The system message stands in the first user turn, behind what begins it.
    """

    opening: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    prompt: str
    system_in_user: bool = False

    def render(self, messages: Sequence[Message]) -> str:
        """Return what the Go template writes, with the prompt for an answer at the end."""
        first, rest = messages[0], list(messages)
        system = str(first["content"]) if first["role"] == "system" else None
        if system is not None:
            rest = rest[1:]
        wrapped = "" if system is None or self.system is None else system.join(self.system)
        text = self.opening if system is None else ""
        if not self.system_in_user:
            text += wrapped
        for index, message in enumerate(rest):
            before, after = self.assistant if message["role"] == "assistant" else self.user
            inserted = wrapped if self.system_in_user and index == 0 else ""
            text += before + inserted + str(message["content"]) + after
        return text + self.prompt

    def go(self) -> str:
        """Return the Go template. Texts are Go strings, so that no space is lost."""
        field = "$.System"  # the same within `range` and outside
        system = "" if self.system is None else _go(self.system[0], field, self.system[1])
        start, inserted = "", ""
        if self.system_in_user:
            start = "{{ $first := true }}"
            inserted = (
                f"{{{{ if and $first {field} }}}}{system}{{{{ end }}}}{{{{ $first = false }}}}"
            )
        else:
            otherwise = f"{{{{ else }}}}{_go(self.opening)}" if self.opening else ""
            start = f"{{{{ if {field} }}}}{system}{otherwise}{{{{ end }}}}"
        user = _go(self.user[0]) + inserted + _go("", ".Content", self.user[1])
        assistant = (
            _go(self.assistant[0], ".Content")
            + f"{{{{ if not $last }}}}{_go(self.assistant[1])}{{{{ end }}}}"
        )
        return (
            start
            + "{{ range $i, $m := .Messages }}"
            + "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + f'{{{{ if eq .Role "user" }}}}{user}'
            + f'{{{{ else if eq .Role "assistant" }}}}{assistant}{{{{ end }}}}'
            + f'{{{{ if and $last (ne .Role "assistant") }}}}{_go(self.prompt)}{{{{ end }}}}'
            + "{{ end }}"
        )


def derive_shape(tokenizer: PreTrainedTokenizerBase) -> Shape:
    """Find the shape of a tokenizer's chat template by rendering it.

    Raises:
        ConfigError: there is no template, or it does more than put text around contents.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "there is no chat template to make an Ollama template of",
            hint="train with a chat_template; a model of plain text needs no Modelfile",
        )
    user, answer, again, system = _MARKS[:4]
    dialogue = [_user(user), _assistant(answer), _user(again)]
    before_user, after_user, after_answer, prompt = _split(tokenizer, dialogue, user, answer, again)
    plain = _render(tokenizer, [_user(user)], prompt=False)
    user_after = plain.partition(user)[2]
    prompt_text = prompt.removeprefix(user_after)
    has_system = _accepts_system(tokenizer)
    candidates = []
    for user_before, opening in _prefixes(before_user, after_answer):
        assistant_before = after_user.removeprefix(user_after)
        answer_after = after_answer.removesuffix(user_before)
        parts = (user_before, user_after), (assistant_before, answer_after), prompt_text
        if not has_system:
            candidates.append(Shape(opening, None, *parts))
            continue
        told = [_system(system), _user(user)]
        lead, _, tail = _render(tokenizer, told, prompt=False).partition(system)
        between = tail.partition(user)[0]
        if between.endswith(user_before):
            pair = lead, between.removesuffix(user_before)
            candidates.append(Shape(opening, pair, *parts))
        if lead.startswith(user_before):
            pair = lead.removeprefix(user_before), between
            candidates.append(Shape(opening, pair, *parts, system_in_user=True))
    for shape in candidates:
        if all(_agrees(tokenizer, shape, probe) for probe in _probes(has_system=has_system)):
            return shape
    raise ConfigError(
        "the chat template does more than put text around what is said, so there is no Ollama "
        "template that does the same",
        hint=_OTHERWISE,
    )


def write_modelfile(
    tokenizer: PreTrainedTokenizerBase,
    model: str,
    stops: Sequence[str],
    *,
    adapter: str | None = None,
    parameters: dict[str, float] | None = None,
) -> str:
    """Return the text of a Modelfile.

    Args:
        tokenizer: With the chat template that was trained with.
        model: The GGUF file, relative to the Modelfile, or a name that Ollama knows.
        stops: Texts that end an answer.
        adapter: An adapter's GGUF file.
        parameters: Ollama's names and values, such as temperature.

    Raises:
        ConfigError: the template has no counterpart in Ollama.
    """
    template = derive_shape(tokenizer).go()
    if '"""' in template:
        raise ConfigError("the chat template holds three quotes in a row, which ends a Modelfile's")
    lines = [f"FROM {model}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    lines += [f"PARAMETER {name} {value}" for name, value in (parameters or {}).items()]
    return "\n".join(lines) + "\n"


def modelfile_for(
    folder: str | Path, file: str, merge: MergeConfig | None = None, *, adapter_only: bool = False
) -> str:
    """Return the Modelfile for an exported file.

    Args:
        folder: What was exported.
        file: The GGUF file's name, beside the Modelfile.
        merge: How it was merged.
        adapter_only: The file is an adapter's; its base is to be there as base.gguf.

    Raises:
        ConfigError: the template has no counterpart in Ollama.
    """
    source = open_source(folder, merge, base_only=True)  # it has the adapter's tokenizer
    tokenizer = source.tokenizer
    ids = (end_of_turn_id(tokenizer), tokenizer.eos_token_id)
    stops = [
        str(tokenizer.convert_ids_to_tokens(index))
        for index in dict.fromkeys(ids)
        if index is not None
    ]
    path = source.folder / "generation_config.json"
    saved = read_json(path) if path.is_file() else {}
    parameters = {
        there: saved[name] for name, there in _PARAMETERS.items() if saved.get(name) is not None
    }
    if adapter_only:
        return write_modelfile(
            tokenizer, "./base.gguf", stops, adapter=f"./{file}", parameters=parameters
        )
    return write_modelfile(tokenizer, f"./{file}", stops, parameters=parameters)


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, prompt: bool
) -> str:
    """Return the text of messages, without BOS."""
    text = rendered(tokenizer, messages, add_generation_prompt=prompt)
    return text.removeprefix(tokenizer.bos_token or "")


def _split(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *marks: str
) -> list[str]:
    """Return what the template writes before, between and after the marks.

    Raises:
        ConfigError: it does not write each of them once, in order.
    """
    try:
        text = _render(tokenizer, messages, prompt=True)
    except DataError as error:
        raise ConfigError(error.message, hint=_OTHERWISE) from error
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found or mark in text:
            raise ConfigError(
                "the chat template does not write everything that is said once, in order",
                hint=_OTHERWISE,
            )
        parts.append(part)
    return [*parts, text]


def _prefixes(before_user: str, after_answer: str) -> list[tuple[str, str]]:
    """Return (what begins a user's turn, what opens the conversation), the likeliest first.

    The first ends both of: what is before the first turn, and what is before a later one.
    """
    common = ""
    for one, other in zip(reversed(before_user), reversed(after_answer), strict=False):
        if one != other:
            break
        common = one + common
    lengths = range(len(common), -1, -1)
    return [(common[len(common) - n :], before_user[: len(before_user) - n]) for n in lengths]


def _accepts_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    try:
        text = _render(tokenizer, [_system(_MARKS[0]), _user(_MARKS[1])], prompt=True)
    except DataError:
        return False
    return _MARKS[0] in text


def _probes(*, has_system: bool) -> list[list[Message]]:
    """Return conversations that a shape must render as the template does."""
    turns = [_user("one"), _assistant("two"), _user("three"), _assistant("four"), _user("five\n6")]
    probes = [turns[:count] for count in (1, 3, 5)]
    if has_system:
        probes += [[_system("Be brief."), *probe] for probe in probes]
    return probes


def _agrees(tokenizer: PreTrainedTokenizerBase, shape: Shape, messages: list[Message]) -> bool:
    return shape.render(messages) == _render(tokenizer, messages, prompt=True)


def _go(*parts: str) -> str:
    """Return Go actions that write texts; a part may be a field."""
    actions = []
    for part in itertools.filterfalse(lambda part: part == "", parts):
        is_field = part in ("$.System", ".Content")
        actions.append(f"{{{{ {part if is_field else json.dumps(part, ensure_ascii=False)} }}}}")
    return "".join(actions)
