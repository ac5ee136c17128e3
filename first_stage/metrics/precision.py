"""The precision of measurements: float64 where a device has it, float32 without shortcuts."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

_HAVE_FLOAT64 = ("cpu", "cuda")


def float64_device(device: torch.device) -> torch.device:
    """The device itself where it has float64, or else the CPU: Apple's GPUs have none."""
    return device if device.type in _HAVE_FLOAT64 else torch.device("cpu")


def in_float64(values: Tensor) -> Tensor:
    """Values in float64, without a graph; on the CPU where their own device has no float64."""
    return values.detach().to(float64_device(values.device)).double()


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 in float32: NVIDIA's TensorFloat-32 shows in the third digit.

    Convolutions take it unless told otherwise, and so do matrix products under `train.tf32`. What
    is measured, and what decides which code is the nearest, must not depend on it.
    """
    before, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn


def use_tf32(wanted: bool) -> None:
    """Have float32 convolutions and matrix products on NVIDIA GPUs take 10 bits of a mantissa."""
    torch.backends.cudnn.allow_tf32 = wanted
    torch.set_float32_matmul_precision("high" if wanted else "highest")
