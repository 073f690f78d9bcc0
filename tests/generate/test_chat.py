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
    for command in ("/system", "/adapter", "/compare", "/reset", "/save", "/help", "/quit"):
        assert command in HELP
    assert talk(conversation, "/help") == HELP + "\n"
    for line in ("/adapter off", "/adapter", "/compare x"):
        assert "there is no adapter" in talk(conversation, line)


@pytest.fixture
def muted(adapted, taught, tokenizer):
    """The taught model under two adapters: `default` ends every answer at once, `plain` nothing."""
    adapted.add_adapter("plain", adapted.peft_config["default"])
    with torch.no_grad():
        layer = taught.lm_head
        layer.lora_B["plain"].weight.zero_()
        layer.lora_A["default"].weight.fill_(0.0)
        layer.lora_A["default"].weight[0, 0] = 1.0
        hidden = taught.model(torch.tensor([[1, 2, 3]])).last_hidden_state
        sign = 1.0 if hidden[0, -1, 0] > 0 else -1.0
        layer.lora_B["default"].weight[tokenizer.eos_token_id] = 1e4 * sign
    return adapted


def test_adapters_are_switched_by_name_and_off(muted, tokenizer):
    conversation = Conversation(muted, tokenizer)
    assert conversation.adapter == "default"
    assert "four" not in talk(conversation, "2+2?")
    shown = talk(conversation, "/reset", "/adapter off", "2+2?")
    assert shown.endswith("  default\n  plain\n* off\nfour\n")
    shown = talk(conversation, "/reset", "/adapter plain", "3+3?")
    assert shown.endswith("  default\n* plain\n  off\nsix and no more\n")
    assert "four" not in talk(conversation, "/reset", "/adapter default", "2+2?")
    assert "there is no adapter on; there are: default, plain" in talk(conversation, "/adapter on")
    assert talk(conversation, "/adapter list") == "* default\n  plain\n  off\n"


def test_answers_are_compared_side_by_side_and_forgotten(muted, tokenizer):
    conversation = Conversation(muted, tokenizer)
    lines = conversation.compare("2+2?", width=60).splitlines()
    assert lines[0].split() == ["base", "default", "plain"]
    assert lines[-1].startswith(" four") or lines[-1].startswith("  four")
    assert lines[-1].count("four") == 2  # default has no time to say it
    assert lines[-1].rindex("four") == lines[0].index("plain")
    assert conversation.messages == []
    assert "four" in talk(conversation, "/compare 2+2?")
    assert "say what" in talk(conversation, "/compare")
    assert "positions" in talk(conversation, "/compare " + "x" * 300)


def test_an_adapters_own_tokenizer_renders_its_prompts(muted, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nfo"
    conversation = Conversation(muted, tokenizer, tokenizers={"plain": own})
    assert talk(conversation, "/adapter plain", "3+3?").endswith("ur\n")


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
