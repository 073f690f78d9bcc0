"""Ollama's template writes what the trained template writes, or there is none."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from halfbyte.data.templates import NAMED
from halfbyte.errors import ConfigError
from halfbyte.gguf.modelfile import derive_shape, modelfile_for, write_modelfile

LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token }}[INST] {% if system and loop.first %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n"
    "{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
QWEN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Q.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>"
    "{% endif %}"
)
TEMPLATES = {
    **{name: template.jinja for name, template in NAMED.items()},
    "llama2": LLAMA2,
    "qwen": QWEN,
    "no system": NO_SYSTEM,
    "quotes": '{% for m in messages %}"{{ m.role }}" \\ {{ m.content }} ü{{ "{{" }}\n{% endfor %}',
}
BOMB = "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}"
each_template = pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)


def conversations(*, has_system):
    turns = [
        {"role": role, "content": f"{role} says {i}\nand {{{{ more }}}}"}
        for i, role in enumerate(["user", "assistant", "user", "assistant", "user"])
    ]
    plain = [turns[:count] for count in (1, 3, 5)]
    system = {"role": "system", "content": "Answer\tbriefly."}
    return plain + ([[system, *each] for each in plain] if has_system else [])


@pytest.fixture
def tokenizer(make_byte_level):
    found = make_byte_level()
    found.bos_token = "<|endoftext|>"
    return found


def expected(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text.removeprefix(tokenizer.bos_token)


@each_template
def test_the_shape_renders_as_the_template(tokenizer, template):
    tokenizer.chat_template = template
    shape = derive_shape(tokenizer)
    for messages in conversations(has_system=shape.system is not None):
        assert shape.render(messages) == expected(tokenizer, messages)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go, whose templates Ollama runs")
def test_go_renders_as_the_template(tokenizer, tmp_path):
    program = tmp_path / "render"
    main = Path(__file__).parent / "ollama" / "main.go"
    subprocess.run(["go", "build", "-o", program, main], check=True)
    for template in TEMPLATES.values():
        tokenizer.chat_template = template
        shape = derive_shape(tokenizer)
        chats = conversations(has_system=shape.system is not None)
        job = {"template": shape.go(), "conversations": chats}
        (tmp_path / "job.json").write_text(json.dumps(job))
        done = subprocess.run([program, tmp_path / "job.json"], capture_output=True, check=True)
        assert json.loads(done.stdout) == [expected(tokenizer, chat) for chat in chats]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{{ messages[-1].content }}",
        "{% for m in messages %}{{ loop.index }}: {{ m.content }}\n{% endfor %}",
        "{{ raise_exception('never') }}",
        None,
    ],
)
def test_what_is_more_than_a_shape_is_refused(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(ConfigError) as caught:
        derive_shape(tokenizer)
    assert caught.value.hint


def test_a_template_that_never_ends_is_stopped(tokenizer):
    tokenizer.chat_template = BOMB
    with pytest.raises(ConfigError, match="was stopped"):
        derive_shape(tokenizer)


def test_the_modelfile_names_file_stops_and_parameters(tokenizer):
    text = write_modelfile(
        tokenizer,
        "./base.gguf",
        ["<|im_end|>", 'a"b'],
        adapter="./a.gguf",
        parameters={"temperature": 0.7},
    )
    lines = text.splitlines()
    assert lines[:2] == ["FROM ./base.gguf", "ADAPTER ./a.gguf"]
    assert lines[2].startswith('TEMPLATE """{{ if $.System }}')
    assert lines[3:] == [
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop "a\\"b"',
        "PARAMETER temperature 0.7",
    ]
    assert "<|endoftext|>" not in text  # Ollama puts BOS where the file says so


def test_it_is_made_of_what_was_exported(make_model):
    folder = make_model("llama")
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"temperature": 0.6, "top_k": 20, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    text = modelfile_for(folder, "m.gguf")
    assert text.startswith("FROM ./m.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    assert "PARAMETER temperature 0.6\nPARAMETER top_k 20\n" in text
