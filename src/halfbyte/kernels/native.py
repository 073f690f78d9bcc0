"""Compile `cpu_loops.c` and `decoder_loops.c` for this machine, once, and load them.

The library goes to `~/.cache/halfbyte`, named by a hash of the source, the flags and the CPU, so
a home directory that several machines share holds one for each; its checksum lies beside it, and
one that is damaged is built again. Where there is no C compiler
`library` returns None and the callers use plain torch, which computes the same and is slower.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("cpu_loops.c")
_DECODER_SOURCE = Path(__file__).with_name("decoder_loops.c")
_COMPILERS = ("cc", "gcc", "clang")
# No contraction: a fused multiply-add rounds once where the reference rounds twice.
_FLAGS = ("-O3", "-std=gnu11", "-ffp-contract=off", "-fopenmp-simd", "-shared", "-fPIC")
# The best that the compiler knows, on AVX-512, elsewhere on x86 and ARM; the last needs nothing.
_OPTIONS = (
    ("-march=native", "-mprefer-vector-width=512", "-fopenmp"),
    ("-march=native", "-fopenmp"),
    ("-march=native",),
    (),
)
_TIMEOUT_SECONDS = 120
_FUNCTIONS = (
    "hb_dequantize",
    "hb_quantize",
    "hb_quantize_blockwise",
    "hb_adamw8",
    "hb_softmax_loss",
    "hb_add_rms_norm",
    "hb_rms_norm_backward",
    "hb_gated_forward",
    "hb_gated_backward",
    "hb_rope",
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled loops, or None where they cannot be had (which the debug log says)."""
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        _log.debug("no C compiler: plain torch serves on the CPU")
        return None
    try:
        path = cache_directory() / f"cpu-loops-{_fingerprint(compiler)}.so"
        if not _is_whole(path):
            compile_library(compiler, path)
        return _declare(ctypes.CDLL(str(path)))
    except (OSError, subprocess.SubprocessError) as error:
        _log.debug("cpu_loops.c cannot be used, plain torch serves instead: %s", error)
        return None


def has_rows(*tensors: Tensor | None) -> bool:
    """Whether `decoder_loops.c` can read them: bf16, the elements of a row side by side."""
    return all(
        t.dtype == torch.bfloat16 and t.stride(-1) == 1 and t.numel() > 0
        for t in tensors
        if t is not None
    )


def is_vector(tensor: Tensor, dtype: torch.dtype, length: int) -> bool:
    """Whether a loop may take the tensor for `length` elements of `dtype` in one piece."""
    return (
        tensor.dtype == dtype
        and tensor.shape == (length,)
        and tensor.is_contiguous()
        and tensor.device.type == "cpu"
    )


def cache_directory() -> Path:
    """Return where compiled libraries lie: `$XDG_CACHE_HOME/halfbyte` or `~/.cache/halfbyte`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "halfbyte"


def compile_library(compiler: str, path: Path) -> None:
    """Compile `cpu_loops.c` to `path`, which appears whole or not at all, with its checksum.

    Raises:
        subprocess.SubprocessError: No set of flags compiled.
        OSError: The folder cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        for option in _OPTIONS:
            sources = (str(_SOURCE), str(_DECODER_SOURCE))
            command = [compiler, *_FLAGS, *option, "-o", str(built), *sources, "-lm"]
            try:
                subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_SECONDS)
            except subprocess.CalledProcessError:
                if option == _OPTIONS[-1]:
                    raise
            else:
                break
        checksum = Path(folder) / _checksum_file(path).name
        checksum.write_text(hashlib.sha256(built.read_bytes()).hexdigest(), encoding="ascii")
        checksum.replace(_checksum_file(path))
        built.replace(path)


def _checksum_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _is_whole(path: Path) -> bool:
    """Whether the library is as the compiler left it: a damaged one would crash the process."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return digest == _checksum_file(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return False


def _fingerprint(compiler: str) -> str:
    """Return a name for what the library depends on: source, flags, compiler and CPU."""
    cpu = [platform.machine(), platform.processor()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(errors="replace").splitlines()
        features = ("flags", "Features", "model name")
        cpu += sorted({line for line in lines if line.startswith(features)})
    parts = [
        _SOURCE.read_text(),
        _DECODER_SOURCE.read_text(),
        compiler,
        *_FLAGS,
        *map(str, _OPTIONS),
        *cpu,
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes the signatures in `cpu_loops.c`."""
    pointer, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.hb_dequantize.argtypes = [pointer] * 7 + [long, long, integer, integer]
    loaded.hb_quantize.argtypes = [
        *[pointer] * 3, ctypes.c_float, pointer, pointer, long, long, integer, integer,
    ]  # fmt: skip
    loaded.hb_quantize_blockwise.argtypes = [*[pointer] * 4, long, integer]
    loaded.hb_adamw8.argtypes = [pointer] * 10 + [long, pointer, integer]
    loaded.hb_softmax_loss.argtypes = [
        *[pointer] * 3, long, long, ctypes.c_float, integer, integer,
    ]  # fmt: skip
    loaded.hb_add_rms_norm.argtypes = [
        *[pointer] * 3, ctypes.c_float, pointer, pointer, *[long] * 5, integer,
    ]  # fmt: skip
    loaded.hb_rms_norm_backward.argtypes = [
        *[pointer] * 3, ctypes.c_float, pointer, pointer, *[long] * 6, integer,
    ]  # fmt: skip
    loaded.hb_gated_forward.argtypes = [*[pointer] * 2, *[long] * 4, integer, integer]
    loaded.hb_gated_backward.argtypes = [*[pointer] * 3, *[long] * 4, integer, integer]
    loaded.hb_rope.argtypes = [*[pointer] * 4, ctypes.c_float, *[long] * 7, integer]
    loaded.hb_attention_backward.argtypes = [
        *[pointer] * 10, *[long] * 4, ctypes.c_float, integer,
    ]  # fmt: skip
    for name in _FUNCTIONS:
        getattr(loaded, name).restype = None
    return loaded
