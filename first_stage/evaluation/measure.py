"""One pass of a first stage over the images of an evaluation, on one process or several."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from first_stage.data import displayed
from first_stage.distributed.memory import memory_told
from first_stage.distributed.processes import Processes
from first_stage.errors import UserError
from first_stage.evaluation.codes import CodeCounts, by_use, usage
from first_stage.evaluation.drift import Drift
from first_stage.evaluation.images import Group, ImageList, batches, require_some
from first_stage.metrics import images as metrics
from first_stage.metrics.feature_networks import FeatureNetwork, cosine_distance
from first_stage.metrics.frechet import GaussianStatistics, frechet_distance
from first_stage.metrics.latents import TRANSFORMS, LatentHealth, equivariance
from first_stage.metrics.precision import float64_device, full_float32
from first_stage.metrics.spectrum import SharpnessSums
from first_stage.models.bottlenecks import Encoded
from first_stage.models.first_stage import FirstStage, pad, reconstruct

HISTOGRAM_BINS = 41
_VALUES_PER_IMAGE = 1024
"""Latents of each channel that one probed image adds to the histograms."""


@dataclass(frozen=True)
class Options:
    """What to measure and how.

    Attributes:
        batch_size: Images per forward pass of one process.
        workers: Decoding processes per process; 0 decodes in the process itself.
        networks: Feature networks for Frechet and feature distances.
        lpips: LPIPS, or `None`.
        probed: On how many images, evenly spread over the list, the latents are transformed and
            their histograms taken.
        pairs: How many images the report shows beside their reconstructions.
        tiled: On how many images decoding in tiles is held against decoding whole.
    """

    batch_size: int = 16
    workers: int = 0
    networks: tuple[FeatureNetwork, ...] = ()
    lpips: Callable[[Tensor, Tensor], Tensor] | None = None
    probed: int = 64
    pairs: int = 12
    tiled: int = 0


@dataclass
class _Part:
    """What one process measured."""

    health: LatentHealth
    bands: metrics.BandErrors = field(default_factory=metrics.BandErrors)
    sharpness: SharpnessSums = field(default_factory=SharpnessSums)
    rows: list[dict[str, Any]] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)


class Measurement:
    """The pass: counts batches, adds up processes, summarises.

    Args:
        first_stage: In eval mode, on its device.
        images: The list of images.
        options: What to measure.
        processes: The processes that share the work.
        before: The first stage that this one came from, on the same device: the drift of the
            latents is measured against it. `None` without.

    Attributes:
        code_shares: `(K,)` share of each code in the tokens, after `run`; `None` without codes.
    """

    def __init__(
        self,
        first_stage: FirstStage,
        images: ImageList,
        options: Options,
        processes: Processes,
        before: FirstStage | None = None,
    ):
        self.stage, self.images = first_stage, images
        self.options, self.processes = options, processes
        self._part = _Part(LatentHealth(first_stage.latent_channels))
        self._codes = CodeCounts(first_stage)
        self._drift = None if before is None else Drift(before, first_stage)
        self.code_shares: Tensor | None = None
        self._statistics: dict[str, tuple[GaussianStatistics, GaussianStatistics]] = {}
        stride = max(len(images) / max(options.probed, 1), 1.0)
        self._probed = {int(k * stride) for k in range(math.ceil(len(images) / stride))}
        if options.probed == 0:
            self._probed = set()

    @torch.no_grad()
    def run(self, progress: bool = False) -> dict[str, Any]:
        """Measure this process's batches and add up all processes.

        Args:
            progress: Show a bar on the main process.

        Returns:
            The results, equal on every process.

        Raises:
            UserError: When no image can be decoded, or the first stage gives no finite pixels.
        """
        size, rank, world = self.options.batch_size, self.processes.rank, self.processes.world
        mine = sum(
            min(size, len(self.images) - s)
            for s in range(rank * size, len(self.images), world * size)
        )
        with (
            tqdm(
                total=mine,
                desc=self.stage.name,
                unit="image",
                disable=not (progress and self.processes.is_main),
            ) as bar,
            full_float32(),
            memory_told("while images are read: lower --data.workers or --batch_size"),
        ):
            for groups, broken in batches(self.images, size, rank, world, self.options.workers):
                for group in groups:
                    height, width = group.images.shape[-2:]
                    with memory_told(
                        f"with {len(group.ids)} images of {width} x {height} at once: lower "
                        "--batch_size, or crop with --data.resolution"
                    ):
                        self._count(group)
                    bar.update(len(group.indices))
                for item in broken:
                    self._part.broken[item.id] = item.problem
                    bar.update()
        return self._finish()

    def _count(self, group: Group) -> None:
        images = group.images.to(self.stage.device)
        decoded, encoded = reconstruct(self.stage, images)
        finite = decoded.flatten(1).isfinite().all(1).tolist()
        if not all(finite):
            raise UserError(
                f"{self.stage.name!r} gives NaN or infinite pixels for the image "
                f"{group.ids[finite.index(False)]!r}: its weights are damaged"
            )
        # Measurements of a stated range are compared at their own precision, pictures at 8 bits.
        grade = metrics.clamped if self.images.reading.value_range else metrics.eight_bit
        originals, reconstructions = grade(images), grade(decoded)
        self._part.bands.update(originals, reconstructions)
        columns = self._columns(originals, reconstructions)
        if self._drift is not None:
            columns["latent_change"] = self._drift.update(images, encoded)
        height, width = images.shape[-2:]
        for k, (index, name) in enumerate(zip(group.indices, group.ids, strict=True)):
            row = {"index": index, "id": name, "width": width, "height": height}
            self._part.rows.append(row | {key: values[k] for key, values in columns.items()})
        self._part.health.update(encoded.latents, encoded.logvar)
        self._codes.update(encoded.latents)
        self._probe(group, images, encoded)

    def _columns(self, originals: Tensor, reconstructions: Tensor) -> dict[str, list[float]]:
        size = originals.shape[-2:]
        columns = {
            "mse": metrics.mean_squared_error(originals, reconstructions),
            "psnr": metrics.psnr(originals, reconstructions),
            "l1": metrics.l1(originals, reconstructions),
        }
        if metrics.ssim_fits(*size):
            columns["ssim"] = metrics.ssim(originals, reconstructions)
        if metrics.ms_ssim_fits(*size):
            columns["ms_ssim"] = metrics.ms_ssim(originals, reconstructions)
        kept, agreement = self._part.sharpness.update(originals, reconstructions)
        columns |= {"high_frequency_kept": kept, "high_frequency_agreement": agreement}
        shown = displayed(originals.shape[1], self.images.reading.display)
        colors = originals[:, shown], reconstructions[:, shown]
        if self.options.lpips is not None:
            columns["lpips"] = self.options.lpips(*colors)
        for network in self.options.networks:
            a, b = network(colors[0]), network(colors[1])
            if network.key not in self._statistics:
                d = a.shape[1]
                self._statistics[network.key] = (GaussianStatistics(d), GaussianStatistics(d))
            for statistics, features in zip(self._statistics[network.key], (a, b), strict=True):
                statistics.update(features)
            columns[f"feature_distance/{network.key}"] = cosine_distance(a, b)
        return {name: column.cpu().double().tolist() for name, column in columns.items()}

    def _probe(self, group: Group, images: Tensor, encoded: Encoded) -> None:
        chosen = [k for k, index in enumerate(group.indices) if index in self._probed]
        if not chosen:
            return
        latents = encoded.latents[chosen]
        padded = pad(images[chosen], self.stage.downsample_factor)
        errors = equivariance(self.stage.decode, latents, padded)
        values = latents.flatten(2)
        values = values[..., :: max(values.shape[-1] // _VALUES_PER_IMAGE, 1)]
        samples = values.cpu().numpy()
        for k, place in enumerate(chosen):
            probe = {name: (float(a[k]), float(b[k])) for name, (a, b) in errors.items()}
            self._part.probes.append(
                {"index": group.indices[place], "errors": probe, "latents": samples[k]}
            )

    def _finish(self) -> dict[str, Any]:
        first, *others = self.processes.gather(self._part)
        for other in others:
            first.health.merge(other.health)
            first.sharpness.merge(other.sharpness)
            first.bands.merge(other.bands)
            first.rows += other.rows
            first.probes += other.probes
            first.broken |= other.broken
        first.rows.sort(key=lambda row: row["index"])
        first.probes.sort(key=lambda probe: probe["index"])
        broken = dict(sorted(first.broken.items()))
        require_some(len(first.rows), broken, str(self.images.described["data"]))
        health = first.health.summary()
        health["equivariance"] = _equivariance(first.probes, first.rows)
        _add_histograms(health, first.probes)
        return {
            **self._describe(),
            "metrics": _summaries(first.rows),
            "sharpness": first.sharpness.summary(),
            "bands": self._bands(first.bands),
            "features": self._feature_distances(first.rows),
            "latent_health": health,
            "codes": self._code_use(),
            **self._latent_drift(),
            "unreadable": broken,
            "per_image": [_json_row(row) for row in first.rows],
        }

    def _latent_drift(self) -> dict[str, Any]:
        """How far latents moved, under its name; nothing without a first stage before this one."""
        if self._drift is None:
            return {}
        for rank, other in enumerate(self.processes.gather(self._drift.sums())):
            if rank != self.processes.rank:
                self._drift.merge(other)
        return {"drift": self._drift.summary()}

    def _code_use(self) -> dict[str, Any]:
        """How codes are used; empty without codes."""
        shares = self.code_shares = self._codes.shares(self.processes.sum)
        if shares is None:
            return {}
        return {**usage(shares), "count": len(shares), "by_use": by_use(shares)}

    def _bands(self, errors: metrics.BandErrors) -> list[dict[str, Any]]:
        """Figures of each channel, where channels are not just gray or colors."""
        reading = self.images.reading
        if reading.channels in (1, 3, 4) and not reading.takes_values:
            return []
        names = reading.select or range(reading.channels)
        low, high = reading.value_range or (0.0, 255.0)
        return [
            {"channel": name, **figures, "rmse": figures["rmse"] * (high - low)}
            for name, figures in zip(names, errors.summary(), strict=True)
        ]

    def _total(self, tensor: Tensor) -> Tensor:
        """The sum of a float64 tensor over processes, on the CPU."""
        return self.processes.sum(tensor.to(float64_device(self.stage.device))).cpu()

    def _describe(self) -> dict[str, Any]:
        stage, config = self.stage, self.stage.model.config
        f, c = stage.downsample_factor, stage.latent_channels
        return {
            "name": stage.name,
            "class": type(stage.model).__name__,
            "parameters": sum(p.numel() for p in stage.model.parameters()),
            "image_channels": stage.in_channels,
            "latent_channels": c,
            "downsample_factor": f,
            "values_per_latent": stage.in_channels * f * f / c,
            "scaling_factor": _plain(getattr(config, "scaling_factor", None)),
            "shift_factor": _plain(getattr(config, "shift_factor", None)),
        }

    def _feature_distances(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        result = {}
        for network in self.options.networks:
            # A process may have had no image; then it has no statistics of the right size yet.
            sizes = [len(pair[0].mean) if (pair := self._statistics.get(network.key)) else 0]
            size = max(s for part in self.processes.gather(sizes) for s in part)
            pair = self._statistics.get(network.key) or (
                GaussianStatistics(size),
                GaussianStatistics(size),
            )
            a, b = (statistics.merged(self._total) for statistics in pair)
            entry: dict[str, Any] = {"network": network.key, "dimensions": size, "images": a.count}
            if a.count < 2:
                entry |= {"frechet_distance": None, "note": "one image has no covariance"}
            else:
                distance = frechet_distance(a, b)
                entry |= {"frechet_distance": distance.value, "note": distance.note}
                entry["covariance_ranks"] = list(distance.ranks)
            entry["feature_distance"] = summary_of(
                [row[f"feature_distance/{network.key}"] for row in rows]
            )
            result[network.distance_name] = entry
        return result


def summary_of(values: list[float]) -> dict[str, float | int | None]:
    """Mean, standard deviation, least and greatest of the finite values, and how many there are."""
    finite = np.array([v for v in values if math.isfinite(v)], dtype=np.float64)
    if finite.size == 0:
        return {"mean": None, "std": None, "min": None, "max": None, "images": 0}
    return {
        "mean": float(finite.mean()),
        "std": float(finite.std()),
        "min": float(finite.min()),
        "max": float(finite.max()),
        "images": int(finite.size),
    }


def _summaries(rows: list[dict[str, Any]]) -> dict[str, Any]:
    names = ["psnr", "ssim", "ms_ssim", "l1", "high_frequency_kept", "high_frequency_agreement"]
    if "lpips" in rows[0]:
        names.append("lpips")
    result: dict[str, Any] = {
        name: summary_of([row.get(name, math.nan) for row in rows]) for name in names
    }
    # An identical image has no finite PSNR: it is counted instead of averaged.
    result["psnr"]["identical_images"] = sum(row["mse"] == 0 for row in rows)
    mean_error = float(np.mean([row["mse"] for row in rows]))
    result["psnr"]["of_mean_error"] = -10 * math.log10(mean_error) if mean_error > 0 else None
    return result


def _json_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row with `None` for what does not exist, and `identical` where PSNR is infinite."""
    result = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    result["identical"] = row["mse"] == 0
    return result


def _equivariance(probes: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """PSNRs of the mean squared errors over the probed images; `None` is no error at all."""
    if not probes:
        return {}
    probed = {probe["index"] for probe in probes}
    unchanged = np.mean([row["mse"] for row in rows if row["index"] in probed])
    result: dict[str, Any] = {"images": len(probes), "psnr_unchanged": _decibels(unchanged)}
    for name in TRANSFORMS:
        to_image, change = np.mean([probe["errors"][name] for probe in probes], axis=0)
        result[name] = {"psnr_to_image": _decibels(to_image), "psnr_change": _decibels(change)}
    return result


def _decibels(error: float) -> float | None:
    """PSNR of a mean squared error; `None` for no error at all."""
    return -10.0 * math.log10(error) if error > 0 else None


def _add_histograms(health: dict[str, Any], probes: list[dict[str, Any]]) -> None:
    if not probes:
        return
    values = np.concatenate([probe["latents"] for probe in probes], axis=1)
    for channel, row in zip(health["channels"], values, strict=True):
        # Five standard deviations to each side, in round numbers.
        reach = _round_up(5.0 * channel["std"]) or 1e-6
        centre = round(channel["mean"] / reach, 2) * reach
        low, high = centre - reach, centre + reach
        counts, _ = np.histogram(np.clip(row, low, high), HISTOGRAM_BINS, (low, high))
        channel["histogram"] = {"low": low, "high": high, "counts": counts.tolist()}


def _round_up(value: float) -> float:
    if value <= 0:
        return 0.0
    digits = 1 - math.floor(math.log10(value))
    return round(value, digits)


def _plain(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
