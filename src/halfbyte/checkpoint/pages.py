"""Hand the pages of a memory-mapped tensor back to the system.

Pages of a mapped file stay in a process's resident set until the file is closed. Reading a
checkpoint tensor by tensor would end with all of it resident; dropping each tensor's pages when it
has been used keeps one tensor's worth.
"""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

from torch import Tensor

# Linux 5.4 and newer. Unlike MADV_DONTNEED it never loses data, whatever the memory is.
_MADV_PAGEOUT = 21


@functools.cache
def _madvise() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def release_pages(tensor: Tensor) -> None:
    """Let the system take back the whole pages that a CPU tensor occupies; its values stay.

    Does nothing for tensors elsewhere, for small ones, for memory that torch allocated (it lies in
    no file, and goes with its tensor), and on systems without the call.
    """
    madvise = _madvise()
    if madvise is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    if tensor.untyped_storage().resizable():
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        madvise(start, end - start, _MADV_PAGEOUT)
