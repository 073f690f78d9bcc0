"""What training left beside an adapter: where its base is, and how that was held in 4 bits.

`halfbyte.json` beside the adapter names the base, its fingerprint and its quantization; peft's
adapter_config.json names the base too.
"""

from pathlib import Path

from halfbyte.adapters.files import IDENTITY_FILE, AdapterFiles
from halfbyte.adapters.identity import is_kept, kept_fingerprint
from halfbyte.errors import AdapterError, CheckpointError
from halfbyte.export.base import Recipe
from halfbyte.models.folder import find_folder
from halfbyte.models.skeleton import Skeleton
from halfbyte.quant.config import NF4Config, to_dtype


def find_base(adapter: AdapterFiles, base: str | Path | None = None) -> Path:
    """Return the base's folder, fetched from the hub where it is a name there.

    Args:
        adapter: The adapter.
        base: Where the base is, if not where training found it.

    Raises:
        AdapterError: the adapter does not name its base.
        CheckpointError: the base is neither a folder nor on the hub.
    """
    name = str(base or adapter.config.base_model_name_or_path or "")
    if not name:
        raise AdapterError(
            f"the adapter in {adapter.folder} does not name its base",
            hint="say where the base is with base=... (on the command line --base)",
        )
    try:
        return find_folder(name)
    except CheckpointError as error:
        raise CheckpointError(
            f"the base of the adapter in {adapter.folder} is gone: {error.message}",
            hint="say where it is with base=... (on the command line --base)",
        ) from error


def check_base(adapter: AdapterFiles, skeleton: Skeleton) -> None:
    """Refuse a base that is not the one below which the adapter was trained.

    Raises:
        AdapterError: its embeddings and norms differ from those that training saw.
    """
    recorded = _fingerprint(adapter).get("kept")
    on_disk = {there: name for name, there in skeleton.names.items()}
    kept = [name for name, module in skeleton.model.named_modules() if is_kept(module)]
    if recorded is None or any(f"{name}.weight" not in on_disk for name in kept):
        return
    weights = ((name, skeleton.reader.tensor(on_disk[f"{name}.weight"])) for name in kept)
    if kept_fingerprint(weights) != recorded:
        raise AdapterError(
            f"the adapter in {adapter.folder} was trained on another base than "
            f"{skeleton.reader.folder}: embeddings and norms differ",
            hint="name its own base with base=...; if you know that this one fits, remove "
            f"{IDENTITY_FILE} beside the adapter",
        )


def _fingerprint(adapter: AdapterFiles) -> dict[str, str]:
    return (adapter.identity.get("base") or {}).get("fingerprint") or {}


def recorded_recipe(adapter: AdapterFiles) -> Recipe | None:
    """Return how training held the base in 4 bits, None for 16 bits.

    Raises:
        AdapterError: nothing beside the adapter says so.
    """
    if not adapter.identity:
        raise AdapterError(
            f"nothing in {adapter.folder} says how training held the base",
            hint="if in 4 bits, give quant=NF4Config(...) (--quant nf4), else onto=original",
        )
    saved = adapter.identity.get("quantization")
    if saved is None:
        return None
    # bitsandbytes' settings know neither block size nor dtype.
    weights = adapter.identity.get("weights") or {"block_size": 64, "dtype": None}
    config = NF4Config(**{**saved, "block_size": weights["block_size"]})
    return Recipe(config, to_dtype("dtype", weights["dtype"]))
