"""The command `scripts/evaluate.py`: arguments, messages, files."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator

from first_stage.config.parsing import read_options
from first_stage.config.schema import reading_problems
from first_stage.data import Reading, View, open_inventory, spare_workers, take_inventory
from first_stage.data.builtin import NAMES
from first_stage.data.checks import large_enough, only_large, value_remark
from first_stage.distributed.processes import Processes, shared
from first_stage.errors import ConfigError
from first_stage.evaluation import Evaluation, Options, evaluate, save
from first_stage.evaluation.files import METRICS
from first_stage.evaluation.images import EvaluationImages
from first_stage.evaluation.table import comparison_table, remarks
from first_stage.metrics.feature_networks import (
    FeatureNetwork,
    default_networks,
    load_feature_network,
    load_lpips,
)
from first_stage.models.first_stage import load_autoencoder
from first_stage.report import REPORT, write_report

_SEVERAL = {
    "first_stage": "A diffusers folder, a pipeline's folder or a hub id; several, separated by "
    "spaces, are compared side by side. (required, type: list[str])",
    "features": "Networks for Frechet and feature distances, separated by spaces: "
    "efficientnet_lite0, inception (rFID; needs torch-fidelity), package.module:name of your own, "
    "or none; null: efficientnet_lite0 where it is installed. (type: list[str] | null)",
}


@dataclass(frozen=True)
class DataArguments:
    """The images to reconstruct."""

    path: str = ""
    """A folder of images (nested or not), a folder written by datasets' save_to_disk, parquet or
    WebDataset (.tar) shards or a folder of them, a built-in set (photos, digits), or a data set id
    on the hub."""
    resolution: int | None = None
    """Side of a centre crop, in pixels; null: whole images in their own sizes."""
    resize: int | None = None
    """Shorter side before the crop, in pixels (bicubic, antialiased); null: the resolution; 0:
    images keep their size."""
    min_side: int = 0
    """Images with a shorter side below this many pixels are skipped and counted, instead of
    enlarged; their headers are read first. 0: none are."""
    image_column: str | None = None
    """Column with the images, for data sets that have columns; null: found by its type."""
    split: str | None = None
    """Which split, where names of files or folders or the data set itself say splits; of a
    built-in set: train, validation or all. null: the only one (of the hub: train), or all of a
    built-in set."""
    channels: tuple[int, ...] | None = None
    """Which of the stored channels are used, counted from 0, as in [3,2,1]; null: all of them, and
    colors become the channels of the first
    stage by the usual rules (gray, RGB, alpha)."""
    value_range: tuple[float, float] | None = None
    """Stored values that become -1 and 1, as in [0,4095] for 12 bits or [-1024,3071] for Hounsfield
    units; values outside are clipped. null: the range of 8-bit and unsigned 16-bit integers."""
    color: Literal["srgb", "keep"] = "srgb"
    """Embedded color profiles: srgb converts to sRGB, keep takes the numbers as they are."""
    display: tuple[int, ...] | None = None
    """Which channels pictures show and networks for colors see, one or three, counted from 0 among
    those that are used; null: the colors, or the first three."""
    max_pixels: int = 100_000_000
    """Images of more pixels are not decoded, and listed: a small file can unpack to gigabytes."""
    workers: int | None = None
    """Decoding processes per process; null: one per core left over, at most 8; 0: none."""

    def reading(self, channels: int) -> Reading:
        """How files are read into so many channels."""
        return Reading(
            channels, self.channels, self.value_range, self.color, self.max_pixels, self.display
        )


@dataclass(frozen=True)
class Arguments:
    """Measure first stages: any diffusers autoencoder of images."""

    first_stage: list[str] | None = None
    output: str = ""
    """Folder for metrics.json, report.html and the report's pictures."""
    data: DataArguments = field(default_factory=DataArguments)
    num_images: int | None = None
    """How many images at most, chosen by the seed; null: all."""
    batch_size: int = 16
    """Images per forward pass of one process."""
    seed: int = 0
    """Seed of the choice of images; >= 0."""
    features: list[str] | None = None
    lpips: bool = False
    """Measure LPIPS (AlexNet); needs the package lpips and its weights."""
    pairs: int = 12
    """How many images the report shows beside their reconstructions."""
    probed_images: int = 64
    """On how many images the latents are flipped, turned and scaled, and their histograms taken."""
    overwrite: bool = False
    """Replace an evaluation that is already in the output folder."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.

    Raises:
        UserError: In one line for anything that cannot work.
    """
    a = parse(arguments)
    accelerator = Accelerator()
    processes = Processes()
    say = print if processes.is_main else _nothing
    first_stages = a.first_stage or []
    _writable(Path(a.output))
    say(f"{processes.world} process(es) on {accelerator.device.type}, float32", flush=True)
    options = Options(
        batch_size=a.batch_size,
        workers=spare_workers() if a.data.workers is None else a.data.workers,
        networks=_networks(a.features, accelerator.device, say),
        lpips=load_lpips(accelerator.device) if a.lpips else None,
        probed=a.probed_images,
        pairs=a.pairs,
    )
    images = _Images(a, processes, say)
    count = min(a.num_images or len(images.source), len(images.source))
    say(f"{count:,} of {len(images.source):,} images from {a.data.path}", flush=True)
    evaluation = evaluate(
        _first_stages(first_stages, accelerator.device),
        images,
        options,
        processes,
        seed=a.seed,
        progress=True,
    )
    if processes.is_main:
        _finish(evaluation, Path(a.output), first_stages)
    processes.wait()
    accelerator.end_training()


def parse(arguments: Sequence[str] | None = None) -> Arguments:
    """Read and check the arguments.

    Raises:
        ConfigError: In one line for anything that cannot work.
    """
    result = read_options(Arguments, arguments, several=_SEVERAL)
    for problem in _problems(result):
        raise ConfigError(problem)
    return result


def _problems(a: Arguments) -> Iterator[str]:
    if not a.first_stage:
        yield "--first_stage is missing: give a diffusers folder or a hub id, or several"
    elif len(set(a.first_stage)) < len(a.first_stage):
        yield f"--first_stage names the same first stage twice: {' '.join(a.first_stage)}"
    if not a.data.path:
        yield "--data.path is missing: give a folder of images, a hub id, photos or digits"
    parts = (None, "train", "validation", "all")
    if a.data.path in NAMES and a.data.split not in parts:
        yield f"--data.split is {a.data.split!r}; {a.data.path} has train, validation and all"
    if not a.output:
        yield "--output is missing: name a folder for metrics.json and report.html"
    least = {
        "batch_size": (a.batch_size, 1),
        "num_images": (1 if a.num_images is None else a.num_images, 1),
        "data.resolution": (1 if a.data.resolution is None else a.data.resolution, 1),
        "data.resize": (a.data.resize or 0, 0),
        "data.workers": (a.data.workers or 0, 0),
        "data.min_side": (a.data.min_side, 0),
        "seed": (a.seed, 0),
        "pairs": (a.pairs, 0),
        "probed_images": (a.probed_images, 0),
    }
    for name, (value, minimum) in least.items():
        if value < minimum:
            yield f"--{name} is {value}; it must be at least {minimum}"
    if a.data.resize and a.data.resolution is None:
        yield (
            f"--data.resize {a.data.resize} without --data.resolution: say what to crop, too "
            f"(--data.resolution {a.data.resize})"
        )
    for name in (METRICS, REPORT):
        if a.output and not a.overwrite and (Path(a.output) / name).exists():
            yield (
                f"--output {a.output!r} already holds {name}: choose another folder, or replace it "
                "with --overwrite true"
            )


class _Images:
    """The images for a number of channels; the source is opened once."""

    def __init__(self, a: Arguments, processes: Processes, say: Any):
        split = a.data.split
        part: Any = split if split in ("train", "validation", "all") else "all"
        inventory = shared(processes, lambda: take_inventory(a.data.path, split))
        self.source = open_inventory(inventory, a.data.image_column, part, split, say)
        if least := a.data.min_side:
            source = self.source
            chosen = shared(processes, lambda: large_enough(source, least))
            self.source = only_large(source, chosen, least, say)
        self.arguments, self.say, self.is_main = a, say, processes.is_main
        if processes.is_main and inventory.kind in ("images", "parquet", "tar"):
            inventory.write(Path(a.output) / "files.txt")

    def __call__(self, channels: int) -> EvaluationImages:
        data = self.arguments.data
        view = None
        if data.resolution is not None:
            resize = data.resolution if data.resize is None else (data.resize or None)
            view = View(data.resolution, resize)
        a = self.arguments
        reading = data.reading(channels)
        for problem in reading_problems(reading):
            raise ConfigError(problem)
        if self.is_main and (remark := value_remark(self.source, reading)):
            self.say(remark)
        return EvaluationImages(self.source, reading, view, a.num_images, a.seed)


def _first_stages(names: Sequence[str], device: Any) -> Iterator[tuple[str, Any]]:
    for name, label in zip(names, short_names(names), strict=True):
        yield label, load_autoencoder(name).to(device)


def short_names(names: Sequence[str]) -> list[str]:
    """Names short enough for a table: the last parts of paths, as many as tell them apart."""
    parts = [[p for p in Path(name).parts if p not in ("/", ".", "..")] or [name] for name in names]
    # Every run exports to a folder of this name; alone it says nothing.
    least = 2 if any(p[-1] in ("export", "vae", "ema") for p in parts) else 1
    for count in range(least, max(len(p) for p in parts) + 1):
        short = ["/".join(p[-count:]) for p in parts]
        if len(set(short)) == len(short):
            return short
    return list(names)


def _networks(keys: list[str] | None, device: Any, say: Any) -> tuple[FeatureNetwork, ...]:
    if keys is not None:
        wanted = [key for key in dict.fromkeys(keys) if key != "none"]
        return tuple(load_feature_network(key, device) for key in wanted)
    networks = default_networks(device)
    if not networks:
        say("no feature distances: pip install 'first-stage[evaluation]' for FD-EfficientNet-Lite0")
    return networks


def _writable(output: Path) -> None:
    """Find out before the long work whether its results can be written."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ConfigError(
            f"--output {str(output)!r} cannot be written: {error.strerror}"
        ) from error


def _finish(evaluation: Evaluation, output: Path, names: Sequence[str]) -> None:
    for stage, name in zip(evaluation.first_stages, names, strict=True):
        stage["source"] = name
    path = save(evaluation, output)
    report = write_report(output)
    print(f"\n{evaluation.protocol['images']:,} images; {evaluation.protocol['pixels']}")
    print(comparison_table(evaluation.first_stages))
    for remark in remarks(evaluation.first_stages):
        print(f"note: {remark}")
    print(f"\nwrote {path}\nlook at {report} (one file; opens in any browser)")


def _nothing(*_: Any, **__: Any) -> None:
    """Said by the main process alone."""
