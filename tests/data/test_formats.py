import json

import pytest

from halfbyte.data.formats import detect
from halfbyte.errors import DataError

USER, ASSISTANT = ({"role": r, "content": c} for r, c in (("user", "q"), ("assistant", "a")))


def read(row, format="auto", columns=None, system_prompt=None):
    layout = detect(format, columns or {}, row, system_prompt)
    return layout.format, layout.read(row, "row 7")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, ASSISTANT]}, "messages"),
        ({"conversations": [USER, ASSISTANT]}, "messages"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "sharegpt",
        ),
        ({"prompt": "q", "completion": "a"}, "prompt_completion"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_completion"),
        ({"instruction": "q", "output": "a"}, "alpaca"),
        ({"instruction": "q", "input": "", "output": "a", "text": "all"}, "alpaca"),
        ({"prompt": "q", "prompt_id": "1", "messages": [USER, ASSISTANT]}, "messages"),
    ],
)
def test_formats_are_told_by_their_columns(row, expected):
    name, example = read(row)
    assert name == expected
    assert example.messages == [USER, ASSISTANT]


def test_text_has_no_messages():
    name, example = read({"text": "once", "url": "x"})
    assert (name, example.text, example.messages) == ("text", "once", [])


def test_columns_map_other_names():
    row = {"question": "q", "answer": "a"}
    _, example = read(row, columns={"prompt": "question", "completion": "answer"})
    assert example.messages == [USER, ASSISTANT]
    _, example = read({"body": "once"}, columns={"text": "body"})
    assert example.text == "once"
    _, example = read({"chat": [USER, ASSISTANT]}, columns={"messages": "chat"})
    assert example.messages == [USER, ASSISTANT]


def test_alpaca_input_follows_the_instruction():
    _, example = read({"instruction": "Add", "input": "2, 2", "output": "4"})
    assert example.messages[0]["content"] == "Add\n2, 2"


def test_system_prompt_comes_first_unless_the_row_has_one():
    row = {"messages": [USER, ASSISTANT]}
    _, example = read(row, system_prompt="Be brief.")
    assert example.messages[0] == {"role": "system", "content": "Be brief."}
    own = [{"role": "system", "content": "own"}, USER, ASSISTANT]
    _, example = read({"messages": own}, system_prompt="Be brief.")
    assert example.messages == own
    _, example = read({"instruction": "q", "output": "a", "system": "row's"}, system_prompt="x")
    assert example.messages[0]["content"] == "row's"
    with pytest.raises(DataError, match="no place in plain text"):
        read({"text": "once"}, system_prompt="Be brief.")


def test_sharegpt_tools():
    turns = [
        {"from": "human", "value": "2 + 2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": null}}'},
        {"from": "observation", "value": "4"},
        {"from": "gpt", "value": "4."},
    ]
    tools = [{"name": "add"}]
    row = {"conversations": turns, "system": "s", "tools": json.dumps(tools)}
    _, example = read(row)
    assert [m["role"] for m in example.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    call = example.messages[2]["tool_calls"][0]["function"]
    assert call == {"name": "add", "arguments": {"a": None}}
    assert example.tools == tools


def test_turns_keep_what_templates_read_and_lose_nulls():
    turn = {"role": "assistant", "content": None, "tool_calls": [{"x": 1}], "name": None}
    _, example = read({"messages": [USER, turn]})
    assert example.messages[1] == {"role": "assistant", "tool_calls": [{"x": 1}]}


def test_text_parts_are_joined_and_images_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    _, example = read({"messages": [{"role": "user", "content": parts}]})
    assert example.messages[0]["content"] == "ab"
    with pytest.raises(DataError, match="'image'"):
        read({"messages": [{"role": "user", "content": [{"type": "image"}]}]})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "user", "content": None}]}, "row 7, turn 1: content must be text"),
        ({"messages": [{"role": "user", "content": 5}]}, "got int: 5"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "unknown role 'wizard'"),
        ({"messages": [{"content": "x"}]}, "unknown role None"),
        ({"messages": "hello"}, "row 7: expected a list of turns, got str"),
        ({"messages": ["hello"]}, "expected role and content, got str"),
        ({"prompt": 5, "completion": "a"}, "row 7: prompt must be text"),
        ({"prompt": "q", "completion": None}, "the column 'completion' is null"),
        ({"messages": [USER], "tools": "{"}, "tools are no JSON"),
        ({"messages": [USER], "tools": "5"}, "tools must be a list"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "call is no JSON"),
        ({"conversations": [{"from": "function_call", "value": "{}"}]}, "needs name"),
    ],
)
def test_rows_that_do_not_fit_are_named(row, message):
    with pytest.raises(DataError, match="row 7") as error:
        read(row)
    assert message in error.value.message


def test_a_later_row_without_the_columns_is_named_with_those_it_has():
    layout = detect("auto", {}, {"prompt": "q", "completion": "a"}, None)
    with pytest.raises(DataError, match="'completion' is missing; there are prompt, response"):
        layout.read({"prompt": "q", "response": "a"}, "row 3")


def test_unknown_columns_say_how_to_map_them():
    with pytest.raises(DataError, match="columns question, answer, which are no known") as error:
        detect("auto", {}, {"question": "q", "answer": "a"}, None)
    assert "{prompt: question, completion: answer}" in error.value.hint
    with pytest.raises(DataError, match="not those of 'alpaca'") as error:
        detect("alpaca", {}, {"question": "q"}, None)
    assert "instruction: <column>" in error.value.hint


def test_a_wrong_map_is_refused():
    row = {"question": "q", "answer": "a"}
    with pytest.raises(DataError, match="role 'promt'"):
        detect("auto", {"promt": "question"}, row, None)
    with pytest.raises(DataError, match="but the columns are question, answer"):
        detect("auto", {"prompt": "quest"}, row, None)
