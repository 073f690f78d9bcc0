# ruff: noqa: RUF001 - DeepSeek writes its tokens with a fullwidth bar
"""The families' chat formats: what is learned is the assistant's text and stop token, as strings.

Each file in chat_templates/ writes a family's published format: its special tokens, its treatment
of system turns, tools and reasoning, and what it trims, strips, refuses or adds on its own.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from halfbyte.data.chat import ChatEncoder
from halfbyte.data.formats import Example
from halfbyte.errors import DataError

TEMPLATES = Path(__file__).parent / "chat_templates"
IM = ("<|im_start|>", "<|im_end|>")
HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
DEEPSEEK = (
    "<｜User｜>",
    "<｜Assistant｜>",
    *(
        f"<｜tool▁{name}｜>"
        for name in (
            "calls▁begin",
            "calls▁end",
            "call▁begin",
            "call▁end",
            "sep",
            "outputs▁begin",
            "outputs▁end",
            "output▁begin",
            "output▁end",
        )
    ),
)
THINK = "<think>\n\n</think>\n\n"
ARGUMENTS = '{"a": 2, "b": 2}'
DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
    f"{ARGUMENTS}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
)


@dataclass(frozen=True)
class Family:
    """What a family's format makes of an assistant's X.

    Args:
        special: Its special tokens.
        eos: The tokenizer's EOS.
        said: What an answer X teaches.
        call: What a call of add(a=2, b=2) teaches; empty where the format has no tools.
        why: What an answer X with the reasoning R teaches; empty where the format drops it.
        system: Whether it takes a system turn.
        trims: Whether it strips an answer's outer whitespace.
        rows: Rows of a conversation of three answers.
    """

    special: tuple[str, ...]
    eos: str
    said: str
    call: str = ""
    why: str = ""
    system: bool = True
    trims: bool = False
    rows: int = 1


FAMILIES = {
    "llama2": Family((), "</s>", " X </s>", trims=True),
    "llama3": Family(HEADERS, "<|end_of_text|>", "X<|eot_id|>", trims=True),
    "llama3_1": Family(
        HEADERS,
        "<|end_of_text|>",
        "X<|eot_id|>",
        call=f'{{"name": "add", "parameters": {ARGUMENTS}}}<|eot_id|>',
        trims=True,
    ),
    "llama4": Family(
        (
            "<|header_start|>",
            "<|header_end|>",
            "<|eot|>",
            "<|eom|>",
            "<|python_start|>",
            "<|python_end|>",
        ),
        "<|end_of_text|>",
        "X<|eot|>",
        call=f'<|python_start|>{{"name": "add", "parameters": {ARGUMENTS}}}<|python_end|><|eom|>',
        trims=True,
    ),
    "mistral": Family(
        (
            "[INST]",
            "[/INST]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_CALLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ),
        "</s>",
        " X</s>",
        call=f'[TOOL_CALLS] [{{"name": "add", "arguments": {ARGUMENTS}, "id": "abcdefghi"}}]</s>',
        trims=True,
    ),
    "mixtral": Family((), "</s>", " X</s>", system=False),
    "gemma2": Family(TURNS, "<eos>", "X<end_of_turn>", system=False, trims=True),
    "gemma3": Family(TURNS, "<eos>", "X<end_of_turn>", trims=True),
    "phi3": Family(
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", "X<|end|>"
    ),
    "phi4": Family((*IM, "<|im_sep|>"), "<|endoftext|>", "X<|im_end|>"),
    "qwen2_5": Family(
        IM,
        "<|im_end|>",
        "X<|im_end|>",
        call=f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call><|im_end|>',
    ),
    "qwen3": Family(
        IM,
        "<|im_end|>",
        f"{THINK}X<|im_end|>",
        call=(
            f'{THINK}<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call>'
            "<|im_end|>"
        ),
        why="<think>\nR\n</think>\n\nX<|im_end|>",
        rows=3,
    ),
    "chatml": Family(IM, "<|im_end|>", "X<|im_end|>"),
    "zephyr": Family((), "</s>", "X</s>"),
    "falcon": Family((), "<|endoftext|>", " X<|endoftext|>", rows=3),
    "deepseek_v3": Family(
        DEEPSEEK, "<｜end▁of▁sentence｜>", "X<｜end▁of▁sentence｜>", DEEPSEEK_CALL
    ),
    "deepseek_r1": Family(
        DEEPSEEK, "<｜end▁of▁sentence｜>", "X<｜end▁of▁sentence｜>", DEEPSEEK_CALL
    ),
    "command_r": Family(
        (
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
        ),
        "<|END_OF_TURN_TOKEN|>",
        "X<|END_OF_TURN_TOKEN|>",
        trims=True,
    ),
    "granite": Family(
        ("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        "<|end_of_text|>",
        "X<|end_of_text|>",
        call=f'<|tool_call|>[{{"name": "add", "arguments": {ARGUMENTS}}}]<|end_of_text|>',
    ),
    "olmo": Family((), "<|endoftext|>", "X<|endoftext|>"),
    "smollm": Family(IM, "<|im_end|>", "X<|im_end|>"),
    "gpt_oss": Family(
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
        "<|return|>",
        "<|channel|>final<|message|>X<|return|>",
        call=f" to=functions.add<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>",
        why=(
            "<|channel|>analysis<|message|>R<|end|>"
            "<|start|>assistant<|channel|>final<|message|>X<|return|>"
        ),
        rows=3,
    ),
    "hermes": Family(
        IM,
        "<|im_end|>",
        "X<|im_end|>",
        call=f'<tool_call>\n{{"name": "add", "arguments": {ARGUMENTS}}}\n</tool_call><|im_end|>',
    ),
}
each_family = pytest.mark.parametrize("name", FAMILIES)
SYSTEM = {"role": "system", "content": "Be brief."}
ANSWERS = ("Four.", "s", "In France.\n\nOr at 12345. \U0001f408")
TURNS_OF_THREE = [
    {"role": role, "content": content}
    for question, answer in zip(("2 + 2?", "And the s?", "Where is\n\nit?"), ANSWERS, strict=True)
    for role, content in (("user", question), ("assistant", answer))
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
WITH_TOOLS = [
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4", "name": "add"},
    {"role": "assistant", "content": "It is 4."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.fixture
def teach(make_tokenizer, learned):
    """Return what the rows of a conversation teach in a family's format."""

    def call(name, messages, tools=None):
        family = FAMILIES[name]
        template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        tokenizer = make_tokenizer(special=family.special, eos=family.eos, template=template)
        encoder = ChatEncoder(tokenizer, None, loss_on="assistant")
        (rows,) = encoder.encode([("row 1", Example(messages, tools))])
        return [learned(tokenizer, row) for row in rows]

    return call


def flat(rows):
    return [text for row in rows for text in row]


def test_there_are_at_least_twenty_families_and_each_is_tested():
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(FAMILIES)
    assert len(FAMILIES) >= 20


@each_family
def test_one_turn(name, teach):
    said = FAMILIES[name].said
    assert teach(name, TURNS_OF_THREE[:2]) == [[said.replace("X", "Four.")]]


@each_family
def test_many_turns_with_and_without_a_system_turn(name, teach):
    family = FAMILIES[name]
    expected = [family.said.replace("X", answer) for answer in ANSWERS]
    rows = teach(name, TURNS_OF_THREE)
    assert flat(rows) == expected
    assert len(rows) == family.rows
    # What the user says after the last answer is not taught, and changes nothing.
    assert flat(teach(name, [*TURNS_OF_THREE, {"role": "user", "content": "Bye."}])) == expected
    if family.system:
        assert flat(teach(name, [SYSTEM, *TURNS_OF_THREE])) == expected
    else:
        with pytest.raises(DataError, match="row 1: the chat template refuses"):
            teach(name, [SYSTEM, *TURNS_OF_THREE])


@each_family
def test_outer_whitespace_is_learned_as_it_is_served(name, teach):
    family = FAMILIES[name]
    messages = [TURNS_OF_THREE[0], {"role": "assistant", "content": "  Four.\n "}]
    answer = "Four." if family.trims else "  Four.\n "
    if name == "falcon":  # has no stop token: what is behind an answer cannot be told from it
        answer = "  Four.\n "
    assert flat(teach(name, messages)) == [family.said.replace("X", answer)]


@each_family
def test_tool_calls_are_learned_and_tool_results_are_not(name, teach):
    family = FAMILIES[name]
    if not family.call:
        with pytest.raises(DataError, match=r"row 1: .*(drops part|refuses)"):
            teach(name, WITH_TOOLS, TOOLS)
        return
    expected = [family.call, family.said.replace("X", "It is 4.")]
    assert flat(teach(name, WITH_TOOLS, TOOLS)) == expected


@each_family
def test_reasoning_is_learned_or_refused(name, teach):
    family = FAMILIES[name]
    answer = {"role": "assistant", "content": "Four.", "reasoning_content": "Two and two."}
    messages = [*TURNS_OF_THREE[:2], TURNS_OF_THREE[0], answer]
    if family.why:
        why = family.why.replace("R", "Two and two.").replace("X", "Four.")
        assert flat(teach(name, messages)) == [family.said.replace("X", "Four."), why]
    else:
        with pytest.raises(DataError, match="drops part of what the assistant says in turn 4"):
            teach(name, messages)


def test_reasoning_in_the_text_that_a_format_strips_is_refused(teach):
    thought = {"role": "assistant", "content": "<think>\neasy\n</think>\n\nFour."}
    with pytest.raises(DataError, match="drops part"):
        teach("deepseek_r1", [TURNS_OF_THREE[0], thought])
    assert flat(teach("deepseek_v3", [TURNS_OF_THREE[0], thought])) == [
        FAMILIES["deepseek_v3"].said.replace("X", thought["content"])
    ]


def test_two_calls_at_once_are_learned_or_refused(teach):
    messages = [WITH_TOOLS[0], {**WITH_TOOLS[1], "tool_calls": [CALL, CALL]}]
    call = FAMILIES["qwen2_5"].call.removesuffix("<|im_end|>")
    assert flat(teach("qwen2_5", messages, TOOLS)) == [f"{call}\n{call}<|im_end|>"]
    with pytest.raises(DataError, match="single tool-calls"):
        teach("llama3_1", messages, TOOLS)
