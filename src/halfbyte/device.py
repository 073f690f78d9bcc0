"""Where we run: device, compute dtype and memory in use."""

import contextlib
import ctypes
import functools
import os
import platform
import resource
import sys
from pathlib import Path

import torch

from halfbyte.errors import DeviceError

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""What PyTorch's CUDA allocator is told with, by its present and its former name."""
JOINING = "expandable_segments:True"
"""What has it join free memory into pieces of any size, one behind the other in virtual memory."""


def can_join_memory() -> bool:
    """Whether `JOINING` works here: on Linux, but for WSL and Jetson, whose drivers fail at it."""
    release = platform.release().lower()
    return sys.platform == "linux" and not any(name in release for name in ("microsoft", "tegra"))


def join_memory() -> None:
    """Have CUDA's allocator join free memory, where it can and the user has told it nothing.

    To be called before CUDA starts, later it does nothing: the allocator reads its settings once.
    """
    is_told = any(name in os.environ for name in ALLOCATOR_VARIABLES)
    if can_join_memory() and not is_told and not torch.cuda.is_initialized():
        os.environ[ALLOCATOR_VARIABLES[0]] = JOINING


def default_device() -> torch.device:
    """Return the current CUDA device where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def resolve_device(name: str | torch.device | None) -> torch.device:
    """Return the device called `name` (`None` and "auto" mean the default).

    Raises:
        DeviceError: `name` is no device, or this machine does not have it.
    """
    if name is None or name == "auto":
        return default_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(
            f"expected a device such as 'cuda', 'cuda:1' or 'cpu', got {name!r}",
            hint="leave `device` out to take the GPU where there is one",
        ) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"{name!r} was asked for, but torch {torch.__version__} sees no CUDA device",
            hint="run `halfbyte doctor` to see what is missing, or use device=cpu",
        )
    return device


@functools.cache
def _cpu_has_fast_bfloat16() -> bool:
    """Whether oneDNN multiplies bf16 in hardware here (AVX512-BF16 or AMX)."""
    return bool(torch.backends.cpu.get_cpu_capability().startswith("AVX512")) and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """Return the dtype that matrices are multiplied in on `device`.

    bf16 where the hardware has it; else float16 on GPUs and float32 on CPUs.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    return torch.bfloat16 if _cpu_has_fast_bfloat16() else torch.float32


def available_bytes(device: torch.device | str) -> int | None:
    """Return the bytes that can still be had on `device`; None where the system does not say."""
    device = torch.device(device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # Whoever shares a card may have capped the process.
        allowed = int(torch.cuda.get_per_process_memory_fraction(device.index) * total)
        return max(min(free, allowed - torch.cuda.memory_reserved(device)), 0)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    in_container = container_bytes()
    return min([*found, *([] if in_container is None else [in_container])], default=None)


def tensor_bytes(device: torch.device | str) -> int | None:
    """Return the bytes that tensors may still take on `device`: those that can be had, and on CUDA
    those that the allocator holds and nothing uses. None where the system does not say.
    """
    device = torch.device(device)
    available = available_bytes(device)
    if available is None or device.type != "cuda":
        return available
    return available + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def container_bytes(group: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what a container may still take of the machine's memory; None without a limit.

    Args:
        group: Where the kernel shows the process's control group (version 2).
    """
    try:
        limit, used, stat = (
            (group / name).read_text(encoding="ascii")
            for name in ("memory.max", "memory.current", "memory.stat")
        )
    except OSError:
        return None
    if limit.strip() == "max":
        return None
    numbers = dict(line.split() for line in stat.splitlines())
    # Cached files go when memory is wanted.
    cached = int(numbers.get("inactive_file", 0)) + int(numbers.get("active_file", 0))
    return max(int(limit) - int(used) + cached, 0)


def peak_rss_bytes() -> int:
    """Return the largest resident set that this process ever had, in bytes."""
    with contextlib.suppress(OSError):  # ru_maxrss would begin with the parent's peak on Linux
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_bytes(device: torch.device | str) -> int:
    """Return this process's peak bytes on `device`: the allocator's on CUDA, the RSS on a CPU."""
    device = torch.device(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_rss_bytes()


def release_unused_memory(device: torch.device | str) -> None:
    """Give cached blocks that nothing uses back to the driver (CUDA) or the system (glibc)."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
