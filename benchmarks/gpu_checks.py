"""Whether things hold on a GPU: the parts of `benchmarks.gpu` that pass or fail."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import steps as usual
from benchmarks.floor import random_batch
from benchmarks.gpu_speed import row_major_images, timed
from benchmarks.timing import device
from benchmarks.training import OURS, run_apart, started
from first_stage.config import Config, parse_config
from first_stage.data import images_from_pixels
from first_stage.distributed.processes import Processes
from first_stage.metrics.precision import full_float32
from first_stage.models.families import family_named
from first_stage.models.first_stage import FirstStage
from first_stage.models.quantizers import nearest
from first_stage.training.data import make_accelerator
from first_stage.training.endings import OutOfMemory, memory_told
from first_stage.training.step import Trainer
from latent_tools.build.encoder import BatchSplitter, LatentEncoder

if TYPE_CHECKING:
    from benchmarks.gpu import Setting

CLOSE = 1e-3
"""Largest difference of two gradients, relative to the largest value, that counts as equal."""
_ROOT = Path(__file__).resolve().parent.parent
_TESTS = _ROOT / "tests" / "test_gpu.py"
_IMPOSSIBLE = 2**50


def equality(setting: Setting) -> dict[str, Any]:
    """Largest relative differences between fast paths and plain ones, in full float32.

    Raises:
        AssertionError: When one of them is not small.
    """
    plain = _small(setting)
    with full_float32():
        ours = _gradient(plain)
        found = {
            "one backward pass against the sum of the losses": _apart(ours, _usual_gradient(plain)),
            "channels-last against row-major": _apart(ours, _gradient(plain, row_major=True)),
        }
        compiled = dataclasses.replace(plain.train, compile=True)
        if not setting.rehearsal:
            path = _gradient(dataclasses.replace(plain, train=compiled))
            found["compiled against plain"] = _apart(ours, path)
        vectors, codes = torch.randn(5000, 8), torch.randn(300, 8)
        there = nearest(vectors.to(device()), codes.to(device())).cpu()
        found["nearest codes that differ"] = (
            (there != nearest(vectors, codes)).double().mean().item()
        )
    assert max(found.values()) < CLOSE, found
    return {"largest_differences": found}


def _small(setting: Setting) -> Config:
    flags = ("--train.precision", "no", "--loss.balance.kind", "fixed", "--train.batch_size", "4")
    small = ("--model.block_out_channels", "[32,32]", "--model.norm_num_groups", "8")
    more = () if setting.rehearsal else (*small, "--data.resolution", "64")
    return started(parse_config(setting.recipe("kl_f8", *flags, *more)))


def _gradient(config: Config, row_major: bool = False) -> list[Tensor]:
    """The first stage's gradient of a step by our form, on its first step with all terms."""
    trainer, seen = _trained(config), []
    if row_major:
        usual.as_written(trainer)
        trainer.first_stage.network.eval()

    def look(_step: int, players: dict[str, Any]) -> None:
        seen.extend(p.grad.clone() for p in players["first_stage"].parameters)

    laid = row_major_images() if row_major else contextlib.nullcontext()
    with mock.patch.object(trainer, "_update", look), laid:
        trainer.training_step(1, [random_batch(trainer).to(trainer.accelerator.device)])
    return seen


def _usual_gradient(config: Config) -> list[Tensor]:
    """The same by differentiating the sum of the losses."""
    trainer = _trained(config)
    batch = random_batch(trainer).to(trainer.accelerator.device)
    images, one = images_from_pixels(batch.pixels), torch.ones((), device=batch.pixels.device)
    with mock.patch.object(usual, "_adaptive_weight", return_value=one):
        loss, _ = usual.first_stage_loss(trainer, images, trainer.noise(batch))
    return list(torch.autograd.grad(loss, trainer.first_stage.parameters))


def _trained(config: Config) -> Trainer:
    """After one step without an effect: now the layers' sizes are known."""
    trainer = Trainer(config, make_accelerator(config.train, config.output_dir), Processes())
    for player in (trainer.first_stage, trainer.critic):
        if player is not None:
            player.learning_rate = 0.0
    torch.manual_seed(0)  # of the batches that follow
    trainer.training_step(0, [random_batch(trainer).to(trainer.accelerator.device)])
    return trainer


def _apart(found: list[Tensor], expected: list[Tensor]) -> float:
    scale = max(e.abs().max().item() for e in expected)
    apart = max((f - e).abs().max().item() for f, e in zip(found, expected, strict=True))
    return apart / scale


def gpu_tests(setting: Setting) -> dict[str, Any]:
    """The tests marked `gpu`; in a rehearsal they are only collected.

    Raises:
        AssertionError: When one fails.
    """
    line = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    line += [str(_TESTS)]
    line += ["--collect-only"] if setting.rehearsal else []
    done = subprocess.run(line, cwd=_ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1]
    assert done.returncode == 0, f"{last}\n{done.stdout[-2000:]}"
    return {"pytest": last}


def out_of_memory(setting: Setting) -> dict[str, Any]:
    """Training says in a line what needs less; caching halves its batch and goes on.

    Raises:
        AssertionError: When either does otherwise.
    """
    config = started(parse_config(setting.recipe("kl_f8", "--train.precision", "bf16")))
    trainer = Trainer(config, make_accelerator(config.train, config.output_dir), Processes())
    batch = random_batch(trainer).to(trainer.accelerator.device)
    try:
        with memory_told(config, 1, lambda: "Nothing was saved"), _little_memory():
            trainer.training_step(0, [batch])
            torch.empty(_IMPOSSIBLE, dtype=torch.uint8, device=batch.pixels.device)
        raise AssertionError("a step ran in no memory")
    except OutOfMemory as error:
        told = str(error)
    del trainer, batch
    splitter = BatchSplitter(_Greedy(setting), 16)
    latents = splitter(torch.rand(16, 3, 32, 32, device=device()))
    assert latents.shape[0] == 16
    assert splitter.batch_size < 16, "the batch was never halved"
    return {"training_says": told, "batch_that_fits": splitter.batch_size}


def _little_memory() -> Any:
    """The device's allocator gives no more than it gave already."""
    if not torch.cuda.is_available():
        return mock.Mock(__enter__=lambda _: None, __exit__=lambda *_: None)
    return _Fraction()


class _Fraction:
    """Half a GiB above what is held, for the time being."""

    def __enter__(self) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(
            min((torch.cuda.memory_reserved() + 2**29) / total, 1.0)
        )

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_per_process_memory_fraction(1.0)


class _Greedy(LatentEncoder):
    """An encoder that asks for more memory than there is for more than four images."""

    def __init__(self, setting: Setting):
        config = parse_config(setting.recipe("kl_f8"))
        family = family_named("kl")
        super().__init__(FirstStage(family.build(config.model, 32), family), device())

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) > 4:
            torch.empty(_IMPOSSIBLE, dtype=torch.uint8, device=images.device)
        return super().__call__(images)


def eight_bit(setting: Setting) -> dict[str, Any]:
    """AdamW with 8-bit states: speed and memory against our own."""
    if importlib.util.find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        return {"skipped": "bitsandbytes is not installed, or there is no GPU"}
    found = {}
    for name in ("adamw", "adamw_8bit"):
        flags = ("--train.precision", "bf16", "--train.optimizer", name)
        _, found[name] = timed(parse_config(setting.recipe("kl_f8", *flags)), OURS, setting.seconds)
    return found


def two_devices(setting: Setting) -> dict[str, Any]:
    """One process and two, each with a device and a batch of its own; in a rehearsal by gloo."""
    if not setting.rehearsal and torch.cuda.device_count() < 2:
        return {"skipped": "one device is here"}
    recipe = setting.recipe("kl_f8", "--train.precision", "no" if setting.rehearsal else "bf16")
    batch = parse_config(recipe).train.batch_size
    one = run_apart(recipe, OURS, setting.seconds, threads=1)
    both = [*recipe, "--train.batch_size", str(2 * batch)]
    two = run_apart(both, OURS, setting.seconds, processes=2, threads=1)
    return {"one": one, "two": two, "times": two["images_per_second"] / one["images_per_second"]}
