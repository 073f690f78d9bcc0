"""Which characters of a rendered conversation the assistant wrote.

A chat template is a program; where its output came from the assistant is found in one of three
ways, each checked against the template's own output, and never guessed:

1. The template marks it with `{% generation %}`. Each mark is a character that no text holds, so
   that it travels with the text; taken out again, the plain rendering must remain (checked for
   each row, unless the template's syntax tree shows that it cannot be otherwise).
2. The conversation up to the turn, with the generation prompt, is a prefix of the conversation
   through the turn. What follows the prefix is what the model is asked to write.
3. Where the generation prompt is not a prefix (some write `<think>` there), the turn is rendered
   again with other content: what comes before that content does not depend on it.

Turns are learned as they will be generated. A template that rewrites earlier turns (drops their
reasoning, or gives the stop token to the last one only) renders turn i differently once turn i+1
is there; then the conversation becomes several rows, each ending at the last turn that it learns:

    render(u1 a1)        = <u>u1<a>THINK a1<eot>
    render(u1 a1 u2 a2)  = <u>u1<a>a1<eot><u>u2<a>THINK a2<eot>
    rows                 = <u>u1<a>THINK a1<eot>                          a1 learned, and
                           <u>u1<a>a1<eot><u>u2<a>THINK a2<eot>           a2 learned
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import nodes
from transformers import PreTrainedTokenizerBase

from halfbyte.data.formats import Message
from halfbyte.data.sandbox import (
    MARK_END,
    MARK_START,
    TEMPLATE_ERRORS,
    parse,
    render_conversation,
)
from halfbyte.errors import DataError

# Noncharacters: Unicode keeps them for internal use, so they are in no text.
PROBE = "\ufdd2"
PRIVATE = re.compile("[\ufdd0-\ufdef]")
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_REASONING = ("reasoning_content", "thinking", "reasoning")

Span = tuple[int, int]


@dataclass(frozen=True)
class Rendered:
    """One row of training text.

    Args:
        text: What the template wrote.
        spans: Learned characters, ascending and disjoint, as [start, end).
        needs_eos: The template left no stop token at the end: one is appended, and learned.
    """

    text: str
    spans: tuple[Span, ...]
    needs_eos: bool = False


def added_tokens(tokenizer: PreTrainedTokenizerBase, *, special: bool) -> list[str]:
    """Return the texts of the added tokens (only the special ones, if asked), longest first."""
    tokens = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or not special
    }
    tokens.update(token for token in tokenizer.all_special_tokens if token)
    return sorted(tokens, key=lambda token: (-len(token), token))


class Renderer:
    """Renders conversations by a chat template, with the spans to learn.

    Args:
        tokenizer: Gives the special tokens, and the template where `template` is `None`.
        template: Jinja text.
        loss_on: "assistant" (every assistant turn), "completion" (the last one) or "all".
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str | None, *, loss_on: str
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.loss_on = loss_on
        self._special = frozenset(added_tokens(tokenizer, special=True))
        self._tokens = dict(tokenizer.special_tokens_map)
        self._is_compared = False
        tokens = added_tokens(tokenizer, special=False)
        self._token = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")

    def rows(self, messages: list[Message], tools: Any = None) -> list[Rendered]:
        """Return the rows that teach the assistant's turns of one conversation; none without any.

        Raises:
            DataError: the template refuses the conversation, drops what the assistant said, or
                hides where a turn begins.
        """
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            return []
        if self.loss_on == "all":
            return [self._everything(messages, tools)]
        messages = messages[: turns[-1] + 1]
        row = self._marked_row(messages, turns, tools)
        if row is not None:
            return [row]
        wanted = turns[-1:] if self.loss_on == "completion" else turns
        return _chain([self._turn(messages[: i + 1], tools) for i in wanted])

    def render(
        self,
        messages: list[Message],
        tools: Any = None,
        *,
        prompt: bool = False,
        marks: bool = False,
    ) -> str:
        """Return the conversation as text, as transformers' `apply_chat_template` would.

        Args:
            messages: Turns.
            tools: JSON schemas.
            prompt: Let the generation prompt follow.
            marks: Write marks around what the template says that the assistant writes.

        Raises:
            DataError: the template raised an error, or broke a limit of time or size.
        """
        variables = {
            **self._tokens,
            "messages": [_with_reasoning(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        if not messages:
            raise DataError("there is no message", hint="mend the conversation")
        text = render_conversation(self._source(tools), variables, marks=marks)
        if not (self._is_compared or marks or prompt):
            self._compare(text, variables["messages"], tools)
        return text

    def _source(self, tools: Any) -> str:
        """Return the Jinja text; a tokenizer may have another for conversations with tools."""
        return self.template or str(self.tokenizer.get_chat_template(tools=tools))

    def _compare(self, text: str, messages: list[Message], tools: Any) -> None:
        """Compare one rendering with that of the transformers which is installed.

        Raises:
            DataError: they differ, so the model would be served other text than it learned.
        """
        self._is_compared = True
        if "strftime_now" in self._source(tools):  # what it writes depends on the second
            return
        try:
            theirs = str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=self.template, tokenize=False
                )
            )
        except TEMPLATE_ERRORS as error:
            theirs = f"({error})"
        if theirs != text:
            raise DataError(
                "this transformers renders the chat template in another way than Halfbyte: "
                f"{theirs[:80]!r}, not {text[:80]!r}",
                hint="use another version of transformers, or another chat_template",
            )

    @cached_property
    def stop(self) -> str | None:
        """The token that ends an assistant turn, and stays there when a turn follows, if one does.

        Phi-3 ends turns with <|end|>, and a conversation with <|end|> and the EOS: <|end|> stops.
        """
        said = [{"role": "user", "content": "x"}, {"role": "assistant", "content": PROBE}]
        try:
            text = self.render(said)
            longer = self.render([*said, {"role": "user", "content": "x"}])
        except DataError:
            return None
        floor = text.rfind(PROBE) + 1
        following = longer[longer.rfind(PROBE) + 1 :]
        tokens = self._trailing_tokens(text, floor)
        kept = [(a, b) for a, b in tokens if following.startswith(text[floor:b])]
        return text[slice(*(kept or tokens)[-1])] if tokens else None

    @cached_property
    def _has_marks(self) -> bool:
        return _GENERATION.search(self._source(None)) is not None

    @cached_property
    def _marks_are_plain(self) -> bool:
        """Whether every mark goes straight to the output, so that it cannot change what is there.

        Inside a macro, a `set` block or a filter it might: `trim` stops at it.
        """
        tree = parse(self._source(None))
        kinds = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)
        return not any(
            isinstance(inner.call.node, nodes.ExtensionAttribute)
            for block in tree.find_all(kinds)
            for inner in block.find_all(nodes.CallBlock)
        )

    def _marked(self, messages: list[Message], tools: Any) -> tuple[str, list[Span]]:
        """Return the rendered text and its marked spans: none if the marks changed the text."""
        marked = self.render(messages, tools, marks=True)
        parts = re.split(f"([{MARK_START}{MARK_END}])", marked)
        text = "".join(parts[::2])
        if parts[1::2] != [MARK_START, MARK_END] * (len(parts) // 4):
            return text, []
        if not self._marks_are_plain and text != self.render(messages, tools):
            return text, []
        edges = list(itertools.accumulate(len(part) for part in parts[::2]))
        return text, [(a, b) for a, b in zip(edges[:-1:2], edges[1::2], strict=True) if a < b]

    def _marked_row(self, messages: list[Message], turns: list[int], tools: Any) -> Rendered | None:
        """Return the whole conversation as one row, if its markers fit its turns one to one."""
        if not self._has_marks:
            return None
        text, marks = self._marked(messages, tools)
        if len(marks) != len(turns):
            return None
        spans, needs_eos = [], False
        for turn, (start, end) in zip(turns, marks, strict=True):
            if needs_eos or _lost(messages[turn], text[start:end]):
                return None
            stop = self._stop_of_mark(text, start, end)
            needs_eos = stop is None
            spans.append((start, end if stop is None else stop))
        if self.loss_on == "completion":
            spans = spans[-1:]
        if needs_eos:
            text = text[: spans[-1][1]]
        return Rendered(text, tuple(spans), needs_eos)

    def _turn(self, messages: list[Message], tools: Any) -> Rendered:
        """Return the row that teaches the last message, an assistant's."""
        text = self.render(messages, tools)
        start = self._start(messages, tools, text)
        if lost := _lost(messages[-1], text[start:]):
            raise DataError(
                f"the chat template drops part of what the assistant says in turn {len(messages)}: "
                f"{lost[:60]!r}",
                hint="choose a chat_template that keeps it, or take it out of the data",
            )
        end = self._stop_end(text, start)
        if end is None:
            end = max(start, _content_end(text, messages[-1]))
            return Rendered(text[:end], ((start, end),), needs_eos=True)
        spans = self._marked(messages, tools)[1] if self._has_marks else []
        spans = [(max(a, start), min(b, end)) for a, b in spans if b > start and a < end]
        if spans:
            spans[-1] = (spans[-1][0], end)
        return Rendered(text, tuple(spans) or ((start, end),))

    def _start(self, messages: list[Message], tools: Any, text: str) -> int:
        """Return where in `text` the last message begins to be the assistant's own."""
        try:
            prompt = self.render(messages[:-1], tools, prompt=True)
        except DataError:  # many templates refuse an empty conversation
            prompt = None
        if prompt is not None and text.startswith(prompt):
            return len(prompt)
        probe = {k: v for k, v in messages[-1].items() if k not in ("tool_calls", *_REASONING)}
        header, found, tail = self.render(
            [*messages[:-1], {**probe, "content": PROBE}], tools
        ).partition(PROBE)
        if found and text.startswith(header) and not self._rest(tail):
            return len(header)
        raise DataError(
            f"where turn {len(messages)} begins cannot be told from the chat template's output",
            hint="choose a chat_template with {% generation %} markers, such as the named ones",
        )

    def _stop_end(self, text: str, start: int) -> int | None:
        """Return where the stop token at the end of `text` ends, or `None` if there is none."""
        tokens = self._trailing_tokens(text, start)
        for a, b in tokens:
            if text[a:b] == self.stop:
                return b
        special = [b for a, b in tokens if text[a:b] in self._special]
        return special[-1] if special else None

    def _stop_of_mark(self, text: str, start: int, end: int) -> int | None:
        """Return where the stop token in, or right behind, the marked text[start:end] ends."""
        inside = self._stop_end(text[:end], start)
        if inside is not None:
            return inside
        behind = len(text) - len(text[end:].lstrip())
        token = self._token.match(text, behind)
        if token and token.group() == self.stop:
            return token.end()
        return self._stop_end(text, end) if not self._rest(text[end:]) else None

    def _rest(self, text: str) -> str:
        """Return `text` without added tokens and whitespace."""
        return self._token.sub("", text).strip()

    def _trailing_tokens(self, text: str, floor: int) -> list[Span]:
        """Return the added tokens after `floor` with nothing but whitespace between and behind."""
        run: list[Span] = []
        limit = len(text)
        for match in reversed(list(self._token.finditer(text, floor))):
            if text[match.end() : limit].strip():
                break
            run.append(match.span())
            limit = match.start()
        return run[::-1]

    def _everything(self, messages: list[Message], tools: Any) -> Rendered:
        text = self.render(messages, tools)
        last = messages[-1]
        needs_eos = last["role"] == "assistant" and self._stop_end(text, 0) is None
        if needs_eos:
            text = text[: _content_end(text, last)]
        return Rendered(text, ((0, len(text)),), needs_eos)


def _with_reasoning(message: Message) -> Message:
    """Return a message with its reasoning under the names that templates read, as transformers."""
    said = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if said is None:
        return message
    return {"thinking": said, **message, "reasoning_content": said}


def _content_end(text: str, message: Message) -> int:
    """Return where the last message's text ends, less the whitespace that the template adds."""
    content = message.get("content") or ""
    end = text.rfind(content) + len(content) if content in text else 0
    return end if content and not text[end:].strip() else len(text.rstrip())


def _lost(message: Message, text: str) -> str | None:
    """Return something that the message says and `text` does not, whitespace apart."""
    said = [message.get("content"), *(message.get(name) for name in _REASONING)]
    calls = message.get("tool_calls") or []
    said += [call.get("function", call).get("name") for call in calls if isinstance(call, dict)]
    for part in said:
        if isinstance(part, str) and part not in text:
            squeezed = "".join(text.split())
            if "".join(part.split()) not in squeezed:
                return part
    return None


def _chain(rows: Sequence[Rendered]) -> list[Rendered]:
    """Join rows of one conversation wherever a row, up to its stop token, begins the next."""
    joined: list[Rendered] = []
    for row in rows:
        last = joined[-1] if joined else None
        end = last.spans[-1][1] if last else 0
        if (
            last
            and not last.needs_eos
            and row.spans[0][0] >= end
            and row.text.startswith(last.text[:end])
        ):
            joined[-1] = Rendered(row.text, last.spans + row.spans, row.needs_eos)
        else:
            joined.append(row)
    return joined
