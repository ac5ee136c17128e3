"""Where float64 is computed: Apple's GPUs have none."""

import torch
from torch import Tensor

_HAVE_IT = ("cpu", "cuda")


def float64_device(device: torch.device) -> torch.device:
    """The device itself where it has float64, or else the CPU."""
    return device if device.type in _HAVE_IT else torch.device("cpu")


def in_float64(values: Tensor) -> Tensor:
    """Values in float64, without a graph; on the CPU where their own device has no float64."""
    return values.detach().to(float64_device(values.device)).double()
