"""The command `first-stage evaluate`: arguments, messages, files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from first_stage.config.images import ImagesConfig
from first_stage.config.parsing import read_options
from first_stage.config.types import NonNegativeInt, PositiveInt
from first_stage.data import spare_workers
from first_stage.data.builtin import NAMES
from first_stage.data.checks import value_remark
from first_stage.distributed.processes import Processes, shared
from first_stage.errors import ConfigError
from first_stage.evaluation import Evaluation, Options, evaluate, evaluate_change, save
from first_stage.evaluation.change import change_in_words
from first_stage.evaluation.drift import check_alike, drift_in_words
from first_stage.evaluation.files import METRICS
from first_stage.evaluation.images import EvaluationImages
from first_stage.evaluation.table import comparison_table, remarks
from first_stage.files import FILE_LIST, make_writable
from first_stage.metrics.feature_networks import (
    FeatureNetwork,
    default_networks,
    load_feature_network,
    load_lpips,
)
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder
from first_stage.report import REPORT, write_report

_SEVERAL = {
    "first_stage": "A diffusers folder, a pipeline's folder or a hub id; several, separated by "
    "spaces, are compared side by side. (required, type: list[str])",
    "features": "Networks for Frechet and feature distances, separated by spaces: "
    "efficientnet_lite0, inception (rFID; needs torch-fidelity), package.module:name of your own, "
    "or none; null: efficientnet_lite0 where it is installed. (type: list[str] | null)",
}


@dataclass(frozen=True)
class EvaluationData(ImagesConfig):
    """The images to reconstruct."""

    path: str = ""
    resolution: PositiveInt | None = None
    """Side of a centre crop, in pixels; null: whole images in their own sizes."""
    split: str | None = None
    """Which split, where names of files or folders or the data set itself say splits; of a
    built-in set: train, validation or all. null: the only one (of the hub: train), or all of a
    built-in set."""
    workers: NonNegativeInt | None = None
    """Decoding processes per process; null: one per core left over; 0: none."""


@dataclass(frozen=True)
class Arguments:
    """Measure first stages: any diffusers autoencoder of images."""

    first_stage: list[str] | None = None
    before: str | None = None
    """The first stage that first_stage came from, of the same channels and latents: what it gained,
    image by image, where it lost, and how far its latents moved. null: no before and after."""
    output: str = ""
    """Folder for metrics.json, report.html and the report's pictures."""
    data: EvaluationData = field(default_factory=EvaluationData)
    num_images: PositiveInt | None = None
    """How many images at most, chosen by the seed; null: all."""
    batch_size: PositiveInt = 16
    """Images per forward pass of one process."""
    seed: NonNegativeInt = 0
    """Seed of the choice of images."""
    features: list[str] | None = None
    lpips: bool = False
    """Measure LPIPS (AlexNet); needs the package lpips and its weights."""
    pairs: NonNegativeInt = 12
    """How many images the report shows beside their reconstructions."""
    probed_images: NonNegativeInt = 64
    """On how many images the latents are flipped, turned and scaled, and their histograms taken."""
    tiled_images: NonNegativeInt | None = None
    """On how many images decoding in tiles, as diffusers does it for large ones, is held against
    decoding whole; they are continued to one and a half tiles a side. null: 2 with before, else
    none."""
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
    first_stages = [*([a.before] if a.before else []), *(a.first_stage or [])]
    make_writable(Path(a.output), f"--output {a.output!r}")
    _check(first_stages, a.before)
    say(f"{processes.world} process(es) on {accelerator.device.type}, float32", flush=True)
    options = Options(
        batch_size=a.batch_size,
        workers=spare_workers() if a.data.workers is None else a.data.workers,
        networks=_networks(a.features, accelerator.device, say),
        lpips=load_lpips(accelerator.device) if a.lpips else None,
        probed=a.probed_images,
        pairs=a.pairs,
        tiled=(2 if a.before else 0) if a.tiled_images is None else a.tiled_images,
    )
    images = _Images(a, processes, say)
    count = min(a.num_images or len(images.source), len(images.source))
    say(f"{count:,} of {len(images.source):,} images from {a.data.path}", flush=True)
    stages = _first_stages(first_stages, accelerator.device)
    if a.before:
        evaluation = evaluate_change(
            next(stages), next(stages), images, options, processes, seed=a.seed, progress=True
        )
    else:
        evaluation = evaluate(stages, images, options, processes, seed=a.seed, progress=True)
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
    elif a.before and len(a.first_stage) > 1:
        yield (
            f"--before has a first stage to be held against one, but --first_stage names "
            f"{len(a.first_stage)}: give one"
        )
    elif a.before in a.first_stage:
        yield f"--before and --first_stage are both {a.before!r}: there is nothing between them"
    if not a.data.path:
        yield "--data.path is missing: give a folder of images, a hub id, photos or digits"
    parts = (None, "train", "validation", "all")
    if a.data.path in NAMES and a.data.split not in parts:
        yield f"--data.split is {a.data.split!r}; {a.data.path} has train, validation and all"
    if not a.output:
        yield "--output is missing: name a folder for metrics.json and report.html"
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
        self.source = a.data.open(
            part,
            say=say,
            once=lambda make: shared(processes, make),
            keep=lambda inventory: inventory.write(Path(a.output) / FILE_LIST),
        )
        self.arguments, self.say, self.is_main = a, say, processes.is_main

    def __call__(self, channels: int) -> EvaluationImages:
        a = self.arguments
        side = a.data.resolution or (min(a.data.crop_shape) if a.data.crop_shape else None)
        view = None if side is None else a.data.view(side)
        reading = a.data.reading(channels)
        if self.is_main and (remark := value_remark(self.source, reading)):
            self.say(remark)
        return EvaluationImages(self.source, reading, view, a.num_images, a.seed)


def _first_stages(names: Sequence[str], device: Any) -> Iterator[tuple[str, Any]]:
    for name, label in zip(names, short_names(names), strict=True):
        yield label, load_autoencoder(name, field="--first_stage").to(device)


def _check(names: Sequence[str], before: str | None) -> None:
    """Load every first stage once before the first is measured, which may take hours.

    Raises:
        UserError: When one cannot be loaded, takes other images than the first, or has other
            latents than what it came from.
    """
    if len(names) < 2:
        return
    if before is not None:
        fields = ("--before", "--first_stage")
        models = [load_autoencoder(n, field=f) for n, f in zip(names, fields, strict=True)]
        check_alike(*(FirstStage(m, name=n) for m, n in zip(models, names, strict=True)))
        return
    channels: dict[str, int] = {}
    for name in names:
        stage = FirstStage(load_autoencoder(name, field="--first_stage"), name=name)
        channels[name] = stage.in_channels
        if channels[name] != channels[names[0]]:
            raise ConfigError(
                f"--first_stage {name!r} takes images of {channels[name]} channels, but "
                f"{names[0]!r} of {channels[names[0]]}: evaluate them separately"
            )


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


def _finish(evaluation: Evaluation, output: Path, names: Sequence[str]) -> None:
    for stage, name in zip(evaluation.first_stages, names, strict=True):
        stage["source"] = name
    path = save(evaluation, output)
    report = write_report(output)
    print(f"\n{evaluation.protocol['images']:,} images; {evaluation.protocol['pixels']}")
    print(comparison_table(evaluation.first_stages))
    for remark in remarks(evaluation.first_stages):
        print(f"note: {remark}")
    if (change := evaluation.change) is not None:
        print(f"\nfrom {change['before']} to {change['after']}:")
        for sentence in [*change_in_words(change), drift_in_words(change["latents"])]:
            print(f"- {sentence}")
    print(f"\nwrote {path}\nlook at {report} (one file; opens in any browser)")


def _nothing(*_: Any, **__: Any) -> None:
    """Said by the main process alone."""
