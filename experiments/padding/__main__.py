"""Decoders that pad with zeros and by reflection, on the same data, steps and seeds.

For each seed a first stage is trained from nothing with either padding, and the decoder of the one
with zeros is fine-tuned with either. Squared errors are told apart by the distance from the border.

python -m experiments.padding
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from first_stage.config.parsing import parse_config, read_options
from first_stage.config.schema import Padding
from first_stage.config.types import PositiveInt
from first_stage.data import StepSampler, View, fixed_images, images_from_pixels, open_source
from first_stage.distributed.processes import Processes
from first_stage.errors import run_command
from first_stage.files import write_json
from first_stage.models.first_stage import FirstStage, reconstruct
from first_stage.models.loading import load_autoencoder
from first_stage.models.padding import set_padding
from first_stage.training.data import make_accelerator, open_data, open_loader, open_stream
from first_stage.training.step import Trainer

_RECIPE = str(Path(__file__).parents[1] / "finetune" / "photos.yaml")
_SMALL = ("--model.block_out_channels", "[16,32,32]", "--model.norm_num_groups", "8")
_PHOTO, _SIDE = 256, 64
RINGS = {"outermost": (0, 1), "1 to 3": (1, 4), "outer 8": (0, 8), "inside 16": (16, _SIDE // 2)}
"""Distances from the border, in pixels."""
_PADDINGS: tuple[Padding, ...] = ("zeros", "reflect")


@dataclass(frozen=True)
class Options:
    """Train first stages with either padding, and measure them at the border and inside."""

    output: str = "runs/padding"
    """Folder for everything that is made; what is finished in it is kept."""
    steps: PositiveInt = 600
    """Updates of a first stage from nothing."""
    finetune_steps: PositiveInt = 300
    """Updates of a decoder alone."""
    seeds: PositiveInt = 3
    """How many seeds."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, measure, and print the table.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.
    """
    options: Options = read_options(Options, arguments)
    output = Path(options.output)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(options.seeds):
        base = output / f"zeros-{seed}"
        for name, padding in ((base.name, "zeros"), (f"reflect-{seed}", "reflect")):
            _train(output / name, seed, padding, options.steps, None)
        for padding in _PADDINGS:
            folder = output / f"finetuned-{padding}-{seed}"
            _train(folder, seed, padding, options.finetune_steps, base)
        for start in ("", "finetuned-"):
            for trained in _PADDINGS:
                for decoded in _PADDINGS:
                    row = f"{start}{trained}/{decoded}"
                    folder = output / f"{start}{trained}-{seed}"
                    found.setdefault(row, []).append(psnr_by_ring(str(folder), decoded))
        write_json(output / "table.json", found)
    print(f"\n{table(found)}\nnumbers {output}/table.json")


def psnr_by_ring(first_stage: str, padding: Padding) -> dict[str, float]:
    """PSNR of tiles of the held-out photos, by the distance of pixels from a tile's border.

    Args:
        first_stage: A folder.
        padding: What to decode with, whatever it was trained with.
    """
    model = load_autoencoder(first_stage)
    set_padding(model, padding)
    errors = _errors(FirstStage(model))
    place = torch.arange(_SIDE)
    near = torch.minimum(place, _SIDE - 1 - place)
    distance = torch.minimum(near[:, None], near)
    return {
        name: float(-10 * errors[:, (distance >= low) & (distance < high)].mean().log10())
        for name, (low, high) in RINGS.items()
    }


def _errors(stage: FirstStage) -> Tensor:
    """Squared errors `(N, 64, 64)` of values in [0, 1], of tiles of the held-out photos."""
    photos = fixed_images(
        open_source("photos", split="validation"), View(_PHOTO, None), 3, 99, seed=0
    )
    images = images_from_pixels(photos.pixels)
    tiles = rearrange(images, "n c (y h) (x w) -> (n y x) c h w", h=_SIDE, w=_SIDE)
    decoded = reconstruct(stage, tiles)[0].clamp(-1, 1)
    return ((decoded - tiles) / 2).square().mean(1)


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Mean and range over seeds, in decibels, as Markdown."""
    lines = [f"| trained/decoded with | {' | '.join(RINGS)} |", "|---|" + "---:|" * len(RINGS)]
    for row, seeds in found.items():
        cells = []
        for name in RINGS:
            values = [seed[name] for seed in seeds]
            mean = sum(values) / len(values)
            cells.append(f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _train(folder: Path, seed: int, padding: str, steps: int, begin: Path | None) -> None:
    """A run's steps alone; of its end only the averaged weights, as the checkpoint has them."""
    if (folder / "config.json").is_file():
        return
    line = ["--config", _RECIPE, "--output_dir", str(folder), "--seed", str(seed)]
    line += ["--model.decoder_padding", padding, "--train.max_steps", str(steps)]
    line += ["--train.decay_steps", str(steps * 2 // 5), *_SMALL]
    if begin is not None:
        line += ["--model.pretrained", str(begin), "--train.parts", "[decoder]"]
    config = parse_config(line)
    accelerator = make_accelerator(config.train, config.output_dir)
    trainer = Trainer(config, accelerator, Processes())
    size = config.train.batch_size
    source, _ = open_data(config.data, folder=folder, seed=seed, batch_size=size)
    stream = open_stream(source, config.data, channels=3, seed=seed, batch_size=size)
    positions = StepSampler(size, size, range(steps), 0, 1)
    batches = open_loader(stream, positions, workers=0, pin_memory=False)
    for step, batch in enumerate(batches):
        trainer.training_step(step, [batch.to(accelerator.device)])
    with trainer.averaged_model() as model:
        model.save_pretrained(folder)
    print(f"{folder}: {steps} steps", flush=True)


if __name__ == "__main__":
    run_command(main)
