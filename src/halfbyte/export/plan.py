"""Which tensors a merged checkpoint has: where each comes from and what is done to it.

Tied weights are the one difficulty. A tied pair is one tensor on disk; when an adapter changes
only one of the two (LoRA on the embedding leaves the output head as it was), the merged model has
two tensors and `tie_word_embeddings` becomes false, as with peft's merge.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

import peft

from halfbyte.errors import AdapterError
from halfbyte.export.updates import RowsUpdate, Update
from halfbyte.models.skeleton import Skeleton


@dataclass(frozen=True)
class Step:
    """One tensor of the merged checkpoint.

    Args:
        name: Its name there.
        source: Name of the base's tensor that it is made from.
        updates: What the adapter does to it, in order; nothing for most.
    """

    name: str
    source: str
    updates: tuple[Update, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Every tensor of the merged checkpoint, and whether tied weights had to be untied."""

    steps: tuple[Step, ...]
    unties: bool = False


def make_plan(
    base_names: list[str],
    skeleton: Skeleton,
    updates: Mapping[str, list[Update]],
    adapter_config: peft.LoraConfig,
) -> Plan:
    """Lay out the merged checkpoint in the order of the base.

    Args:
        base_names: Dense tensors of the base, as on disk.
        skeleton: What they are called in memory, and which are tied.
        updates: Updates by name in memory.
        adapter_config: peft's settings, for `ensure_weight_tying`.

    Raises:
        AdapterError: an update falls on no tensor of the base, or on one that is made of several.
    """
    on_disk = {there: name for name, there in skeleton.names.items()}
    pending = dict(updates)
    unties = False
    extra = []
    for twin, original in skeleton.model.all_tied_weights_keys.items():
        shared = _shared_updates(pending.get(twin), pending.get(original), adapter_config)
        if shared is not None:
            pending.pop(twin, None)
            pending[original] = shared
        elif twin in pending or original in pending:
            unties = True
            if twin not in on_disk:
                source = _source(skeleton, on_disk, original)
                extra.append(Step(twin, source, tuple(pending.pop(twin, ()))))
    by_source = {
        _source(skeleton, on_disk, name): tuple(found) for name, found in pending.items() if found
    }
    steps = [Step(name, name, by_source.get(name, ())) for name in base_names]
    return Plan((*steps, *extra), unties)


def _shared_updates(
    twin: list[Update] | None, original: list[Update] | None, config: peft.LoraConfig
) -> list[Update] | None:
    """Return the updates of a tied pair that stays one tensor, None for one that cannot."""
    found = original or twin or []
    is_rows = bool(found) and all(isinstance(update, RowsUpdate) for update in found)
    if found and (config.ensure_weight_tying or (is_rows and not (twin and original))):
        return found
    return None


def _source(skeleton: Skeleton, on_disk: Mapping[str, str], name: str) -> str:
    """Return the name on disk of the tensor called `name` in memory."""
    if name in on_disk:
        return on_disk[name]
    if name in skeleton.model.state_dict():
        raise AdapterError(
            f"the adapter changes {name}, which the base's checkpoint holds in several pieces",
            hint="merge it with peft's own merge_and_unload",
        )
    near = difflib.get_close_matches(name, on_disk, n=1)
    raise AdapterError(
        f"the adapter changes {name}, which the base does not have"
        + (f" (it has {near[0]})" if near else ""),
        hint="give the base that the adapter was trained on with base=...",
    )
