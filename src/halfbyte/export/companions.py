"""What stands beside the weights: the model's settings, its tokenizer and its chat template."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from halfbyte.checkpoint.header import read_json
from halfbyte.quant.config import NF4Config

_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template*",
    "additional_chat_templates",
)
_MODEL_FILES = ("generation_config.json", "preprocessor_config.json", "processor_config.json")


def copy_companions(adapter: Path, base: Path, to: Path) -> None:
    """Copy tokenizer, chat template and generation settings.

    The tokenizer beside the adapter wins, as a whole: it is the one that training used.
    """
    has_own = (adapter / "tokenizer_config.json").is_file()
    _copy(adapter if has_own else base, to, _TOKENIZER_FILES)
    for name in _MODEL_FILES:
        _copy(adapter if (adapter / name).is_file() else base, to, (name,))


def _copy(source: Path, to: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, to / path.name, dirs_exist_ok=True)
            elif path.suffix != ".py":
                shutil.copyfile(path, to / path.name)


def write_config(
    base: Path,
    to: Path,
    dtype: torch.dtype,
    changes: dict[str, Any],
    quant: NF4Config | None = None,
) -> None:
    """Write the base's config.json for weights of `dtype`, or for 4-bit ones.

    Args:
        base: The base's folder.
        to: Folder to write into.
        dtype: dtype of the weights.
        changes: Settings that the merge changed, such as vocab_size; where the model's text part
            has settings of its own, they are changed there.
        quant: How linear layers are held in 4 bits; they are multiplied in `dtype`.
    """
    left_out = ("quantization_config", "torch_dtype", "_name_or_path")
    saved = read_json(base / "config.json")
    config = {key: value for key, value in saved.items() if key not in left_out}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if quant is not None:
        config["quantization_config"] = {
            **quant.to_dict(),
            "bnb_4bit_compute_dtype": config["dtype"],
        }
    text_config = config.get("text_config")
    for name, value in changes.items():
        owner = text_config if isinstance(text_config, dict) and name in text_config else config
        owner[name] = value
    (to / "config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
