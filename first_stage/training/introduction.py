"""What a run says of itself before its first step."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from first_stage.config.schema import Config
from first_stage.data import images_from_pixels
from first_stage.evaluation.grids import grid, save_png
from first_stage.models.bottlenecks import Bottleneck, Gaussian
from first_stage.training.step import Trainer

_COLUMNS, _ROWS = 8, 4


@dataclass(frozen=True)
class Phase:
    """Steps that cost the same, because the same things learn from the same terms.

    Attributes:
        start: Its first step.
        end: The first step after it.
        begins: What comes in with it.
    """

    start: int
    end: int
    begins: str


def phases(config: Config, bottleneck: Bottleneck) -> list[Phase]:
    """The phases of a run, in order.

    Args:
        config: The run's configuration.
        bottleneck: Of its first stage.
    """
    begins = {0: [_beginning(config, bottleneck)]}
    for start, what in _beginnings(config):
        if start < config.train.max_steps:
            begins.setdefault(start, []).append(what)
    starts = [*sorted(begins), config.train.max_steps]
    return [
        Phase(start, end, ", ".join(begins[start])) for start, end in itertools.pairwise(starts)
    ]


def _beginning(config: Config, bottleneck: Bottleneck) -> str:
    weights = {**bottleneck.weights, **config.loss.penalties}
    penalties = ["KL"] if isinstance(bottleneck, Gaussian) and config.loss.kl_weight else []
    said = " and ".join(["pixels", *penalties, *(name for name in weights if weights[name])])
    disturb = config.disturb
    changes = [field.name for field in fields(disturb) if getattr(disturb, field.name).probability]
    return f"{said}, latents disturbed by {' and '.join(changes)}" if changes else said


def _beginnings(config: Config) -> Iterator[tuple[int, str]]:
    if config.needs_critic:
        yield config.critic.start_step, "the critic learns"
    for field in fields(config.loss):
        term = getattr(config.loss, field.name)
        if getattr(term, "weight", 0) > 0 and hasattr(term, "start_step"):
            yield term.start_step, f"the {field.name} term"
    if (late := config.late_start) is not None:
        yield late, f"crops of {config.data.late_resolution} pixels"
    if (steps := config.train.encoder_steps) is not None:
        yield steps, f"the decoder learns alone{'' if steps else ' from the start'}"


def introduction(trainer: Trainer, *, micro: int, samples: int, held_out: int) -> str:
    """What a run says of itself before it begins.

    Args:
        trainer: Its trainer.
        micro: Images per forward pass of a process.
        samples: Images to train on.
        held_out: Images held out.
    """
    config, stage = trainer.config, trainer.first_stage.network
    train, world = config.train, trainer.processes.world
    sizes = f"first stage of {_millions(stage)} parameters"
    if trainer.critic is not None:
        sizes += f", critic of {_millions(trainer.critic.network)}"
    epoch = samples / train.batch_size
    seen = train.max_steps * train.batch_size / samples
    course = "; ".join(f"{p.begins} from {p.start:,}" if p.start else p.begins
                       for p in phases(config, stage.bottleneck))  # fmt: skip
    return (
        f"{'1 process' if world == 1 else f'{world} processes'} on "
        f"{_device(trainer)}, precision {train.precision}, batch of "
        f"{train.batch_size} in micro-batches of {micro}\n"
        f"{samples:,} images to train on, {held_out:,} held out, from {config.data.path}\n"
        f"{sizes}, f{stage.downsample_factor}, {stage.latent_channels} latent channels\n"
        f"{train.max_steps:,} steps, {epoch:,.1f} to an epoch: each image is seen {seen:,.1f} "
        "times\n"
        f"phases by step: {course}"
    )


def draw_first_batch(pixels: Tensor, path: Path) -> None:
    """Write the crops that a network gets first, as it gets them, as a picture.

    Args:
        pixels: `(B, H, W, C)` in 0..255; at most 32 are drawn.
        path: The PNG.
    """
    images = images_from_pixels(pixels[: _COLUMNS * _ROWS])
    rows = list(images.split(_COLUMNS))
    missing = rows[0].shape[0] - rows[-1].shape[0]
    if missing:
        white = torch.ones(missing, *images.shape[1:], device=images.device)
        rows[-1] = torch.cat([rows[-1], white])
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(grid(rows), path)


def _device(trainer: Trainer) -> str:
    """The device, and on a CPU what of it is used: accelerate gives a process one thread."""
    device, world = trainer.accelerator.device.type, trainer.processes.world
    if device != "cpu":
        return device
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    text = f"cpu with {threads} thread{'s' if threads > 1 else ''}{' each' if world > 1 else ''}"
    if (more := cores // world) > threads:
        text += f" (OMP_NUM_THREADS={more} would use all {cores} cores)"
    return text


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
