"""halfbyte doctor: what this machine has, and what is missing."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path

import halfbyte
from halfbyte.cli.display import print_facts, size

_NEEDED = ("torch", "transformers", "peft", "accelerate", "safetensors", "datasets")
_OPTIONAL = ("triton", "bitsandbytes", "trl")
_LOW_DISK_BYTES = 20 * 1024**3


def doctor() -> None:
    """Show versions, device, memory and disk, with hints about what is missing."""
    print_facts("Versions", _versions())
    print()
    print_facts("Machine", _machine())
    for hint in _hints():
        print(f"hint: {hint}")


def _versions() -> dict[str, str]:
    versions = {"halfbyte": halfbyte.__version__, "python": platform.python_version()}
    for name in (*_NEEDED, *_OPTIONAL):
        note = " (optional)" if name in _OPTIONAL else ""
        try:
            versions[name] = importlib.metadata.version(name) + note
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed" + note
    return versions


def _machine() -> dict[str, str]:
    import torch

    from halfbyte.device import compute_dtype, default_device

    device = default_device()
    facts = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "memory": size(memory_bytes()),
        "disk free here": size(shutil.disk_usage(Path.cwd()).free),
        "device": str(device),
        "matrices in": str(compute_dtype(device)).removeprefix("torch."),
    }
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        facts[f"cuda:{index}"] = (
            f"{properties.name}, compute capability {capability}, "
            f"{size(free)} of {size(total)} free"
        )
    return facts


def memory_bytes() -> int:
    """Return the bytes of main memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _hints() -> list[str]:
    import torch

    from halfbyte.device import compute_dtype, default_device

    hints = []
    device = default_device()
    if device.type == "cpu":
        why = "this torch has no CUDA" if torch.version.cuda is None else "torch sees no CUDA GPU"
        hints.append(f"{why}: small models train on the CPU, larger ones need a GPU")
    elif importlib.util.find_spec("triton") is None:
        hints.append("install triton: the fast kernels for CUDA are written in it")
    if device.type == "cuda" and compute_dtype(device) != torch.bfloat16:
        hints.append("this GPU has no bf16: matrices are multiplied in float16")
    if shutil.disk_usage(Path.cwd()).free < _LOW_DISK_BYTES:
        hints.append(f"less than {size(_LOW_DISK_BYTES)} of disk are free here")
    return hints
