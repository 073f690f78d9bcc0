"""An adapter alone as a GGUF file, for llama.cpp and Ollama to put on a base while they run.

llama.cpp adds alpha / rank * B @ A to a matrix, with one alpha for the file and the rank of each B.
Whatever else peft scales by (rsLoRA, alpha patterns) is multiplied into B. It takes nothing but
pairs on matrices: DoRA, biases and trained copies must be merged.
"""

from collections.abc import Iterator
from pathlib import Path

import gguf
from gguf import GGMLQuantizationType
from torch import Tensor

from halfbyte.adapters.files import AdapterFiles
from halfbyte.errors import AdapterError, ConfigError
from halfbyte.export.adapter import updates_by_tensor
from halfbyte.export.config import MergeConfig
from halfbyte.export.source import Source
from halfbyte.export.updates import LoraUpdate, Update
from halfbyte.gguf.families import Family, find_family
from halfbyte.gguf.source import OUTPUT
from halfbyte.gguf.write import Entry, GgufResult, check_target, count, replacing, write_tensors

_TYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
}


def export_adapter(
    folder: str | Path,
    to: str | Path,
    file_type: str = "f16",
    *,
    merge: MergeConfig | None = None,
    overwrite: bool = False,
) -> GgufResult:
    """Write an adapter as a GGUF file.

    Args:
        folder: A run's folder, or an adapter's.
        to: The file to write.
        file_type: f32, f16 or bf16.
        merge: Where the base is, if not where training found it.
        overwrite: Replace `to` if it is there.

    Raises:
        AdapterError: it holds what llama.cpp cannot add while it runs.
        CheckpointError: its base cannot be exported, or `to` is there already.
        ConfigError: there is no such type.
    """
    if file_type not in _TYPES:
        raise ConfigError(f"an adapter's type should be one of {', '.join(_TYPES)}: {file_type!r}")
    check_target(Path(to), overwrite=overwrite)
    source = Source.find(folder, merge or MergeConfig())
    config = source.skeleton.config.get_text_config()
    family = find_family(config)
    pairs = {}
    names = gguf.get_tensor_name_map(family.arch, config.num_hidden_layers)
    for name, updates in updates_by_tensor(source.adapter).items():
        there = names.get_name(name, try_suffixes=(".weight",))
        is_tied_output = name == OUTPUT and config.tie_word_embeddings
        pairs[name] = (_checked_name(name, there, is_tied_output), _only_pair(name, updates))
    with replacing(Path(to)) as partial:
        writer = gguf.GGUFWriter(partial, family.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(Path(folder).resolve().name)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(source.adapter.config.lora_alpha))
        tensors = list(_tensors(source, family, pairs, _TYPES[file_type]))
        write_tensors(writer, [entry for entry, _ in tensors], iter(tensors))
    return GgufResult(
        path=Path(to),
        architecture=family.name,
        tensors=count(entry.kind for entry, _ in tensors),
        num_bytes=Path(to).stat().st_size,
        parity=None,
        notices=_notices(source),
    )


def _notices(source: Source) -> list[str]:
    if not source.adapter.identity.get("quantization") and not source.is_packed:
        return []
    return [
        "this adapter was trained on a base in 4 bits: write that base with --base-only, and put "
        "the adapter on it"
    ]


def _checked_name(name: str, there: str | None, is_tied_output: bool) -> str:  # noqa: FBT001
    if there is None or is_tied_output or there == "token_embd.weight":
        raise AdapterError(
            f"llama.cpp cannot put an adapter on {name} while it runs",
            hint="export the run with its adapter merged (without --adapter-only)",
        )
    return there


def _only_pair(name: str, updates: list[Update]) -> LoraUpdate:
    """Return the one LoRA pair that there is for a matrix.

    Raises:
        AdapterError: there is something else.
    """
    pair = updates[0]
    if len(updates) == 1 and isinstance(pair, LoraUpdate) and pair.magnitude is None:
        return pair
    kinds = [
        "DoRA" if isinstance(update, LoraUpdate) else type(update).__name__.removesuffix("Update")
        for update in updates
    ]
    raise AdapterError(
        f"the adapter changes {name} by {' and '.join(kinds)}, and llama.cpp adds nothing "
        "but LoRA pairs while it runs",
        hint="export the run with its adapter merged (without --adapter-only)",
    )


def _tensors(
    source: Source,
    family: Family,
    pairs: dict[str, tuple[str, LoraUpdate]],
    kind: GGMLQuantizationType,
) -> Iterator[tuple[Entry, Tensor]]:
    """Yield A [rank, in] and B [out, rank] of each pair, its rows as the base's are."""
    files: AdapterFiles = source.adapter
    config = source.skeleton.config.get_text_config()
    for name, (there, pair) in pairs.items():
        factor = pair.scaling * pair.rank / files.config.lora_alpha
        lora_A, lora_B = files.tensors[pair.lora_A].float(), files.tensors[pair.lora_B].float()
        lora_B = family.convert(name, lora_B * factor, config)
        for part, tensor in (("lora_a", lora_A), ("lora_b", lora_B)):
            yield Entry(f"{there}.{part}", tuple(tensor.shape), kind), tensor
