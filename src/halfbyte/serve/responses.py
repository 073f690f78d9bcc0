"""OpenAI's response objects, from what came of answers."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from halfbyte.serve.answer import FinishReason
from halfbyte.serve.choose import TokenChoice, TokenLogprob
from halfbyte.serve.text import Piece


def usage(num_prompt_tokens: int, num_tokens: int) -> dict[str, int]:
    """Return the object `usage`."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_tokens,
        "total_tokens": num_prompt_tokens + num_tokens,
    }


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None,
    code: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Responses(ABC):
    """Builds the objects of one request; `chat.completion` and `text_completion` differ in shape.

    Args:
        model: The name that was asked for.
        tokenizer: Turns the tokens of logprobs into text.
        has_logprobs: Whether they were asked for.
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(
        self, model: str, tokenizer: PreTrainedTokenizerBase, *, has_logprobs: bool
    ) -> None:
        self._tokenizer, self._has_logprobs = tokenizer, has_logprobs
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, choices: list[dict[str, Any]], used: dict[str, int]) -> dict[str, Any]:
        """Return the response of a request that is not streamed."""
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": used}

    def chunk(
        self, choices: list[dict[str, Any]], used: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """Return one event of a stream."""
        return {**self._head, "object": self.chunk_object, "choices": choices, "usage": used}

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the choice of a stream's first chunk, where there is one."""

    @abstractmethod
    def delta(self, index: int, piece: Piece, finish_reason: FinishReason | None) -> dict[str, Any]:
        """Return the choice of a chunk."""

    @abstractmethod
    def choice(
        self, index: int, pieces: Sequence[Piece], finish_reason: FinishReason | None
    ) -> dict[str, Any]:
        """Return a whole choice."""

    def _text(self, token: TokenLogprob) -> str:
        return str(self._tokenizer.decode([token.token_id]))


class ChatResponses(Responses):
    """Objects of /v1/chat/completions."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the choice that says who speaks."""
        return self._choice(index, "delta", {"role": "assistant", "content": ""}, (), None)

    def delta(self, index: int, piece: Piece, finish_reason: FinishReason | None) -> dict[str, Any]:
        """Return the choice of a chunk."""
        said = {"content": piece.text} if piece.text else {}
        return self._choice(index, "delta", said, piece.choices, finish_reason)

    def choice(
        self, index: int, pieces: Sequence[Piece], finish_reason: FinishReason | None
    ) -> dict[str, Any]:
        """Return a whole choice."""
        message = {"role": "assistant", "content": "".join(piece.text for piece in pieces)}
        tokens = [token for piece in pieces for token in piece.choices]
        return self._choice(index, "message", message, tokens, finish_reason)

    def _choice(
        self, index: int, name: str, said: dict[str, Any], tokens: Sequence[TokenChoice],
        finish_reason: FinishReason | None,
    ) -> dict[str, Any]:  # fmt: skip
        content = [
            {**self._entry(token.token), "top_logprobs": [self._entry(top) for top in token.top]}
            for token in tokens
        ]
        logprobs = {"content": content, "refusal": None} if self._has_logprobs else None
        return {"index": index, name: said, "logprobs": logprobs, "finish_reason": finish_reason}

    def _entry(self, token: TokenLogprob) -> dict[str, Any]:
        text = self._text(token)
        # A token that is only a part of a character has no bytes that its text could tell.
        data = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
        return {"token": text, "logprob": token.logprob, "bytes": data}


class CompletionResponses(Responses):
    """Objects of /v1/completions."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(
        self, model: str, tokenizer: PreTrainedTokenizerBase, *, has_logprobs: bool
    ) -> None:
        super().__init__(model, tokenizer, has_logprobs=has_logprobs)
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return None: a stream of text begins with text."""
        return None

    def delta(self, index: int, piece: Piece, finish_reason: FinishReason | None) -> dict[str, Any]:
        """Return the choice of a chunk."""
        return self.choice(index, [piece], finish_reason)

    def choice(
        self, index: int, pieces: Sequence[Piece], finish_reason: FinishReason | None
    ) -> dict[str, Any]:
        """Return a whole choice."""
        tokens = [token for piece in pieces for token in piece.choices]
        return {
            "index": index,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._logprobs(index, tokens) if self._has_logprobs else None,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, index: int, tokens: Sequence[TokenChoice]) -> dict[str, Any]:
        texts = [self._text(token.token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(text)
        return {
            "tokens": texts,
            "token_logprobs": [token.token.logprob for token in tokens],
            "top_logprobs": [
                {self._text(top): top.logprob for top in token.top} for token in tokens
            ],
            "text_offset": offsets,
        }
