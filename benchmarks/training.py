"""Our training step against the usual forms of it."""

import contextlib
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from benchmarks.floor import matrix_rate, random_batch, step_flops
from benchmarks.steps import as_written, one_pass_step, two_pass_step
from benchmarks.timing import Stopwatch, peak_memory, show_turn, spread, synchronise, text
from first_stage.config import Config, parse_config
from first_stage.data import Batch, StepSampler
from first_stage.distributed.processes import Processes
from first_stage.models.vgg import VGG16Features
from first_stage.training.data import make_accelerator, open_data, open_loader, open_stream
from first_stage.training.step import Trainer

COMMAND = Path(__file__).with_name("__main__.py")
OURS = "ours"
EQUAL = "one pass, all else equal"
ONE, TWO = "one pass, as written", "two passes, as written"


class Form(NamedTuple):
    """A form of the step.

    Attributes:
        step: One step.
        as_written: With layout, mode, optimizer and average as public trainers have them; else
            with ours.
    """

    step: Callable[[Trainer, Batch], None]
    as_written: bool


FORMS = {
    EQUAL: Form(one_pass_step, False),
    ONE: Form(one_pass_step, True),
    TWO: Form(two_pass_step, True),
}


def benchmark_train(recipe: list[str], repeats: int, seconds: float) -> dict[str, Any]:
    """Time our step against the usual forms, in turns.

    Args:
        recipe: `--config FILE` and flags, as for training.
        repeats: Turns.
        seconds: About how long a variant runs in a turn.

    Returns:
        Everything that was measured, ready for JSON.
    """
    config = started(parse_config(recipe))
    names = [OURS, *FORMS]
    variants = {name: Variant(name, config) for name in names}
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
    flops = {
        name: step_flops(config, FORMS[name].step if name in FORMS else None) for name in names
    }
    memory = {name: run_apart(recipe, name)["peak_memory_bytes"] for name in names}
    print(
        f"\n{'form of the step':30} {'images/s':>22} {'ours is':>20} {'flops':>11} {'memory':>11}"
    )
    table = {}
    for name in names:
        ratios = [a / b for a, b in zip(speeds[OURS], speeds[name], strict=True)]
        table[name] = {
            "images_per_second": spread(speeds[name]),
            "ours_is_times": spread(ratios),
            "flops_are_times": flops[name] / flops[OURS],
            "peak_memory_bytes": memory[name],
        }
        print(
            f"{name:30} {text(speeds[name], '.1f'):>22} {text(ratios, '.2f') + 'x':>20} "
            f"{flops[name] / flops[OURS]:>10.2f}x {memory[name] / 2**20:>7.0f} MiB"
        )
    needed, rate = flops[OURS], matrix_rate(config.train.precision)
    floor = rate / needed * config.train.batch_size
    share = statistics.median(speeds[OURS]) / floor
    print(
        f"floor: {needed / config.train.batch_size / 1e9:.2f} GFLOP per image at the measured "
        f"{rate / 1e9:.0f} GFLOP/s of matrix products allow {floor:.1f} images/s; ours reaches "
        f"{share:.0%}"
    )
    parts = variants[OURS].parts(steps)
    print("parts of our step: " + ", ".join(f"{k} {v:.0%}" for k, v in parts.items()))
    loaded = data_rate(config, seconds)
    print(f"data: the recipe's own loader alone gives {loaded:.0f} images/s")
    return {
        "steps": table,
        "flops_per_image": needed / config.train.batch_size,
        "matrix_flops_per_second": rate,
        "share_of_floor": share,
        "parts": parts,
        "data_images_per_second": loaded,
        "batch_size": config.train.batch_size,
        "resolution": config.data.resolution,
        "precision": config.train.precision,
    }


def run_one(recipe: list[str], name: str, seconds: float) -> dict[str, float]:
    """Speed and peak memory of one form of the step in this process, or in those of a launch."""
    variant = Variant(name, started(parse_config(recipe)))
    trainer = variant.trainer
    variant.run(2)
    # All processes of a launch must make the same number of steps.
    wanted = torch.tensor(seconds / variant.run(1), device=trainer.accelerator.device)
    steps = max(1, round(trainer.processes.average(wanted).item()))
    speed = trainer.config.train.batch_size / variant.run(steps)
    # All leave together: a process that is still talking to one that left would abort.
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    world = trainer.processes.world
    return {"images_per_second": speed, "peak_memory_bytes": peak_memory(), "processes": world}


def run_apart(
    recipe: list[str],
    name: str,
    seconds: float = 0.0,
    processes: int = 1,
    threads: int | None = None,
) -> dict[str, float]:
    """`run_one` in processes of its own.

    Args:
        recipe: As for training.
        name: The form of the step.
        seconds: About how long it runs.
        processes: Of the launch; the batch is divided over them.
        threads: CPU threads of each; `None` leaves the choice to torch.

    Returns:
        `images_per_second` of all processes, `peak_memory_bytes` of the first.
    """
    launch = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--dynamo_backend", "no"]
    launch += ["--mixed_precision", "no", "--num_processes", str(processes)]
    launch += ["--multi_gpu"] if processes > 1 else []
    line = [sys.executable, *launch, str(COMMAND), "train", "--only", name]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads or torch.get_num_threads())}
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    result = subprocess.run(
        [*line, "--seconds", str(seconds), *recipe],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if result.returncode != 0:
        raise RuntimeError(f"{name} failed in a process of its own:\n{result.stderr[-2000:]}")
    # Every process prints its own; the first one to come is as good as any.
    found: dict[str, float] = json.JSONDecoder().raw_decode(
        result.stdout, result.stdout.index("{")
    )[0]
    if found["processes"] != processes:
        raise RuntimeError(f"{found['processes']} processes ran instead of {processes}")
    return found


@contextlib.contextmanager
def random_vgg(recipe: list[str]) -> Iterator[list[str]]:
    """The recipe with a VGG16 term of random weights, which cost what trained ones do."""
    with TemporaryDirectory() as folder:
        file = f"{folder}/vgg16-random.safetensors"
        save_file(VGG16Features().state_dict(), file)
        field = "--loss.pretrained"
        yield [*recipe, f"{field}.weights", file, f"{field}.vgg_weight", "0.1"]


def started(config: Config) -> Config:
    """The recipe with every term entered: what a step costs once all is running."""
    now = {"start_step": 0, "ramp_steps": 0}
    learned = dataclasses.replace(config.loss.learned, **now)
    adversarial = dataclasses.replace(config.loss.adversarial, **now)
    loss = dataclasses.replace(config.loss, learned=learned, adversarial=adversarial)
    critic = dataclasses.replace(config.critic, start_step=0)
    steps = {"max_steps": 10**9, "encoder_steps": None, "warmup_steps": 0, "decay_steps": 0}
    train = dataclasses.replace(config.train, **steps)
    return dataclasses.replace(config, loss=loss, critic=critic, train=train)


class Variant:
    """One form of the step, with players of its own.

    Args:
        name: `ours` or a name in `FORMS`.
        config: The recipe.
    """

    def __init__(self, name: str, config: Config):
        self.name = name
        accelerator = make_accelerator(config.train, config.output_dir)
        self.trainer = Trainer(config, accelerator, Processes())
        self.batch = random_batch(self.trainer).to(accelerator.device)
        self.done = 0
        if name != OURS and FORMS[name].as_written:
            as_written(self.trainer)

    def step(self) -> None:
        """Run one step on the same batch; the clocks differ, not the work."""
        if self.name == OURS:
            self.trainer.training_step(self.done, [self.batch])
        else:
            FORMS[self.name].step(self.trainer, self.batch)
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
        trainer, objective, critic = self.trainer, self.trainer.objective, self.trainer.critic
        network = next(iter(objective.surroundings.networks), None)
        with (
            clock.around(trainer.first_stage.module, "forward", "first-stage forward"),
            clock.around(critic.module if critic else None, "forward", "critic forward"),
            clock.around(network, "forward", "pretrained forward"),
            clock.around(objective.terms.get("learned"), "value", "learned distance forward"),
            clock.around(objective.balance, "weighted", "balance"),
            clock.around(objective, "gradient", "losses down to the pixels"),
            clock.around(trainer.accelerator, "backward", "backward of both players"),
            clock.around(trainer, "_update", "clipping, optimizers, EMA"),
        ):
            total = self.run(steps) * steps
        return clock.shares(total)


def data_rate(config: Config, seconds: float) -> float:
    """Images per second of the recipe's own loader, with nothing beside it."""
    processes = Processes()
    sizes = {"seed": config.seed, "batch_size": config.train.batch_size}
    folder = Path(config.output_dir)
    source, _ = open_data(config.data, folder=folder, processes=processes, **sizes)
    stream = open_stream(source, config.data, channels=config.model.in_channels, **sizes)
    size = config.train.batch_size
    sampler = StepSampler(size, size, range(config.train.max_steps), 0, 1)
    batches = iter(open_loader(stream, sampler, workers=config.data.workers, pin_memory=False))
    next(batches)
    began, count = time.perf_counter(), 0
    for _ in itertools.takewhile(lambda _: time.perf_counter() - began < seconds, batches):
        count += size
    return count / (time.perf_counter() - began)
