"""Chat templates: the named ones, and how a setting becomes one.

Each named template marks what the assistant writes, its stop token included, with
`{% generation %}`, so that masks need no inference. A template lists the tokens that it needs:
`<|im_end|>` spelled out of seven ordinary tokens would never be a stop.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from halfbyte.errors import DataError


@dataclass(frozen=True)
class NamedTemplate:
    """A chat template that comes with Halfbyte.

    Args:
        jinja: The template.
        needs: Tokens that the tokenizer's vocabulary must hold; `eos` stands for its own.
    """

    jinja: str
    needs: tuple[str, ...] = ("eos",)


CHATML = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}
{%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content | trim + '<|eot_id|>' }}{% endgeneration %}
{%- else %}
{{- message.content | trim + '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

ZEPHYR = """\
{{- bos_token }}
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + eos_token }}{% endgeneration %}
{%- else %}
{{- message.content + eos_token }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}"""

GEMMA = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- set ns.system = message.content | trim + '\\n\\n' %}
{%- elif message.role == 'assistant' %}
{{- '<start_of_turn>model\\n' }}
{%- generation %}{{- message.content | trim + '<end_of_turn>' }}{% endgeneration %}{{- '\\n' }}
{%- else %}
{{- '<start_of_turn>' + message.role + '\\n' + ns.system + message.content | trim }}
{{- '<end_of_turn>\\n' }}
{%- set ns.system = '' %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

PHI3 = """\
{%- for message in messages %}
{{- '<|' + message.role + '|>\\n' }}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + '<|end|>' }}{% endgeneration %}
{%- else %}
{{- message.content + '<|end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}"""

MISTRAL = """\
{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- set ns.system = message.content + '\\n\\n' %}
{%- elif message.role == 'assistant' %}
{%- generation %}{{- ' ' + message.content + eos_token }}{% endgeneration %}
{%- else %}
{{- '[INST] ' + ns.system + message.content + ' [/INST]' }}
{%- set ns.system = '' %}
{%- endif %}
{%- endfor %}"""

ALPACA = """\
{{- bos_token }}
{%- set ns = namespace(system='Below is an instruction that describes a task. \
Write a response that appropriately completes the request.') %}
{%- for message in messages %}
{%- if message.role == 'system' %}
{%- set ns.system = message.content %}
{%- elif message.role == 'assistant' %}
{{- '### Response:\\n' }}
{%- generation %}{{- message.content + eos_token }}{% endgeneration %}{{- '\\n\\n' }}
{%- else %}
{%- if ns.system %}{{- ns.system + '\\n\\n' }}{% set ns.system = '' %}{% endif %}
{{- '### Instruction:\\n' + message.content + '\\n\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\\n' }}{% endif %}"""

VICUNA = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'system' %}
{{- message.content + '\\n\\n' }}
{%- elif message.role == 'assistant' %}
{{- 'ASSISTANT:' }}
{%- generation %}{{- ' ' + message.content + eos_token }}{% endgeneration %}{{- '\\n' }}
{%- else %}
{{- 'USER: ' + message.content + '\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{% endif %}"""

PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{%- generation %}{{- message.content + eos_token }}{% endgeneration %}
{%- else %}
{{- message.content }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}"""

NAMED = {
    "alpaca": NamedTemplate(ALPACA),
    "chatml": NamedTemplate(CHATML, ("<|im_start|>", "<|im_end|>")),
    "gemma": NamedTemplate(GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "llama3": NamedTemplate(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": NamedTemplate(MISTRAL),
    "phi3": NamedTemplate(PHI3, ("<|user|>", "<|assistant|>", "<|end|>")),
    "plain": NamedTemplate(PLAIN),
    "vicuna": NamedTemplate(VICUNA),
    "zephyr": NamedTemplate(ZEPHYR),
}


def missing_tokens(template: NamedTemplate, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return those tokens that `template` needs and `tokenizer` lacks."""
    vocabulary = tokenizer.get_vocab()
    has_eos = tokenizer.eos_token is not None
    return [
        token
        for token in template.needs
        if not (has_eos if token == "eos" else token in vocabulary)
    ]


def fitting(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the names of the templates whose tokens `tokenizer` has."""
    return [name for name, template in NAMED.items() if not missing_tokens(template, tokenizer)]


def resolve_template(setting: str | None, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the Jinja text that `setting` means, or `None` for the tokenizer's own template.

    Args:
        setting: A name of `NAMED`, a path, Jinja text, or `None`.
        tokenizer: Whose own template is the default.

    Raises:
        DataError: there is no such template, the tokenizer lacks its tokens, or neither the
            setting nor the tokenizer has one.
    """
    if setting is None:
        if tokenizer.chat_template:
            return None
        raise DataError(
            "the data are conversations, but this tokenizer has no chat template "
            "(base models often have none)",
            hint="set `chat_template` to one of "
            f"{', '.join(fitting(tokenizer))}, to a .jinja file, or train the instruct model",
        )
    if setting in NAMED:
        return _named(setting, tokenizer)
    if "{%" in setting or "{{" in setting:
        return setting
    return _from_file(Path(setting), tokenizer)


def _named(name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if missing := missing_tokens(NAMED[name], tokenizer):
        raise DataError(
            f"the chat template {name!r} needs the tokens {', '.join(missing)}, "
            "which this tokenizer does not have",
            hint=f"use one that it has the tokens for: {', '.join(fitting(tokenizer))}",
        )
    return NAMED[name].jinja


def _from_file(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    choose = f"the named ones that fit are {', '.join(fitting(tokenizer))}"
    if not path.is_file():
        raise DataError(
            f"chat_template {str(path)!r} is neither a name, nor a file, nor Jinja text",
            hint=choose,
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the chat template {path} cannot be read: {error}", hint=choose) from error
