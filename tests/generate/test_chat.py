"""The chat loop: answers, commands and the end, without a terminal."""

import copy
import json

import pytest
import torch

from halfbyte.generate.chat import HELP, Conversation, run_chat
from halfbyte.generate.sampling import Sampling


def talk(conversation, *lines):
    """Feed lines, then /quit; return all that was shown."""
    shown, waiting = [], [*lines, "/quit"]
    run_chat(conversation, lambda: waiting.pop(0), shown.append)
    return "".join(shown)


def test_it_answers_and_remembers(taught, tokenizer):
    conversation = Conversation(taught, tokenizer)
    assert talk(conversation, "2+2?", "", "/quit", "3+3?") == "four\n"
    assert conversation.messages == [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "four"},
    ]


def test_reset_and_system_forget(taught, tokenizer):
    conversation = Conversation(taught, tokenizer)
    talk(conversation, "2+2?", "/reset")
    assert conversation.messages == []
    talk(conversation, "2+2?", "/system be brief")
    assert conversation.prompt == [{"role": "system", "content": "be brief"}]
    talk(conversation, "/system")
    assert conversation.prompt == []


def test_save_writes_a_row_that_trains(taught, tokenizer, tmp_path):
    path = tmp_path / "said.jsonl"
    conversation = Conversation(taught, tokenizer, system="s")
    shown = talk(conversation, "2+2?", f"/save {path}", f"/save {path}", "/save")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["s", "s"]
    assert rows[0]["messages"][2]["content"] == "four"
    assert "say where" in shown
    assert "cannot be written" in talk(conversation, f"/save {tmp_path / 'no' / 'where'}")


def test_commands_that_are_not_there_and_help(taught, tokenizer):
    conversation = Conversation(taught, tokenizer)
    assert "no command /nope" in talk(conversation, "/nope")
    for command in ("/system", "/adapter", "/reset", "/save", "/help", "/quit"):
        assert command in HELP
    assert talk(conversation, "/help") == HELP + "\n"
    assert "there is no adapter" in talk(conversation, "/adapter off")


def test_the_adapter_is_switched_off_and_on(adapted, taught, tokenizer):
    # The adapter makes the stop token the likeliest: with it there is no answer.
    with torch.no_grad():
        layer = taught.lm_head
        layer.lora_A["default"].weight.fill_(0.0)
        layer.lora_A["default"].weight[0, 0] = 1.0
        hidden = taught.model(torch.tensor([[1, 2, 3]])).last_hidden_state
        sign = 1.0 if hidden[0, -1, 0] > 0 else -1.0
        layer.lora_B["default"].weight[tokenizer.eos_token_id] = 1e4 * sign
    conversation = Conversation(adapted, tokenizer)
    with_adapter = talk(conversation, "2+2?")
    shown = talk(conversation, "/reset", "/adapter off", "2+2?", "/adapter", "/adapter on")
    assert "four" not in with_adapter
    assert "the adapter is off\nfour\n" in shown
    assert shown.endswith("the adapter is off; /adapter on or off\nthe adapter is on\n")


def test_errors_are_shown_and_the_conversation_goes_on(taught, tokenizer):
    conversation = Conversation(taught, tokenizer)
    shown = talk(conversation, "x" * 300, "2+2?")
    assert "positions" in shown
    assert "/reset" in shown
    assert shown.endswith("four\n")


def test_an_interrupted_answer_is_kept_as_far_as_it_came(taught, tokenizer):
    conversation = Conversation(taught, tokenizer, Sampling(max_new_tokens=50))
    shown = []

    def write(piece):
        shown.append(piece)
        raise KeyboardInterrupt

    assert conversation.answer("3+3?", write) == shown[0]
    assert conversation.messages[-1] == {"role": "assistant", "content": shown[0]}


@pytest.mark.parametrize("end", [KeyboardInterrupt, EOFError])
def test_ctrl_c_and_ctrl_d_leave(taught, tokenizer, end):
    def read():
        raise end

    shown = []
    run_chat(Conversation(taught, tokenizer), read, shown.append)
    assert shown == ["\n"]


def test_without_a_template_each_line_is_continued(taught, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    line = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nfo"
    assert talk(Conversation(taught, bare), line) == "ur\n"


@pytest.mark.parametrize("field", ["system", "messages"])
def test_conversations_begin_empty(taught, tokenizer, field):
    assert not getattr(Conversation(taught, tokenizer), field)
