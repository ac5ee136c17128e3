"""How the C library treats memory that tensors on a CPU gave up."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Have glibc reuse the memory of freed tensors instead of returning it to the system.

    Otherwise large blocks go back when they are freed, and the next tensor pays a page fault for
    every 4 KiB: a tenth of a training step. Other systems and C libraries are left alone.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        mallopt(_M_TRIM_THRESHOLD, _LARGEST)
