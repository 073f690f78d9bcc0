"""From a prompt to token ids, and the tokens that end an answer.

A string is taken as it is (base models); a list of messages goes through the tokenizer's chat
template. An answer ends at any token that the model's generation config, the tokenizer or the
chat template ends one with: models whose generation config forgets the template's end of turn
would otherwise never stop.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.data.sandbox import render_conversation
from halfbyte.errors import ConfigError, DataError

Message = dict[str, Any]
Prompt = str | Sequence[Message]


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    tools: Sequence[dict[str, Any]] | None = None,
    **template_kwargs: Any,
) -> list[int]:
    """Return the token ids of a prompt, ready for an answer.

    Args:
        tokenizer: The model's.
        prompt: Plain text, or messages.
        tools: JSON schemas of functions, for templates that tell the model about them.
        **template_kwargs: What the template takes besides, such as enable_thinking.

    Raises:
        DataError: messages were given but the tokenizer has no chat template, or it refuses them,
            or nothing is left.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        if not tokenizer.chat_template:
            raise DataError(
                "messages were given, but the tokenizer has no chat template",
                hint="give the prompt as plain text, or set chat_template in training",
            )
        text = rendered(tokenizer, prompt, tools, add_generation_prompt=True, **template_kwargs)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        if tokenizer.bos_token_id is None:
            raise DataError("the prompt is empty", hint="give at least one character")
        ids = [tokenizer.bos_token_id]
    return ids


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    *,
    add_generation_prompt: bool = False,
    **template_kwargs: Any,
) -> str:
    """Return what the chat template makes of a conversation, within the limits that data has.

    Raises:
        DataError: the template refuses the conversation, or breaks a limit of time or size.
    """
    tools = None if tools is None else list(tools)
    variables = {
        **tokenizer.special_tokens_map,
        "documents": None,
        **template_kwargs,
        "messages": list(messages),
        "tools": tools,
        "add_generation_prompt": add_generation_prompt,
    }
    source = str(tokenizer.get_chat_template(tools=tools))  # type: ignore[arg-type]
    return render_conversation(source, variables)


def room_for(model: PreTrainedModel, num_prompt_tokens: int, max_new_tokens: int) -> int:
    """Return how many tokens may follow the prompt: `max_new_tokens`, or what the model still has.

    Raises:
        ConfigError: the prompt alone fills the model's positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return max_new_tokens
    if num_prompt_tokens >= positions:
        raise ConfigError(
            f"the prompt has {num_prompt_tokens} tokens, the model has {positions} positions",
            hint="shorten the prompt (in a chat, /reset forgets what was said)",
        )
    return min(max_new_tokens, positions - num_prompt_tokens)


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every token that ends an answer, in increasing order."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    stops = set(configured if isinstance(configured, list) else [configured])
    stops |= {tokenizer.eos_token_id, end_of_turn_id(tokenizer)}
    return sorted(stop for stop in stops if stop is not None)


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that the chat template puts after an answer, if there is one."""
    if not tokenizer.chat_template:
        return None
    marker = "The-answer-ends-here"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": marker}]
    text = rendered(tokenizer, messages)
    after = tokenizer(text.rpartition(marker)[2], add_special_tokens=False)["input_ids"]
    special = {
        index for index, token in tokenizer.added_tokens_decoder.items() if token.special
    } | set(tokenizer.all_special_ids)
    return after[0] if after and after[0] in special else None


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills short rows; which one does not matter, the mask hides it."""
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else 0
