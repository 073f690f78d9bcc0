"""What vLLM and llama.cpp would refuse in an adapter, or silently get wrong, and what to do.

Written from their loaders: vLLM's `lora/peft_helper.py`, `lora/lora_model.py` and `lora/utils.py`,
llama.cpp's `convert_lora_to_gguf.py`. peft itself takes all of it, and to each of them a merged
model is a plain one.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from halfbyte.adapters.files import AdapterFiles, read_adapter_files

Consumer = Literal["vLLM", "llama.cpp"]
# vLLM is started with one of these as --max-lora-rank, 16 if nobody says.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_VLLM_DEFAULT_RANK = 16
_MERGE = "merge it with halfbyte merge, and serve that"
_CONVERT = "make the file with halfbyte export, which multiplies the difference into B"
_PAIR_KEY = re.compile(r"^base_model\.model\.(.+)\.(lora_[AB]\.weight|lora_embedding_[AB])$")
_TABLES = ("embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Limit:
    """Something in an adapter that a consumer cannot take as it is.

    Attributes:
        consumer: Who.
        problem: What it does with it.
        advice: What to do instead.
    """

    consumer: Consumer
    problem: str
    advice: str

    def __str__(self) -> str:
        return f"{self.consumer} {self.problem}: {self.advice}"


def adapter_limits(adapter: str | Path | AdapterFiles) -> list[Limit]:
    """Return what vLLM and llama.cpp cannot take of an adapter; nothing for a plain LoRA.

    Args:
        adapter: A run's folder, any folder with an adapter in peft's format, or its files.

    Raises:
        AdapterError: the files are missing or damaged.
    """
    files = adapter
    if not isinstance(files, AdapterFiles):
        files = read_adapter_files(files, in_memory=False)
    return [*_parts(files), *_scaling(files), *_ranks(files)]


def _parts(adapter: AdapterFiles) -> Iterator[Limit]:
    """Yield what is no pair of A and B, which is all that either knows."""
    config, odd = adapter.config, [key for key in adapter.tensors if not _PAIR_KEY.match(key)]
    # Both skip the embedding that peft saves beside its own adapter.
    odd = [key for key in odd if not key.endswith("embed_tokens.base_layer.weight")]
    rows = config.trainable_token_indices
    tables = [key for key in odd if key.endswith(_TABLES) and not config.modules_to_save]
    found = {
        "DoRA's magnitudes": config.use_dora,
        f"modules_to_save ({', '.join(sorted(config.modules_to_save or ()))})": bool(
            config.modules_to_save
        ),
        "trained biases": config.bias != "none" or config.lora_bias,
        "trained rows (trainable_token_indices)": rows is not None and bool(rows),
        f"whole tables ({', '.join(tables)}), saved with new tokens": bool(tables),
    }
    for what, is_there in found.items():
        if is_there:
            yield Limit("vLLM", f"refuses {what}", _MERGE)
            yield Limit("llama.cpp", f"has no place for {what}", _MERGE)
    if odd and not any(found.values()):
        yield Limit("vLLM", f"refuses tensors such as {odd[0]}", _MERGE)
        yield Limit("llama.cpp", f"has no place for tensors such as {odd[0]}", _MERGE)


def _scaling(adapter: AdapterFiles) -> Iterator[Limit]:
    """Yield what is scaled otherwise than by the one number that each of them works out."""
    config = adapter.config
    if config.alpha_pattern:
        yield Limit("vLLM", "ignores alpha_pattern and scales its modules wrongly", _MERGE)
        yield Limit("llama.cpp", "ignores alpha_pattern and scales its modules wrongly", _CONVERT)
    if config.rank_pattern:
        yield Limit("vLLM", "scales the modules of rank_pattern as if their rank were r", _MERGE)
    if config.use_rslora:
        yield Limit("llama.cpp", "divides alpha by r, and rsLoRA by its square root", _CONVERT)


def _ranks(adapter: AdapterFiles) -> Iterator[Limit]:
    """Yield how vLLM has to be started for the rank."""
    config = adapter.config
    rank = max([config.r, *(config.rank_pattern or {}).values()])
    if rank > VLLM_RANKS[-1]:
        yield Limit("vLLM", f"takes ranks up to {VLLM_RANKS[-1]}, and this is {rank}", _MERGE)
    elif rank > _VLLM_DEFAULT_RANK:
        needed = next(each for each in VLLM_RANKS if each >= rank)
        problem = f"takes ranks up to {_VLLM_DEFAULT_RANK} unless told, and this is {rank}"
        yield Limit("vLLM", problem, f"start it with --max-lora-rank {needed}")
