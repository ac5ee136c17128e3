"""Caches a first stage, trains the transformer on it, samples and measures; can be resumed."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.diffusability.diffusion import Budget, sample, train_diffusion
from experiments.diffusability.judge import Judge, trained_judge
from first_stage.config.images import ImagesConfig, shorter_side
from first_stage.data import BrokenImage, Source, fingerprint, open_image, pixels_of
from first_stage.data.images import pixels_from_images
from first_stage.errors import UserError
from first_stage.evaluation import evaluate
from first_stage.evaluation.grids import grid, save_png
from first_stage.evaluation.images import EvaluationImages
from first_stage.evaluation.measure import Options as Measured
from first_stage.files import write_atomic, write_json
from first_stage.metrics.feature_networks import FeatureNetwork
from first_stage.metrics.frechet import GaussianStatistics, frechet_distance
from first_stage.models.first_stage import FirstStage, reconstruct
from first_stage.models.loading import fingerprint_weights, load_autoencoder
from first_stage.seeding import Purpose, generator
from latent_tools import CacheOptions, LatentDataset, Process, precompute

_REFERENCE = 5000
"""Real images that samples are held against, at most."""
_SEEN = 2000
"""Of these, how many the evaluation network looks at: a twelfth of a second each on a core."""
_MEASURED = 500
"""Held-out images to reconstruct, at most."""
SAMPLES = "samples.png"
"""Some of a cell's samples."""
_ROWS, _COLUMNS = 4, 10
_AT_ONCE = 64

Say = Callable[[str], None]


@dataclass(frozen=True)
class Images:
    """The images of the comparison.

    Attributes:
        training: What first stages are cached and the transformer trained on.
        held_out: What reconstructions are measured on.
        config: How both are seen.
        resolution: Side in pixels.
        channels: Of the images.
        label: Column with the class; `None` where there is none.
    """

    training: Source
    held_out: Source
    config: ImagesConfig
    resolution: int
    channels: int
    label: str | None


@dataclass(frozen=True)
class Cell:
    """What became of one first stage and seed.

    Attributes:
        judge_distance: Frechet distance of samples and real images in the judge's features.
        network_distance: The same in the evaluation network's.
        read_as_asked: Share of the samples that the judge reads as the class asked for.
        seconds: What training and sampling took.
    """

    judge_distance: float | None
    network_distance: float | None
    read_as_asked: float | None
    seconds: float


class Yardstick:
    """The same images, judge, transformer and budget for every first stage.

    What is finished is kept in `output` and not made again.

    Args:
        images: The images.
        budget: What every first stage gets.
        output: Folder for caches and results.
        network: For the Frechet distance in its features; `None` without.
        say: Prints a line.
    """

    def __init__(
        self, images: Images, budget: Budget, output: Path, network: FeatureNetwork | None, say: Say
    ):
        self.images, self.budget, self.output = images, budget, output
        self.network, self.say = network, say
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._real, self._labels = _real_images(images)
        self.classes = int(self._labels.max()) + 1
        self.judge: Judge | None = None
        self._shared = output / "shared" / _hashed(self._about())
        if images.label is not None:
            file = self._shared / "judge.safetensors"
            self.judge = trained_judge(file, self._real, self._labels)

    def judge_accuracy(self) -> float | None:
        """Share of the held-out real images that the judge reads right."""
        if self.judge is None:
            return None
        held_out = dataclasses.replace(self.images, training=self.images.held_out)
        real, labels = _real_images(held_out)
        return float((self.judge.look(real)[1] == labels).float().mean())

    def cell(self, name: str, first_stage: str, seed: int) -> tuple[Cell, dict[str, Any]]:
        """The result of a first stage and seed; made only where it is not there yet.

        Args:
            name: What it is called.
            first_stage: Its folder or hub id.
            seed: Of the transformer and its samples.

        Returns:
            The result, and what the evaluator says of the first stage on held-out images.
        """
        model = load_autoencoder(first_stage, field="--first_stage").to(self.device)
        stage = FirstStage(model, name=name)
        folder = self.output / name / f"seed-{seed}"
        made = self._kept(
            folder / "cell.json",
            stage,
            lambda: dataclasses.asdict(self._make(stage, first_stage, folder, seed)),
        )
        evaluation = self._kept(folder / "evaluation.json", stage, lambda: self._evaluate(stage))
        return Cell(**made), evaluation

    def _kept(
        self, file: Path, stage: FirstStage, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """What a file holds, if the same first stage, budget and images made it."""
        made_by = self._identity(stage)
        if not file.exists():
            write_json(file, {"made_by": made_by, **make()})
        stored: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if stored.pop("made_by") != made_by:
            raise UserError(
                f"{file} was made with another first stage, budget or images: choose another "
                "--output, or delete it"
            )
        return stored

    def _about(self) -> dict[str, Any]:
        """What all cells share."""
        return {
            "images": fingerprint(self.images.training),
            "held_out": fingerprint(self.images.held_out),
            "resolution": self.images.resolution,
        }

    def _identity(self, stage: FirstStage) -> str:
        own = {
            "first_stage": fingerprint_weights(stage.model),
            "budget": dataclasses.asdict(self.budget),
            "network": self.network.key if self.network else None,
        }
        return _hashed(self._about() | own)

    def _make(self, stage: FirstStage, first_stage: str, folder: Path, seed: int) -> Cell:
        began = time.perf_counter()
        dataset = self.cached(stage, first_stage, folder / "cache")
        diffusion = train_diffusion(dataset, self.classes_of(dataset), self.budget, seed)
        asked = torch.arange(self.budget.samples) % self.classes
        pictures = sample(diffusion, stage, asked, self.budget, seed)
        seconds = time.perf_counter() - began
        save_png(_sheet(pictures, asked), folder / SAMPLES)
        values = {"samples": pixels_from_images(pictures), "classes": asked}
        write_atomic(folder / "samples.safetensors", lambda path: save_file(values, path))
        cell = Cell(*self.held_against_real(pictures, asked), seconds)
        self.say(f"{folder.parent.name}, seed {seed}: {described(cell)} ({seconds / 60:.1f} min)")
        return cell

    def held_against_real(
        self, pictures: Tensor, asked: Tensor
    ) -> tuple[float | None, float | None, float | None]:
        """Frechet distance to real images by the judge and by the network, and share read right.

        Args:
            pictures: `(N, C, H, W)` in [-1, 1].
            asked: `(N,)`, the classes they are of.
        """
        by_judge, by_network, read = None, None, None
        if self.judge is not None:
            features, classes = self.judge.look(pictures)
            read = float((classes == asked).float().mean())
            real = _statistics(self.judge.look(self._real)[0])
            by_judge = frechet_distance(real, _statistics(features)).value
        if self.network is not None:
            seen = _statistics(self._seen(pictures))
            by_network = frechet_distance(self._reference(), seen).value
        return by_judge, by_network, read

    def cached(self, stage: FirstStage, first_stage: str, folder: Path) -> LatentDataset:
        """The latents of the images to train on, with mean 0 and variance 1 by channel."""
        images = self.images
        options = CacheOptions(
            resolution=images.resolution,
            resize=shorter_side(images.config.resize, images.resolution),
            reading=images.config.reading(images.channels),
        )
        process = Process(device=self.device)
        precompute(stage, first_stage, images.training, folder, options, process)
        return LatentDataset(folder, normalize="channel")

    def classes_of(self, dataset: LatentDataset) -> Tensor:
        """Class of every sample, `(N,)`; all 0 without labels."""
        if self.images.label is None:
            return torch.zeros(len(dataset), dtype=torch.int64)
        return torch.tensor(dataset.column(self.images.label).to_pylist())

    @torch.no_grad()
    def _seen(self, images: Tensor) -> Tensor:
        assert self.network is not None
        parts = images.split(_AT_ONCE)
        return torch.cat([self.network(some.to(self.device)).cpu() for some in parts])

    def _reference(self) -> GaussianStatistics:
        """What the evaluation network says of real images; kept in a file."""
        assert self.network is not None
        file = self._shared / f"{self.network.key.replace(':', '.')}.safetensors"
        if not file.exists():
            made = _statistics(self._seen(_evenly(self._real, _SEEN)))
            values = {"mean": made.mean, "scatter": made.scatter, "count": torch.tensor(made.count)}
            write_atomic(file, lambda path: save_file(values, path))
        values = load_file(file)
        found = GaussianStatistics(len(values["mean"]))
        found.mean, found.scatter = values["mean"], values["scatter"]
        found.count = int(values["count"])
        return found

    def _evaluate(self, stage: FirstStage) -> dict[str, Any]:
        """What the evaluator says of reconstructions of held-out images, and of their latents."""
        images = self.images
        chosen = EvaluationImages(
            images.held_out,
            images.config.reading(images.channels),
            images.config.view(images.resolution),
            _MEASURED,
        )
        found = evaluate([(stage.name, stage)], chosen, Measured(pairs=0)).first_stages[0]
        kept = ("metrics", "sharpness", "latent_health", "latent_channels", "downsample_factor")
        return {key: found[key] for key in kept} | {"judge_floor": self.floor(stage)}

    @torch.no_grad()
    def floor(self, stage: FirstStage) -> float | None:
        """The judge's distance of as many reconstructions: what the decoder alone costs.

        No transformer can be expected to come nearer to the real images.
        """
        if self.judge is None:
            return None
        parts = _evenly(self._real, self.budget.samples).split(_AT_ONCE)
        rebuilt = [reconstruct(stage, x.to(self.device))[0].clamp(-1, 1).cpu() for x in parts]
        features = self.judge.look(torch.cat(rebuilt))[0]
        real = _statistics(self.judge.look(self._real)[0])
        return frechet_distance(real, _statistics(features)).value


def described(cell: Cell) -> str:
    """A cell in a few words."""
    parts = [
        ("Frechet distance (judge)", cell.judge_distance, ".3f"),
        ("Frechet distance (network)", cell.network_distance, ".2f"),
        ("read as asked", cell.read_as_asked, ".1%"),
    ]
    return ", ".join(f"{name} {value:{form}}" for name, value, form in parts if value is not None)


def _sheet(pictures: Tensor, asked: Tensor) -> Image.Image:
    """Samples, a column for each class, or in the order they came."""
    columns = int(asked.max()) + 1 if asked.any() else _COLUMNS
    columns = min(columns, len(pictures))
    rows = [pictures[n * columns : (n + 1) * columns] for n in range(_ROWS)]
    return grid([row for row in rows if len(row) == columns])


def _real_images(images: Images) -> tuple[Tensor, Tensor]:
    """Real images `(N, C, H, W)` in [-1, 1] as first stages see them, and their classes `(N,)`."""
    view = images.config.view(images.resolution)
    reading = images.config.reading(images.channels)
    pixels, labels = [], []
    # A data set may be sorted by class: its first images are not like the rest.
    chosen = generator(0, Purpose.SPLIT, 3).permutation(len(images.training))[:_REFERENCE]
    for index in sorted(chosen.tolist()):
        found = images.training.read(index)
        try:
            picture = view.apply(open_image(found.image, reading))[0]
        except BrokenImage:
            continue
        pixels.append(torch.from_numpy(pixels_of(picture, reading)))
        labels.append(int(found.columns[images.label]) if images.label else 0)
    if not pixels:
        raise UserError(f"none of the images of {images.training.name!r} can be decoded")
    stacked = torch.stack(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return stacked, torch.tensor(labels)


def _evenly(images: Tensor, count: int) -> Tensor:
    """So many of the images, from first to last."""
    count = min(count, len(images))
    return images[torch.linspace(0, len(images) - 1, count).round().long()]


def _hashed(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _statistics(features: Tensor) -> GaussianStatistics:
    result = GaussianStatistics(features.shape[1])
    result.update(features)
    return result
