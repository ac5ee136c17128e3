"""Does a fine-tune fit: bytes and operations of a training step, counted without computing it.

The step of training itself runs on tensors that have shapes and no values, so a first stage of any
size is counted within seconds on any machine. What is counted is what an allocator would be asked
for: weights, gradients, optimizer, average and critic once, and on top of them the most that a step
holds at a time. What is not: a device's context and libraries (about half a GB on NVIDIA's),
workspaces of its convolutions, and gaps between blocks.
"""

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from first_stage.config import Config, parse_config
from first_stage.data import Batch
from first_stage.distributed.processes import Processes
from first_stage.losses.lagged_means import LaggedMeans
from first_stage.training import step as training
from first_stage.training.step import Trainer

_GB = 2**30
_CARDS = (8, 12, 16, 24)
_CONTEXT = 0.5 * _GB
"""What a device's context and libraries take, about."""


class Allocated(TorchDispatchMode):
    """Bytes of the storages that are alive, their peak, and operations, while this mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count the storages of its results that are new."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Bytes:
    """What a step takes.

    Attributes:
        standing: Between two steps: weights, optimizer's moments, average, critic.
        peak: The most at a time, gradients and activations included.
        flops: Floating-point operations of its convolutions and matrix products.
    """

    standing: int
    peak: int
    flops: int


def step_bytes(config: Config) -> Bytes:
    """Count a step of a recipe in which everything is at work.

    Args:
        config: Whose `train.batch_size` is also the micro-batch. No weights are read.
    """
    count, height = config.train.batch_size, config.data.resolution
    size = (count, height, height, config.model.in_channels)
    with _on_paper(half=config.train.precision != "no") as allocated:
        trainer = Trainer(config, Accelerator(cpu=True, mixed_precision="no"), Processes())
        last = min(config.train.encoder_steps or config.train.max_steps, config.train.max_steps)
        before = allocated.peak = allocated.now
        batch = Batch(torch.zeros(size, dtype=torch.uint8), list(range(count)), [""] * count)
        trainer.training_step(last - 1, [batch])
        # The optimizers' moments are made at a step's end; in later steps they are there before.
        moments = allocated.now - before
        return Bytes(allocated.now, allocated.peak + moments, allocated.flops)


@contextlib.contextmanager
def _on_paper(half: bool) -> Iterator[Allocated]:
    """Tensors without values; whatever would read one, or move weights about, is left out."""

    def autocast(_accelerator: Accelerator) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=half)

    def with_autocast(accelerator: Accelerator, model: torch.nn.Module) -> torch.nn.Module:
        model.forward = autocast(accelerator)(model.forward)  # type: ignore[method-assign]
        return model

    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        Allocated() as allocated,
        mock.patch.object(LaggedMeans, "finish_step", return_value=None),
        mock.patch.object(training, "lay_out", return_value=None),
        mock.patch.object(Accelerator, "prepare_model", with_autocast),
        mock.patch.object(Accelerator, "autocast", autocast),
    ):
        yield allocated


def benchmark_memory(recipe: list[str], batches: tuple[int, ...] = (4, 8)) -> dict[str, Any]:
    """Count a recipe's step with and without gradient checkpointing, float32 and bf16.

    Args:
        recipe: Arguments of training; `model.pretrained` is not read.
        batches: Two sizes of the micro-batch, whose difference is what an image takes: large ones,
            with which activations are most of it.

    Returns:
        By precision and checkpointing: bytes, and how many images fit which card.
    """
    found: dict[str, Any] = {}
    for precision in ("no", "bf16"):
        for checkpointing in (False, True):
            counted = [step_bytes(_variant(recipe, precision, checkpointing, n)) for n in batches]
            each = (counted[1].peak - counted[0].peak) / (batches[1] - batches[0])
            fixed = counted[0].peak - batches[0] * each
            fits = {f"{gb} GB": int(max(gb * _GB - _CONTEXT - fixed, 0) // each) for gb in _CARDS}
            name = f"{precision}{', checkpointing' if checkpointing else ''}"
            found[name] = {"standing": counted[0].standing, "fixed": fixed, "image": each,
                           "flops": counted[0].flops / batches[0], **fits}  # fmt: skip
    print(
        f"{'':22} between steps  in a step  an image  TFLOP an image  images that fit {_CARDS} GB"
    )
    for name, v in found.items():
        sizes = "".join(f"{v[key] / _GB:11.2f}" for key in ("standing", "fixed", "image"))
        fit = ", ".join(str(v[f"{gb} GB"]) for gb in _CARDS)
        print(f"{name:22} {sizes} {v['flops'] / 1e12:10.2f}    {fit}")
    return found


def _variant(recipe: list[str], precision: str, checkpointing: bool, images: int) -> Config:
    flags = {
        "train.precision": precision, "train.batch_size": images, "train.micro_batch_size": "null",
        "model.gradient_checkpointing": str(checkpointing).lower(), "model.pretrained": "null",
        "train.tracker": "none", "data.path": "photos",
    }  # fmt: skip
    line = [*recipe, *(part for k, v in flags.items() for part in (f"--{k}", str(v)))]
    config = parse_config(line)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, compile=False))
