"""The command that serves the same files with vLLM, where one machine's users outgrow this server.

vLLM reads what Halfbyte writes: the base in bitsandbytes' layout or in 16 bits, and peft's adapter
files. What it would refuse or scale wrongly is an error here, before a GPU is rented for it.
"""

from collections.abc import Mapping
from pathlib import Path

from halfbyte.adapters.files import AdapterFiles, read_adapter_files
from halfbyte.errors import AdapterError
from halfbyte.export.consumers import VLLM_RANKS, adapter_limits
from halfbyte.export.record import recorded_recipe

_TEMPLATE = "chat_template.jinja"


def vllm_command(
    base: str,
    adapters: Mapping[str, str | Path],
    *,
    served_model_name: str | None = None,
    max_model_len: int | None = None,
) -> list[str]:
    """Return the words of a `vllm serve` command for a base and its adapters.

    Args:
        base: A folder or a name on the hub.
        adapters: Folders or hub names, by what requests call them.
        served_model_name: What requests call the base; by default `base`.
        max_model_len: Longest prompt with its answer.

    Raises:
        AdapterError: vLLM would refuse an adapter, or scale it wrongly; or adapters were trained
            with different chat templates, and vLLM has one for all.
    """
    command = ["vllm", "serve", base]
    if served_model_name is not None:
        command += ["--served-model-name", served_model_name]
    if max_model_len is not None:
        command += ["--max-model-len", str(max_model_len)]
    found = {name: read_adapter_files(path, in_memory=False) for name, path in adapters.items()}
    if not found:
        return command
    rank = max(_rank(name, adapter) for name, adapter in found.items())
    if any(_is_on_four_bits(adapter) for adapter in found.values()):
        command += ["--quantization", "bitsandbytes"]
    if template := _template(list(found.values())):
        command += ["--chat-template", str(template)]
    modules = [f"{name}={adapter.folder.resolve()}" for name, adapter in found.items()]
    command += ["--enable-lora", "--max-loras", str(len(found)), "--max-lora-rank", str(rank)]
    return [*command, "--lora-modules", *modules]


def _rank(name: str, adapter: AdapterFiles) -> int:
    """Return the --max-lora-rank that an adapter needs."""
    rank = adapter.config.r
    for limit in adapter_limits(adapter):
        # A rank that it takes when told so is no obstacle: it is told so.
        if limit.consumer == "vLLM" and not limit.advice.startswith("start it with"):
            raise AdapterError(f"the adapter {name!r}: vLLM {limit.problem}", hint=limit.advice)
    return next(each for each in VLLM_RANKS if each >= max(rank, VLLM_RANKS[1]))


def _is_on_four_bits(adapter: AdapterFiles) -> bool:
    try:
        return recorded_recipe(adapter) is not None
    except AdapterError:  # peft saved it, and says nothing: QLoRA is what this is for
        return True


def _template(adapters: list[AdapterFiles]) -> Path | None:
    """Return the file of the template that the adapters were trained with, if they have one."""
    paths = [adapter.folder / _TEMPLATE for adapter in adapters]
    texts = {path.read_text(encoding="utf-8"): path for path in paths if path.is_file()}
    if len(texts) > 1:
        raise AdapterError(
            f"the adapters were trained with {len(texts)} different chat templates, "
            "and vLLM has one for all",
            hint="start one vLLM for each",
        )
    return next(iter(texts.values())).resolve() if texts else None
