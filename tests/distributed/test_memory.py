import subprocess
import sys

import numpy as np
import pytest
import torch

from first_stage.distributed.memory import OutOfMemory, is_out_of_memory, memory_told

_PROGRAM = """
import resource, sys
import torch
if sys.argv[1] == "keep":
    from first_stage.distributed.memory import keep_freed_memory
    keep_freed_memory()
def faults():
    # 64 MiB: more than glibc would ever keep by itself.
    torch.empty(2**24).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [faults() for _ in range(60)]  # until the heap has found its size
print(counts[-1] - counts[-11])
"""


def _faults(mode: str) -> int:
    line = [sys.executable, "-c", _PROGRAM, mode]
    return int(subprocess.run(line, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc")
def test_freed_memory_is_reused_without_page_faults():
    assert _faults("keep") < _faults("leave") / 10


def _ask(work):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        work()
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        _ask(lambda: torch.empty(2**60, dtype=torch.uint8)),
        _ask(lambda: bytearray(2**60)),
        _ask(lambda: np.empty(2**50)),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        OutOfMemory("told already"),
    ],
    ids=str,
)
def test_one_rule_says_what_is_out_of_memory(error):
    assert is_out_of_memory(error)
    with (
        pytest.raises(OutOfMemory, match=r"told already|out of memory while x"),
        memory_told("while x"),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), ValueError("out of memory"), OSError(28)]
)
def test_other_errors_are_no_lack_of_memory(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), memory_told("while x"):
        raise error
