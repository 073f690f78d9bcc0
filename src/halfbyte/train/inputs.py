"""What a run reads: tokenized rows to train on and to evaluate, whatever form the data came in."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from datasets import Dataset
from peft import PeftModel

from halfbyte.data.chat import IGNORE_INDEX
from halfbyte.data.config import DataConfig
from halfbyte.data.gather import InMemory
from halfbyte.data.loader import row_lengths
from halfbyte.data.prepare import prepare
from halfbyte.data.summary import Summary
from halfbyte.errors import DataError

Data: TypeAlias = str | Path | DataConfig | Dataset | list[dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """Tokenized rows and how to batch them.

    Attributes:
        train: Columns `input_ids` and `labels` (-100 is not supervised; not shifted).
        eval: Held-out rows of the same form.
        fingerprint: Equal for equal rows in equal batches.
        packing: Whether several rows share a sequence.
        max_length: Tokens of such a sequence.
        shuffle: Whether every epoch has an order of its own.
        summary: What became of the rows; `None` where they came tokenized.
        chat_template: What conversations were written with, where it is not the tokenizer's own.
        stop_token_ids: What ends the assistant's turn; generation has to stop there.
    """

    train: Dataset
    eval: Dataset | None
    fingerprint: str
    packing: bool = False
    max_length: int = 0
    shuffle: bool = True
    summary: Summary | None = None
    chat_template: str | None = None
    stop_token_ids: tuple[int, ...] = ()


def prepare_inputs(data: Data, eval_data: Data | None, tokenizer: Any, *, seed: int) -> Inputs:
    """Tokenize what has to be.

    Args:
        data: A path, a DataConfig, rows, or rows that are tokenized already.
        eval_data: Held-out rows in the same forms; a path or rows are read as `data` says.
        tokenizer: The model's.
        seed: Chooses the held-out rows, where `data` asks for a fraction.

    Raises:
        DataError: the data cannot be read, or would not train anything.
    """
    held_out, eval_rows = None, None
    if isinstance(eval_data, DataConfig) or _is_tokenized(eval_data):
        held_out = tokenized(eval_data, tokenizer, seed=seed)
    if _is_tokenized(data):
        if eval_data is not None and held_out is None:
            held_out = tokenized(eval_data, tokenizer, seed=seed)
        return Inputs(data, held_out, fingerprint(data))
    config, rows = _source(data)
    if held_out is None and eval_data is not None:
        eval_config, eval_rows = _source(eval_data)
        update = {"eval_path": eval_config.path, "eval_split": None, "eval_fraction": 0.0}
        config = config.model_copy(update=update)
    prepared = prepare(config, tokenizer, seed=seed, rows=rows, eval_rows=eval_rows)
    return Inputs(
        train=prepared.train,
        eval=prepared.eval if held_out is None else held_out,
        fingerprint=prepared.fingerprint,
        packing=config.packing,
        max_length=config.max_length,
        shuffle=config.shuffle,
        summary=prepared.summary,
        chat_template=prepared.chat_template,
        stop_token_ids=prepared.stop_token_ids,
    )


def tokenized(data: Data, tokenizer: Any, *, seed: int, prefer_held_out: bool = False) -> Dataset:
    """Return the rows of `data`, or the held-out ones that it names, as ids and labels."""
    if _is_tokenized(data):
        return data
    config, rows = _source(data)
    prepared = prepare(config, tokenizer, seed=seed, rows=rows)
    if prefer_held_out and prepared.eval is not None:
        return prepared.eval
    return prepared.train


def require_fitting(rows: Dataset, model: PeftModel) -> None:
    """Refuse rows that the model has no embeddings or positions for.

    A GPU would stop at them with an assertion that names neither, or look beyond the positions
    that the model was trained on.

    Raises:
        DataError: a token's id is none of the embeddings', or a row is longer than the positions.
    """
    num_embeddings = cast(Any, model).get_input_embeddings().weight.shape[0]
    table = rows.with_format("arrow")[:]
    for name in ("input_ids", "labels"):
        for chunk in table[name].chunks:
            ids = np.asarray(chunk.flatten())
            is_odd = (ids < 0) | (ids >= num_embeddings)
            if name == "labels":
                is_odd &= ids != IGNORE_INDEX
            if is_odd.any():
                raise DataError(
                    f"{name} hold the token {ids[is_odd][0]}, and the model has {num_embeddings} "
                    "embeddings",
                    hint="take the tokenizer that belongs to this model",
                )
    config = cast(Any, model).config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    scaling = getattr(config, "rope_parameters", None) or {}
    longest = int(row_lengths(rows).max(initial=0))
    if positions and not scaling.get("factor") and longest > positions:
        raise DataError(
            f"a row has {longest} tokens, and the model has {positions} positions",
            hint=f"set max_length: {positions}, and over_length to say what becomes of longer rows",
        )


def fingerprint(rows: Dataset) -> str:
    """Return the SHA-256 of tokenized rows: of lengths, ids and labels, in order."""
    digest = hashlib.sha256(row_lengths(rows).tobytes())
    table = rows.with_format("arrow")[:]
    for name in ("input_ids", "labels"):
        for chunk in table[name].chunks:
            digest.update(np.asarray(chunk.flatten(), dtype=np.int64).tobytes())
    return digest.hexdigest()


def pad_token_id(tokenizer: Any) -> int:
    """Return what to fill batches with; it is never seen, so any token will do."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _is_tokenized(data: Data | None) -> bool:
    return isinstance(data, Dataset) and {"input_ids", "labels"} <= set(data.column_names)


def _source(data: Data) -> tuple[DataConfig, InMemory | None]:
    if isinstance(data, DataConfig):
        return data, None
    if isinstance(data, str | Path):
        return DataConfig(path=str(data)), None
    return DataConfig(), data
