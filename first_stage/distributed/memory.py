"""Memory: what the C library does with what tensors gave up, and when there is none left."""

import contextlib
import ctypes
import sys
from collections.abc import Iterator

import torch

from first_stage.errors import UserError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1
_SAID = (
    "can't allocate memory",  # torch's allocator of a CPU, on Linux
    "not enough memory: you tried",  # and elsewhere
    "cannot allocate memory",  # the system
    "out of memory",  # drivers of devices
    # cuDNN, where no algorithm finds room to work: github.com/pytorch/pytorch/issues/108645
    "unable to find an engine to execute",
    "unable to find a valid cudnn algorithm",
    "std::bad_alloc",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED and its like
    "memoryerror in dataloader worker",  # of kinds that torch cannot rebuild
)


class OutOfMemory(UserError):
    """The device or the machine has no memory left."""


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device or the machine has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemory):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _SAID)


@contextlib.contextmanager
def memory_told(what_helps: str) -> Iterator[None]:
    """Tell in a line that the memory ran out; what was told inside passes as it is.

    Args:
        what_helps: Said behind "out of memory".

    Raises:
        OutOfMemory: Instead of what torch or Python raises.
    """
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"out of memory {what_helps}") from error
