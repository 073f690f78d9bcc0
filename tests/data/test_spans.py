"""What is learned is what the assistant said and its stop token, to the letter."""

import re
from pathlib import Path

import pytest
import trl

from halfbyte.data.chat import ChatEncoder
from halfbyte.data.formats import Example
from halfbyte.data.spans import Renderer
from halfbyte.errors import DataError

# Templates in the published style of each family, with their special tokens.
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}"
    "{% set system = messages[0]['content'] %}{% else %}{% set rest = messages %}"
    "{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system != false %}"
    "{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN25 = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Drops the reasoning of turns before the last question; the last turn always gets a think block.
QWEN3 = (
    "{%- set ns = namespace(last=0) %}{%- for message in messages %}"
    "{%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role == 'assistant' %}"
    "{%- set content = message.content %}{%- set reasoning = '' %}"
    "{%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last %}{{- '<|im_start|>assistant\\n<think>\\n'"
    " + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content }}{%- endif %}"
    "{%- if message.tool_calls %}{%- for call in message.tool_calls %}"
    "{{- '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}{%- endfor %}"
    "{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{{- '<|im_start|>user\\n<tool_response>\\n' + message.content"
    " + '\\n</tool_response><|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'system' %}\n"
    "{{ '<|system|>\n' + message['content'] + eos_token }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
# Ends a conversation with the EOS, but a turn with <|end|>.
PHI3 = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# The generation prompt ends in <think>, which no rendered turn has.
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|User|>' + message['content'] }}{% elif message['role'] == 'assistant' %}"
    "{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|Assistant|>' + content + '<|end_of_sentence|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# The last turn ends in <|return|>, an earlier one in <|end|> and without its reasoning.
GPT_OSS = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% if loop.last and message.thinking %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}"
    "{% endif %}{{ '<|start|>assistant<|channel|>final<|message|>' + message.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}{{ '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
COMMAND_R = (
    "{{ bos_token }}{% for message in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{% if message.role == 'assistant' %}{{ '<|CHATBOT_TOKEN|><|START_RESPONSE|>'"
    " + message.content.strip() + '<|END_RESPONSE|>' }}"
    "{% elif message.role == 'user' %}{{ '<|USER_TOKEN|>' + message.content.strip() }}"
    "{% else %}{{ '<|SYSTEM_TOKEN|>' + message.content }}{% endif %}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
TULU = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{% if not loop.last %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n'  + message['content'] + eos_token }}{% endif %}{% else %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
# No stop token anywhere.
FALCON = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n' }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Falcon: ' + message['content'] }}"
    "{% else %}{{ 'System: ' + message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nFalcon:' }}{% endif %}"
)
MARKED = (
    "{%- macro said(message) %}\n{%- generation -%}\n{{ message.content }}<|im_end|>\n"
    "{%- endgeneration -%}\n{%- endmacro %}{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}{%- if message.role == 'assistant' %}"
    "{{- said(message) }}{%- else %}{{- message.content + '<|im_end|>' }}{%- endif %}{{- '\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MARKED_WITHOUT_STOP = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' %}"
    "{% generation %}{{- message.content }}{% endgeneration %}{%- else %}{{- message.content }}"
    "{%- endif %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

IM = ("<|im_start|>", "<|im_end|>")
# name: (template, special tokens, eos, what a turn saying X teaches, system turns allowed,
#        rows of a conversation with three assistant turns)
FAMILIES = {
    "llama-2": (LLAMA2, (), "</s>", " X </s>", True, 1),
    "llama-3": (
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|end_of_text|>",
        "X<|eot_id|>",
        True,
        1,
    ),
    "qwen-2.5": (QWEN25, IM, "<|im_end|>", "X<|im_end|>", True, 1),
    "qwen-3": (QWEN3, IM, "<|im_end|>", "<think>\n\n</think>\n\nX<|im_end|>", True, 3),
    "gemma": (
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        "X<end_of_turn>",
        False,
        1,
    ),
    "mistral": (MISTRAL, ("[INST]", "[/INST]"), "</s>", "X</s>", False, 1),
    "zephyr": (ZEPHYR, (), "</s>", "X</s>", True, 1),
    "phi-3": (
        PHI3,
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        "X<|end|>",
        True,
        1,
    ),
    "deepseek-r1": (
        DEEPSEEK_R1,
        ("<|User|>", "<|Assistant|>"),
        "<|end_of_sentence|>",
        "X<|end_of_sentence|>",
        False,
        1,
    ),
    "gpt-oss": (
        GPT_OSS,
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
        "<|return|>",
        "<|channel|>final<|message|>X<|return|>",
        True,
        3,
    ),
    "command-r": (
        COMMAND_R,
        (
            "<|START_OF_TURN_TOKEN|>",
            "<|END_OF_TURN_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
        ),
        "<|END_OF_TURN_TOKEN|>",
        "<|START_RESPONSE|>X<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        True,
        1,
    ),
    "tulu": (TULU, (), "</s>", "X</s>", True, 1),
    "falcon": (FALCON, (), "<|endoftext|>", " X<|endoftext|>", True, 3),
    "marked": (MARKED, IM, "</s>", "X<|im_end|>", True, 1),
    "marked-without-stop": (MARKED_WITHOUT_STOP, IM, "</s>", "X<|im_end|>", True, 1),
}
each_family = pytest.mark.parametrize("family", FAMILIES)
THREE_TURNS = [
    {"role": "user", "content": "What is two plus two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And the s?"},
    {"role": "assistant", "content": "s"},
    {"role": "user", "content": "Where is\n\nParis?"},
    {"role": "assistant", "content": "In France.\n\nOr at 12345. \U0001f408"},
    {"role": "user", "content": "Thanks."},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def encoder_of(make_tokenizer, family, loss_on="assistant"):
    template, special, eos, *_ = FAMILIES[family]
    tokenizer = make_tokenizer(special=special, eos=eos, template=template)
    return ChatEncoder(tokenizer, None, loss_on=loss_on)


def encode(encoder, messages, tools=None):
    return encoder.encode([("row 1", Example(messages, tools))])[0]


@each_family
def test_every_assistant_turn_is_learned_to_the_letter(family, make_tokenizer, learned):
    encoder = encoder_of(make_tokenizer, family)
    *_, said, has_system, num_rows = FAMILIES[family]
    messages = [SYSTEM, *THREE_TURNS] if has_system else THREE_TURNS
    rows = encode(encoder, messages)
    texts = [text for row in rows for text in learned(encoder.tokenizer, row)]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    assert texts == [said.replace("X", answer) for answer in answers]
    assert len(rows) == num_rows


@each_family
def test_tokens_are_those_of_the_rendered_text(family, make_tokenizer):
    encoder = encoder_of(make_tokenizer, family)
    row = encode(encoder, THREE_TURNS[:2])[0]
    text = encoder.tokenizer.apply_chat_template(THREE_TURNS[:2], tokenize=False)
    decoded = encoder.tokenizer.decode(row.input_ids, skip_special_tokens=False)
    appended = "<|endoftext|>" if family == "falcon" else ""
    assert decoded == text + appended
    bos = encoder.tokenizer.bos_token_id
    assert row.input_ids.count(bos) == text.count("<s>") <= 1


@each_family
def test_completion_learns_the_last_turn_only(family, make_tokenizer, learned):
    encoder = encoder_of(make_tokenizer, family, "completion")
    said = FAMILIES[family][3]
    (row,) = encode(encoder, THREE_TURNS)
    assert learned(encoder.tokenizer, row) == [said.replace("X", THREE_TURNS[5]["content"])]


def test_the_prompt_is_what_serving_sends(make_tokenizer):
    for family, (_, _, _, _, _, _) in FAMILIES.items():
        if family == "deepseek-r1":  # there the prompt has a <think> that training text has not
            continue
        encoder = encoder_of(make_tokenizer, family, "completion")
        (row,) = encode(encoder, THREE_TURNS)
        first = next(i for i, label in enumerate(row.labels) if label != -100)
        prompt = encoder.tokenizer.apply_chat_template(
            THREE_TURNS[:5], add_generation_prompt=True, tokenize=False
        )
        assert encoder.tokenizer.decode(row.input_ids[:first]) == prompt, family


TRL = Path(trl.__file__).parent / "chat_templates"
# They take content as a list of images and texts only.
VISION = ("idefics3", "llava_next", "smolvlm")
SPECIAL = re.compile(
    r"<\|[A-Za-z_/0-9]+\|>|<\uff5c[^\uff5c\n]{1,40}\uff5c>|\[/?[A-Z_]{3,}\]"
    r"|<(?:start|end)_of_turn>|<turn\|>|<\|turn>|<eos>|<channel\|>|<\|channel>"
)


@pytest.mark.parametrize(
    "name",
    sorted(
        path.stem
        for path in TRL.glob("*.jinja")
        if not path.stem.removesuffix("_training").startswith(VISION)
    ),
)
def test_templates_that_trl_carries(name, make_tokenizer, learned):
    """Each family's own template, and trl's variant with markers, teach answers and stop tokens."""
    template = (TRL / f"{name}.jinja").read_text()
    special = tuple(sorted(set(SPECIAL.findall(template)) - {"<s>", "</s>"}))
    tokenizer = make_tokenizer(special=special, template=template)
    encoder = ChatEncoder(tokenizer, None, loss_on="assistant")
    answers = ("Four.", "Sat, 12345.", "In\n\nFrance \U0001f408")
    messages = [
        {"role": role, "content": content}
        for answer in answers
        for role, content in (("user", "What?"), ("assistant", answer))
    ]
    texts = [text for row in encode(encoder, messages) for text in learned(tokenizer, row)]
    assert len(texts) == 3
    for text, said in zip(texts, answers, strict=True):
        answer, stop = text.split(said)
        assert SPECIAL.sub("", stop).strip() in ("", "</s>")
        # What comes before it is the turn's own frame: a header, an empty think block.
        frame = SPECIAL.sub("", answer)
        assert re.sub(r"</?think>|assistant|final|to=user|\s", "", frame) == ""


def test_reasoning_is_learned_where_it_is_generated(make_tokenizer, learned):
    encoder = encoder_of(make_tokenizer, "qwen-3")
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"},
        {"role": "user", "content": "3 + 3?"},
        {"role": "assistant", "content": "6", "reasoning_content": "hard"},
    ]
    first, second = encode(encoder, messages)
    tokenizer = encoder.tokenizer
    assert learned(tokenizer, first) == ["<think>\neasy\n</think>\n\n4<|im_end|>"]
    assert learned(tokenizer, second) == ["<think>\nhard\n</think>\n\n6<|im_end|>"]
    assert "easy" not in tokenizer.decode(second.input_ids)


def test_tool_calls_are_learned_and_tool_results_are_not(make_tokenizer, learned):
    encoder = encoder_of(make_tokenizer, "qwen-3")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "It is 4."},
    ]
    (row,) = encode(encoder, messages)
    think = "<think>\n\n</think>\n\n"
    assert learned(encoder.tokenizer, row) == [
        think + '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
        think + "It is 4.<|im_end|>",
    ]


def test_all_learns_every_token_but_the_first(make_tokenizer):
    encoder = encoder_of(make_tokenizer, "llama-3", "all")
    (row,) = encode(encoder, THREE_TURNS)
    assert row.labels[0] == -100
    assert row.labels[1:] == row.input_ids[1:]
    assert "Thanks." in encoder.tokenizer.decode(row.input_ids)


def test_a_conversation_without_assistant_teaches_nothing(make_tokenizer):
    encoder = encoder_of(make_tokenizer, "llama-3")
    assert encode(encoder, [{"role": "user", "content": "hello"}]) == []
    assert encode(encoder, []) == []


def test_a_template_that_drops_what_the_assistant_says_is_refused(make_tokenizer):
    encoder = encoder_of(make_tokenizer, "deepseek-r1")
    messages = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"},
    ]
    with pytest.raises(DataError, match=r"row 1: the chat template drops part .* turn 2") as error:
        encode(encoder, messages)
    assert "keeps it" in error.value.hint


def test_tool_calls_and_reasoning_that_the_template_drops_are_refused(make_tokenizer):
    encoder = encoder_of(make_tokenizer, "llama-3")
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    for field, lost in (({"tool_calls": [call]}, "add"), ({"reasoning_content": "why"}, "why")):
        messages = [THREE_TURNS[0], {"role": "assistant", "content": "Four.", **field}]
        with pytest.raises(DataError, match=f"drops part .* turn 2: '{lost}'"):
            encode(encoder, messages)


def test_what_the_template_refuses_is_an_error_with_the_row(make_tokenizer):
    encoder = encoder_of(make_tokenizer, "gemma")
    with pytest.raises(DataError, match=r"row 1: .*System role not supported"):
        encode(encoder, [SYSTEM, *THREE_TURNS])
    encoder = encoder_of(make_tokenizer, "llama-2")
    with pytest.raises(DataError, match="must alternate"):
        encode(encoder, [THREE_TURNS[0], THREE_TURNS[0], THREE_TURNS[1]])


def test_a_template_whose_turns_cannot_be_found_is_refused(make_tokenizer):
    backwards = "{% for m in messages | reverse %}{{ m.content ~ loop.index }}{% endfor %}"
    renderer = Renderer(make_tokenizer(template=backwards), None, loss_on="assistant")
    with pytest.raises(DataError, match="where turn 2 begins cannot be told"):
        renderer.rows([THREE_TURNS[0], {"role": "assistant", "content": "xyz"}])


@pytest.mark.parametrize(
    ("template", "is_plain"),
    [
        (MARKED_WITHOUT_STOP, True),
        (MARKED, False),  # in a macro
        ("{% set x %}{% generation %}a{% endgeneration %}{% endset %}{{ x }}", False),
        ("{% filter trim %}{% generation %}a{% endgeneration %}{% endfilter %}", False),
    ],
)
def test_marks_are_compared_with_the_plain_text_where_they_could_change_it(
    template, is_plain, make_tokenizer
):
    renderer = Renderer(make_tokenizer(template=template), None, loss_on="assistant")
    assert renderer._marks_are_plain == is_plain


def test_marks_that_change_the_text_are_not_used(make_tokenizer, learned):
    # `trim` takes the space from the answer, but not from behind a mark.
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% filter trim %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfilter %}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    encoder = ChatEncoder(make_tokenizer(special=IM, template=template), None, loss_on="assistant")
    messages = [THREE_TURNS[0], {"role": "assistant", "content": "  Four. "}]
    (row,) = encode(encoder, messages)
    assert learned(encoder.tokenizer, row) == ["Four.<|im_end|>"]


def test_marks_have_the_scope_of_the_markers_they_stand_for(make_tokenizer):
    template = (
        "{% set x = 'outer' %}{% for m in messages %}{{ m.role }}:"
        "{% generation %}{% set x = 'inner' %}{{ m.content }}{% endgeneration %}{{ x }}\n"
        "{%- generation -%} {{ m.content }} {%- endgeneration -%}  .{% endfor %}"
    )
    tokenizer = make_tokenizer(template=template)
    renderer = Renderer(tokenizer, None, loss_on="assistant")
    text, spans = renderer._marked(THREE_TURNS[:2], None)
    assert text == tokenizer.apply_chat_template(THREE_TURNS[:2], tokenize=False)
    assert [text[a:b] for a, b in spans] == [
        turn["content"] for turn in THREE_TURNS[:2] for _ in range(2)
    ]


def test_stop_is_what_stays_when_a_turn_follows(make_tokenizer):
    stops = {name: encoder_of(make_tokenizer, name).renderer.stop for name in FAMILIES}
    assert stops["phi-3"] == "<|end|>"
    assert stops["llama-3"] == "<|eot_id|>"
    assert stops["mistral"] == "</s>"
    assert stops["qwen-3"] == "<|im_end|>"
    assert stops["gpt-oss"] == "<|return|>"
    assert stops["falcon"] is None


def test_template_may_not_leave_the_sandbox(make_tokenizer):
    escape = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    renderer = Renderer(make_tokenizer(template=escape), None, loss_on="assistant")
    with pytest.raises(DataError, match="unsafe"):
        renderer.rows(THREE_TURNS[:2])


def test_a_template_that_never_ends_is_stopped(make_tokenizer, monkeypatch):
    monkeypatch.setattr("halfbyte.data.sandbox.MAX_SECONDS", 0.2)
    endless = (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        "{{ messages[0].content }}"
    )
    renderer = Renderer(make_tokenizer(template=endless), None, loss_on="assistant")
    with pytest.raises(DataError, match=r"was stopped: it takes longer than 0\.2 s"):
        renderer.rows(THREE_TURNS[:2])


def test_a_rendering_unlike_that_of_transformers_is_refused(make_tokenizer, monkeypatch):
    tokenizer = make_tokenizer(template="{{ messages[0].content }}{{ eos_token }}")
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *_, **__: "other")
    renderer = Renderer(tokenizer, None, loss_on="assistant")
    with pytest.raises(DataError, match="in another way than Halfbyte: 'other'"):
        renderer.render(THREE_TURNS[:1])


def test_a_template_may_ask_for_the_time(make_tokenizer):
    template = "{{ strftime_now('%Y-%m-%d %f') }}{{ messages[0].content }}"
    renderer = Renderer(make_tokenizer(template=template), None, loss_on="assistant")
    assert re.match(r"\d{4}-\d\d-\d\d \d{6}What", renderer.render(THREE_TURNS[:1]))
