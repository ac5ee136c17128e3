"""How fast things are on a GPU: the parts of `benchmarks.gpu` that are timed."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from benchmarks.caching import OURS as OUR_CACHE
from benchmarks.caching import benchmark_cache
from benchmarks.floor import matrix_rate, step_flops
from benchmarks.reading import benchmark_read
from benchmarks.timing import peak_memory, synchronise
from benchmarks.training import EQUAL, ONE, OURS, TWO, Variant, started
from first_stage.config import Config, parse_config
from first_stage.data import images_from_pixels
from first_stage.distributed.processes import Processes
from first_stage.training import compiling

if TYPE_CHECKING:
    from benchmarks.gpu import Setting


def timed(config: Config, name: str, seconds: float) -> tuple[Variant, dict[str, Any]]:
    """One form of the step alone on the device: images/s, and the most memory it held."""
    began = time.perf_counter()
    variant = Variant(name, started(config))
    variant.run(3)
    first = time.perf_counter() - began
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    steps = max(2, round(seconds / variant.run(1)))
    speed = config.train.batch_size / variant.run(steps)
    found = {"images_per_second": speed, "peak_memory_bytes": peak_memory()}
    return variant, {**found, "seconds_until_it_ran": first, "steps": steps}


def steps(setting: Setting, recipe: str, precision: str, compiled: bool) -> dict[str, Any]:
    """Our step of a recipe, its share of the floor, and where its time goes."""
    flags = ["--train.precision", precision, "--train.compile", str(compiled).lower()]
    config = parse_config(setting.recipe(recipe, *flags))
    with mock.patch.object(compiling, "BACKEND", "aot_eager" if setting.rehearsal else "inductor"):
        variant, found = timed(config, OURS, setting.seconds)
    parts = {} if compiled else variant.parts(3)
    del variant
    plain = dataclasses.replace(config, train=dataclasses.replace(config.train, compile=False))
    flops, rate = step_flops(started(plain)), matrix_rate(precision)
    share = found["images_per_second"] / config.train.batch_size * flops / rate
    return {**found, "share_of_floor": share, "matrix_flops_per_second": rate, "parts": parts}


def forms(setting: Setting) -> dict[str, Any]:
    """Our step against the usual ones, each alone on the device; ours before and after them."""
    config = parse_config(setting.recipe("kl_f8", "--train.precision", "bf16"))
    found: dict[str, Any] = {}
    for label, name in ((OURS, OURS), (EQUAL, EQUAL), (ONE, ONE), (TWO, TWO), ("again", OURS)):
        variant, found[label] = timed(config, name, setting.seconds)
        del variant
    ours = found[OURS]
    mean = (ours["images_per_second"] + found["again"]["images_per_second"]) / 2
    for name in (EQUAL, ONE, TWO):
        found[name]["ours_is_times"] = mean / found[name]["images_per_second"]
    less = ours["peak_memory_bytes"] < found[TWO]["peak_memory_bytes"]
    return {"forms": found, "memory_below_two_passes": less}


def layouts(setting: Setting) -> dict[str, Any]:
    """Our step with channels-last weights and images, and with row-major ones."""
    config = parse_config(setting.recipe("kl_f8", "--train.precision", "bf16"))
    variant, ours = timed(config, OURS, setting.seconds)
    trainer = variant.trainer
    for player in (trainer.first_stage, trainer.critic):
        if player is not None:
            _lay_row_major(player.network, player.optimizer)
    trainer.ema.shadow_params = [p.contiguous() for p in trainer.ema.shadow_params]
    with row_major_images():
        variant.run(3)
        speed = config.train.batch_size / variant.run(ours["steps"])
    return {"channels_last": ours["images_per_second"], "row_major": speed}


def row_major_images() -> contextlib.AbstractContextManager[Any]:
    """Steps see row-major images; channels-last ones would turn every layer to their layout."""
    return mock.patch(
        "first_stage.training.step.images_from_pixels",
        lambda pixels: images_from_pixels(pixels).contiguous(),
    )


def _lay_row_major(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for entries in optimizer.state.values():  # the fused update walks them side by side
        entries |= {k: v.contiguous() for k, v in entries.items() if torch.is_tensor(v)}


def quantizer(setting: Setting) -> dict[str, Any]:
    """The codebook's part of a step: its passes, and what follows the update."""
    config = parse_config(setting.recipe("vq_f8", "--train.precision", "bf16"))
    variant, found = timed(config, OURS, setting.seconds)
    trainer, step = variant.trainer, config.train.batch_size / 1.0
    stage = trainer.first_stage.network
    bottleneck = stage.bottleneck
    shape = (config.train.batch_size, *stage.latent_shape(config.data.resolution))
    latents = torch.randn(shape, device=trainer.accelerator.device, requires_grad=True)

    def quantize() -> None:
        code = bottleneck(latents)
        penalties = torch.stack([p.mean() for p in code.penalties.values()]).sum()
        (code.latents.sum() + penalties).backward()
        bottleneck.finish_step(1, Processes(), 0)

    own = seconds_of(quantize, found["steps"])
    whole = step / found["images_per_second"]
    return {"step_seconds": whole, "quantizer_seconds": own, "share": own / whole}


def seconds_of(act: Callable[[], None], times: int) -> float:
    """Mean seconds of an act, once it ran three times."""
    for _ in range(3):
        act()
    synchronise()
    began = time.perf_counter()
    for _ in range(times):
        act()
    synchronise()
    return (time.perf_counter() - began) / times


def caching(setting: Setting) -> dict[str, Any]:
    """Files to a finished cache, against the encoder alone and the plain loops."""
    recipe = setting.recipe("kl_f8", "--train.precision", "bf16")
    side = parse_config(recipe).data.resolution
    table = benchmark_cache(recipe, setting.images, side, 1)
    ours = table[OUR_CACHE]["per_second"]["median"]
    return {"table": table, "share_of_encoder": ours / table["encode only"]["per_second"]["median"]}


def reading(setting: Setting) -> dict[str, Any]:
    """Cached latents behind a loader, against a file per image."""
    return {"table": copy.deepcopy(benchmark_read(setting.latents, (4, 32, 32), 1))}
