"""How the next token is chosen."""

from dataclasses import dataclass

from transformers import GenerationConfig

from halfbyte.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of one generation, under transformers' names.

    Args:
        max_new_tokens: Stop after so many tokens, whatever they are.
        temperature: 0 takes the likeliest token every time; higher values spread the choice.
        top_p: Keep the likeliest tokens whose probabilities add up to this.
        top_k: Keep so many of the likeliest tokens; 0 keeps all.
        repetition_penalty: Above 1 makes tokens that were there before less likely.
        seed: Seed of the sampling; the same seed gives the same text.

    Raises:
        ConfigError: a value is out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", "1 or more", self.max_new_tokens)
        _require(self.temperature >= 0, "temperature", "0 or more", self.temperature)
        _require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _require(self.top_k >= 0, "top_k", "0 (all) or more", self.top_k)
        _require(
            self.repetition_penalty > 0, "repetition_penalty", "above 0", self.repetition_penalty
        )

    def generation_config(
        self, *, stop_token_ids: list[int], pad_token_id: int
    ) -> GenerationConfig:
        """Return transformers' form of these settings; none is left to the model's own defaults."""
        chosen = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "eos_token_id": stop_token_ids or None,
            "pad_token_id": pad_token_id,
        }
        if self.temperature == 0:
            return GenerationConfig(do_sample=False, **chosen)
        return GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            **chosen,
        )


def _require(holds: bool, name: str, expected: str, got: float) -> None:  # noqa: FBT001
    if not holds:
        raise ConfigError(f"{name} should be {expected}, got {got}")
