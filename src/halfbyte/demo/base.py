"""Where the base model is that comes inside the package."""

from pathlib import Path


def base_path() -> Path:
    """Return the folder of the embedded base: weights, tokenizer, chat template, model card."""
    return Path(__file__).parent / "base"
