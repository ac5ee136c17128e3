"""Measure speed side by side, in one run, on the same work.

    python scripts/benchmark.py train --config configs/demo.yaml
    python scripts/benchmark.py cache --config configs/demo.yaml --images 2000
    python scripts/benchmark.py read --latents 20000

Machines differ and are noisy: what is compared takes turns within one run, ratios are taken turn by
turn, and the median is printed with the smallest and largest value.
"""

import argparse
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from benchmark_steps import one_pass_step, two_pass_step
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

import first_stage
from first_stage.autoencoder import build_autoencoder
from first_stage.config import Config, parse_config
from first_stage.data import Batch, Sample, Source, open_source
from first_stage.data.sources import ListSource
from first_stage.errors import run_command
from first_stage.files import write_json
from first_stage.processes import Processes
from first_stage.trainer import Trainer, make_first_stage
from latent_tools import LatentDataset
from latent_tools.benchmark import cache_rates
from latent_tools.encode import precompute
from latent_tools.options import CacheOptions

OURS = "ours"
STEPS: dict[str, Callable[[Trainer, Batch], None]] = {
    "one pass, autograd.grad twice": one_pass_step,
    "two passes, autograd.grad twice": two_pass_step,
}


# -- train -------------------------------------------------------------------------------------


def benchmark_train(
    recipe: list[str], repeats: int, seconds: float, only: str | None = None
) -> dict[str, Any]:
    """Time our step against the usual forms, in turns.

    Args:
        recipe: `--config FILE` and flags, as for training.
        repeats: Turns.
        seconds: About how long a variant runs in a turn.
        only: Run this variant for two steps, and report the process's peak memory alone.

    Returns:
        Everything that was measured, ready for JSON.
    """
    config = started(parse_config(recipe))
    names = [OURS, *STEPS] if only is None else [only]
    variants = {name: Variant(name, config) for name in names}
    if only is not None:
        variants[only].run(2)
        return {"peak_memory_bytes": peak_memory(variants[only].trainer)}
    for variant in variants.values():
        variant.run(3)
    steps = max(2, round(seconds / variants[OURS].run(2)))
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        # The forms alternate step by step, so that a machine whose speed drifts slows them alike.
        elapsed = dict.fromkeys(names, 0.0)
        for number in range(steps):
            for name in names if number % 2 == 0 else reversed(names):
                elapsed[name] += variants[name].run(1)
        for name in names:
            speeds[name].append(config.train.batch_size * steps / elapsed[name])
        show_turn(turn, repeats, speeds)
    ours = variants[OURS]
    needed, rate = step_flops(config), matrix_rate(config.train.precision)
    floor = rate / needed * config.train.batch_size
    memory = {name: memory_apart(recipe, name) for name in names}
    print(f"\n{'form of the step':34} {'images/s':>22} {'ours is':>18} {'peak memory':>12}")
    table = {}
    for name in names:
        ratios = [a / b for a, b in zip(speeds[OURS], speeds[name], strict=True)]
        table[name] = {
            "images_per_second": spread(speeds[name]),
            "ours_is_times": spread(ratios),
            "peak_memory_bytes": memory[name],
        }
        print(
            f"{name:34} {text(speeds[name], '.1f'):>22} {text(ratios, '.2f') + 'x':>18} "
            f"{memory[name] / 2**20:>8.0f} MiB"
        )
    share = statistics.median(speeds[OURS]) / floor
    print(
        f"floor: {needed / config.train.batch_size / 1e9:.1f} GFLOP per image at the measured "
        f"{rate / 1e9:.0f} GFLOP/s of matrix products allow {floor:.1f} images/s; ours reaches "
        f"{share:.0%}"
    )
    parts = ours.parts(steps)
    print("parts of our step: " + ", ".join(f"{k} {v:.0%}" for k, v in parts.items()))
    return {
        "steps": table,
        "flops_per_image": needed / config.train.batch_size,
        "matrix_flops_per_second": rate,
        "share_of_floor": share,
        "parts": parts,
        "batch_size": config.train.batch_size,
        "resolution": config.data.resolution,
        "precision": config.train.precision,
    }


def started(config: Config) -> Config:
    """The recipe with every term entered: what a step costs once all is running."""
    now = {"start_step": 0, "ramp_steps": 0}
    learned = dataclasses.replace(config.loss.learned, **now)
    adversarial = dataclasses.replace(config.loss.adversarial, **now)
    loss = dataclasses.replace(config.loss, learned=learned, adversarial=adversarial)
    critic = dataclasses.replace(config.critic, start_step=0)
    train = dataclasses.replace(config.train, max_steps=10**9, warmup_steps=0, decay_steps=0)
    return dataclasses.replace(config, loss=loss, critic=critic, train=train)


class Variant:
    """One form of the step, with players of its own.

    Args:
        name: `ours` or a name in `STEPS`.
        config: The recipe.
    """

    def __init__(self, name: str, config: Config):
        self.name = name
        self.trainer = Trainer(
            config, Accelerator(mixed_precision=config.train.precision), Processes()
        )
        self.batch = random_batch(self.trainer).to(self.trainer.accelerator.device)
        self.done = 0
        if name != OURS:
            as_usual(self.trainer)

    def step(self) -> None:
        """Run one step on the same batch; the clocks differ, not the work."""
        if self.name == OURS:
            self.trainer.training_step(self.done, [self.batch])
        else:
            STEPS[self.name](self.trainer, self.batch)
        self.done += 1

    def run(self, steps: int) -> float:
        """Seconds per step."""
        synchronise()
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronise()
        return (time.perf_counter() - began) / steps

    def parts(self, steps: int) -> dict[str, float]:
        """Share of the time that each part of our step takes."""
        clock = Stopwatch()
        trainer, objective = self.trainer, self.trainer.objective
        with (
            clock.around(trainer.first_stage.module, "forward", "first-stage forward"),
            clock.around(trainer.critic.module, "forward", "critic forward")
            if trainer.critic
            else clock.nothing(),
            clock.around(objective.balance, "weighted", "balance"),
            clock.around(objective, "gradient", "losses down to the pixels"),
            clock.around(trainer.accelerator, "backward", "backward"),
            clock.around(trainer, "_update", "clipping, optimizers, EMA"),
        ):
            total = self.run(steps) * steps
        return clock.shares(total)


class NoModules:
    """Stands in for the flop counter's module tracker, whose hooks `autograd.grad` cannot bear."""

    parents = frozenset({"Global"})

    def __enter__(self) -> "NoModules":
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Stopwatch:
    """Time spent inside functions, those inside them not counted."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner: list[float] = []

    @contextmanager
    def around(self, owner: Any, function: str, name: str) -> Iterator[None]:
        """Time a function of an object under a name."""
        original = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            synchronise()
            began = time.perf_counter()
            self._inner.append(0.0)
            result = original(*args, **kwargs)
            synchronise()
            elapsed = time.perf_counter() - began
            own = elapsed - self._inner.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + own
            if self._inner:
                self._inner[-1] += elapsed
            return result

        with mock.patch.object(owner, function, timed):
            yield

    @contextmanager
    def nothing(self) -> Iterator[None]:
        """Time nothing."""
        yield

    def shares(self, total: float) -> dict[str, float]:
        """Each name's share of the total, and the rest."""
        shares = {name: seconds / total for name, seconds in self.seconds.items()}
        return {**shares, "rest": max(1.0 - sum(shares.values()), 0.0)}


def as_usual(trainer: Trainer) -> None:
    """What public trainers leave at its default: memory layout, optimizer, moving average."""
    trainer.ema.foreach = False
    for player in [p for p in (trainer.first_stage, trainer.critic) if p is not None]:
        player.network.to(memory_format=torch.contiguous_format)
        group = player.optimizer.param_groups[0]
        player.optimizer = torch.optim.AdamW(
            player.parameters, lr=group["lr"], betas=group["betas"]
        )


def random_batch(trainer: Trainer) -> Batch:
    """A batch of noise in memory: decoding is measured apart."""
    config = trainer.config
    side, count = config.data.resolution, config.train.batch_size
    pixels = torch.randint(0, 256, (count, side, side, config.model.in_channels), dtype=torch.uint8)
    noise = torch.randn(count, *trainer.first_stage.network.latent_shape(side))
    return Batch(pixels, noise, [""] * count)


def step_flops(config: Config) -> float:
    """Floating-point operations of one step, counted on the meta device: nothing is computed."""
    trainer = Trainer(config, Accelerator(mixed_precision=config.train.precision), Processes())
    meta = torch.device("meta")
    trainer.first_stage.network.to(meta)
    if trainer.critic is not None:
        trainer.critic.network.to(meta)
    if trainer.objective.pretrained is not None:
        trainer.objective.pretrained.to(meta)
    # The optimizers still hold the parameters that lay on the device.
    for player in [p for p in (trainer.first_stage, trainer.critic) if p is not None]:
        player.optimizer.param_groups[0]["params"] = list(player.network.parameters())
    batch = random_batch(trainer).to(meta)
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoModules()
    with mock.patch.object(trainer, "_update"), counter:
        trainer.training_step(0, [batch])
    return float(counter.get_total_flops())


def matrix_rate(precision: str) -> float:
    """Floating-point operations per second of a large matrix product on this device."""
    device = accelerator_device()
    side = 8192 if device.type == "cuda" else 1024
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(50):
        synchronise()
        began = time.perf_counter()
        a @ b
        synchronise()
        times.append(time.perf_counter() - began)
    return 2.0 * side**3 / min(times)


def peak_memory(trainer: Trainer) -> int:
    """Peak bytes of the accelerator, or of this process where there is none."""
    if trainer.accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_apart(recipe: list[str], name: str) -> int:
    """Peak memory of a variant in a process of its own."""
    line = [sys.executable, __file__, "train", "--only", name, *recipe]
    result = subprocess.run(line, capture_output=True, text=True, check=True)
    return int(json.loads(result.stdout.splitlines()[-1])["peak_memory_bytes"])


# -- what the parts share ------------------------------------------------------------------------


def accelerator_device() -> torch.device:
    """The device that training would use."""
    return Accelerator().device


def synchronise() -> None:
    """Wait until the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def text(values: list[float], form: str) -> str:
    """Median and spread in a few characters."""
    found = spread(values)
    return f"{found['median']:{form}} ({found['min']:{form}}-{found['max']:{form}})"


def show_turn(turn: int, repeats: int, speeds: dict[str, list[float]]) -> None:
    """One line per turn, so that a long run can be watched."""
    now = ", ".join(f"{name} {values[-1]:.1f}" for name, values in speeds.items())
    print(f"turn {turn + 1} of {repeats}, per second: {now}", file=sys.stderr, flush=True)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    device = accelerator_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "first_stage": first_stage.__version__,
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }


def cpu_name() -> str:
    """The processor's model."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


# -- cache ---------------------------------------------------------------------------------------


def benchmark_cache(recipe: list[str], images: int, side: int, repeats: int) -> dict[str, Any]:
    """Time a cache launch, from image files to a finished cache, against the plain loops.

    Args:
        recipe: Of the first stage to encode with (random weights: they cost the same).
        images: How many files are made and encoded.
        side: Their side in pixels; already small, so that decoding does not hide the rest.
        repeats: Turns.

    Returns:
        Images per second of everything, ready for JSON.
    """
    config = parse_config(recipe)
    torch.manual_seed(0)
    vae = make_first_stage(config.model, side).vae.eval().to(accelerator_device())
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = write_images(Path(folder) / "images", images, side)
        source = open_source(str(files))
        options = CacheOptions(resolution=side, resize=side, batch_size=config.train.batch_size)
        for turn in range(repeats):
            rates = cache_rates(vae, source, options, accelerator_device())
            now = {
                "encode only": rates.encode_only,
                "ours, files to cache": rates.end_to_end,
                "plain loop, batch 1": plain_loop(vae, source, Path(folder), side, 1),
                f"plain loop, batch {options.batch_size}": plain_loop(
                    vae, source, Path(folder), side, options.batch_size
                ),
            }
            for name, value in now.items():
                found.setdefault(name, []).append(value)
            show_turn(turn, repeats, found)
    return table_of(found, "ours, files to cache")


@torch.no_grad()
def plain_loop(vae: Any, source: Source, folder: Path, side: int, batch_size: int) -> float:
    """Images per second of the loop that people write: load, `vae.encode`, one `.npy` an image."""
    target = folder / f"npy-{batch_size}"
    target.mkdir(exist_ok=True)
    device = accelerator_device()
    synchronise()
    began = time.perf_counter()
    for first in range(0, len(source), batch_size):
        indices = range(first, min(first + batch_size, len(source)))
        arrays = []
        for index in indices:
            with Image.open(source.read(index).image) as image:
                picture = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
            arrays.append(np.asarray(picture))
        pixels = torch.from_numpy(np.stack(arrays)).to(device)
        latents = vae.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0).latent_dist.sample()
        for index, latent in zip(indices, latents.cpu().numpy(), strict=True):
            np.save(target / f"{index:06d}.npy", latent)
    return len(source) / (time.perf_counter() - began)


def write_images(folder: Path, count: int, side: int) -> Path:
    """Small JPEG files with some structure."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for index in range(count):
        coarse = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:06d}.jpg", quality=90)
    return folder


# -- read ----------------------------------------------------------------------------------------


def benchmark_read(latents: int, shape: tuple[int, int, int], repeats: int) -> dict[str, Any]:
    """Time `LatentDataset` behind a `DataLoader` against one file per image.

    Args:
        latents: How many.
        shape: `(C, h, w)` of each.
        repeats: Turns, each a shuffled pass.

    Returns:
        Items per second, memory and open files of each, ready for JSON.
    """
    found: dict[str, list[float]] = {}
    files: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = {
            "LatentDataset": lambda: LatentDataset(folder / "cache", sample="posterior"),
            "one npy per image": lambda: FilePerImage(folder / "npy", latents),
            "one npz per image": lambda: FilePerImage(folder / "npz", latents),
        }
        make_latents(folder, latents, shape)
        for turn in range(repeats):
            for kind, make in sources.items():
                found.setdefault(kind, []).append(read_rate(make()))
                files[kind] = len(os.listdir("/proc/self/fd"))
            show_turn(turn, repeats, found)
    result = table_of(found, "LatentDataset")
    for kind, count in files.items():
        result[kind]["open_files"] = count
    return result


class FilePerImage(Dataset[Any]):
    """Moments in one file per image; the posterior is drawn at load, as `LatentDataset` does.

    Args:
        folder: Of `.npy` or `.npz` files.
        count: How many.
    """

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.folder / f"{index:06d}.{self.folder.name}"
        loaded = np.load(path)
        moments = torch.from_numpy(loaded if path.suffix == ".npy" else loaded["moments"]).float()
        mean, logvar = moments.chunk(2)
        return {"latents": mean + (0.5 * logvar).exp() * torch.randn_like(mean), "label": index}


def make_latents(folder: Path, count: int, shape: tuple[int, int, int]) -> None:
    """A cache of moments by the cache's own encoder, and the same in one file per image."""
    channels, side, _ = shape
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    samples = [Sample(f"{index:06d}", Image.fromarray(n)) for index, n in enumerate(noise)]
    vae = build_autoencoder(3, channels, (8,), 1, 4, False, False, side).eval()
    options = CacheOptions(resolution=side, resize=None, batch_size=64, workers=0)
    precompute(vae, "benchmark", ListSource("noise", samples), str(folder / "cache"), options)
    raw = LatentDataset(folder / "cache", sample="raw", normalize="none")
    for kind in ("npy", "npz"):
        (folder / kind).mkdir()
    for index in range(count):
        moments = raw[index]["latents"].half().numpy()
        np.save(folder / "npy" / f"{index:06d}.npy", moments)
        np.savez(folder / "npz" / f"{index:06d}.npz", moments=moments)


def read_rate(dataset: Any) -> float:
    """Items per second of a shuffled pass in batches of 64, in this process."""
    loader = DataLoader(dataset, batch_size=64, shuffle=True, num_workers=0)
    began = time.perf_counter()
    count = sum(1 for _ in loader)
    return min(count * 64, len(dataset)) / (time.perf_counter() - began)


def table_of(found: dict[str, list[float]], ours: str) -> dict[str, Any]:
    """Print a table of rates, ours over each, and return it."""
    print(f"\n{'':34} {'per second':>24} {'ours is':>20}")
    table = {}
    for name, values in found.items():
        ratios = [a / b for a, b in zip(found[ours], values, strict=True)]
        table[name] = {"per_second": spread(values), "ours_is_times": spread(ratios)}
        print(f"{name:34} {text(values, '.1f'):>24} {text(ratios, '.2f') + 'x':>20}")
    return table


def main() -> None:
    """Run one of the three, print its tables, and write them as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Further arguments are those of training: --config FILE, --field.name value.",
    )
    parser.add_argument("what", choices=("train", "cache", "read"))
    parser.add_argument("--repeats", type=int, default=5, help="turns (default: 5)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a step form's turn, about")
    parser.add_argument("--images", type=int, default=1000, help="image files for cache")
    parser.add_argument("--side", type=int, default=64, help="their side in pixels")
    parser.add_argument("--latents", type=int, default=20000, help="latents for read")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options, recipe = parser.parse_known_args()
    recipe = recipe or ["--config", "configs/demo.yaml"]
    if options.what == "train":
        found = benchmark_train(recipe, options.repeats, options.seconds, options.only)
    elif options.what == "cache":
        found = benchmark_cache(recipe, options.images, options.side, options.repeats)
    else:
        found = benchmark_read(options.latents, (4, 32, 32), options.repeats)
    if options.only:
        print(json.dumps(found))
        return
    results = {"machine": machine(), options.what: found}
    print(f"\n{json.dumps(results['machine'])}")
    if options.json:
        write_json(options.json, results)
        print(f"written to {options.json}")


if __name__ == "__main__":
    run_command(main)
