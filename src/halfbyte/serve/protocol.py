"""The bodies of requests: OpenAI's parameters, and vLLM's where OpenAI has none.

A parameter that is not served is an error that names it, unless its value asks for nothing.
"""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20

_IGNORED = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
)
"""What does not concern the answer."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "parallel_tool_calls": (True, False),
}
"""Values that ask for nothing, of parameters that are not served."""

_Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_T = TypeVar("_T")
_Some = Annotated[list[_T], Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Body):
    """How a stream is told."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class _Generation(_Body):
    """What both ways of asking share."""

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1)
    seed: int | None = None
    max_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            key: value
            for key, value in data.items()
            if key not in _IGNORED
            and not (key in _NEUTRAL and (value is None or value in _NEUTRAL[key]))
            # A client may send null for what it leaves open.
            and not (value is None and key in cls.model_fields)
        }

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatBody(_Generation):
    """POST /v1/chat/completions."""

    messages: _Some[dict[str, Any]]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto"] = "auto"
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @property
    def most_tokens(self) -> int | None:
        """Longest answer, None where the model's room is the limit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """Likeliest tokens to report, None for no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(_Generation):
    """POST /v1/completions."""

    prompt: str | _Some[str] | _Some[int] | _Some[_Some[int]]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @property
    def most_tokens(self) -> int | None:
        """Longest answer."""
        return self.max_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        """Likeliest tokens to report, None for no logprobs."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]


class LoadAdapterBody(_Body):
    """POST /v1/load_lora_adapter, as in vLLM."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadAdapterBody(_Body):
    """POST /v1/unload_lora_adapter, as in vLLM."""

    lora_name: str
    lora_int_id: int | None = None
