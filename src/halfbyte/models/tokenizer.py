"""Load the tokenizer of a model, with a padding token that is safe to train with.

A tokenizer that has none gets a token that its makers reserved and nobody uses. Where there is not
even that it is the stop token: padding is masked by length and not by id, so stopping is still
learned.
"""

import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from halfbyte.checkpoint.reader import inside
from halfbyte.errors import CheckpointError

_PAD_NAMES = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<PAD>", "<|padding|>")
_READ = (".json", ".jinja", ".model", ".txt")
_RESERVED = re.compile(r"reserved|unused", re.IGNORECASE)


def load_tokenizer(folder: Path, num_embeddings: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer in `folder`, with a padding token.

    Args:
        folder: The model's folder, or an adapter's that has a tokenizer of its own.
        num_embeddings: Rows of the model's embedding; token ids must lie below.

    Raises:
        CheckpointError: there is none, it is damaged, a link out of the folder, or its
            special tokens have no embedding.
    """
    for path in folder.iterdir():
        if path.suffix in _READ:  # what a link leads to would be saved beside the adapter
            inside(folder, path.name)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    # The Rust parser raises a plain Exception on a damaged file.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be read: {reason}",
            hint="copy tokenizer.json and tokenizer_config.json of the model there",
        ) from error
    for name in ("bos_token", "eos_token", "pad_token"):
        index = getattr(tokenizer, f"{name}_id")
        if index is not None and not 0 <= index < num_embeddings:
            raise CheckpointError(
                f"{name} of the tokenizer in {folder} is {index}, and the model has "
                f"{num_embeddings} embeddings",
                hint="take the tokenizer that belongs to this model",
            )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _padding(tokenizer, num_embeddings)
    return tokenizer


def _padding(tokenizer: Any, num_embeddings: int) -> str | None:
    """Return a token to pad with: a reserved one if there is one, else the stop token."""
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    added = {
        token: index
        for token, index in tokenizer.get_added_vocab().items()
        if index < num_embeddings and token not in used
    }
    named = [token for token in _PAD_NAMES if token in added]
    reserved = sorted((token for token in added if _RESERVED.search(token)), key=added.__getitem__)
    return next(iter(named + reserved), tokenizer.eos_token)
