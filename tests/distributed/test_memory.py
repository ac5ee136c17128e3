import subprocess
import sys

import pytest

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
