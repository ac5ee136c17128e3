"""Trains each objective from the same warmed-up first stage and measures it; can be resumed."""

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from experiments.objectives.measures import LocalFeatures, Scores, score
from experiments.objectives.photos import packaged_photos, shrunk, tiles
from experiments.objectives.rows import START, Budget, row_config, warmup_config
from experiments.objectives.stripes import critic_ratios
from first_stage.config.parsing import to_dict
from first_stage.config.schema import Config
from first_stage.config.sections import with_sections
from first_stage.data import (
    Batch,
    Source,
    StepSampler,
    TrainingStream,
    fingerprint,
    open_source,
    training_loader,
)
from first_stage.distributed.processes import Processes
from first_stage.errors import UserError
from first_stage.files import write_folder, write_json
from first_stage.models.loading import load_autoencoder
from first_stage.training.checkpoint import (
    Snapshot,
    checkpoint_folder,
    load_checkpoint,
    save_checkpoint,
)
from first_stage.training.step import Trainer

Say = Callable[[str], None]
CHANNELS = 3


@dataclass(frozen=True)
class Photos:
    """What all objectives see.

    Attributes:
        training: Photos to train on, in memory.
        held_out: `(N, C, H, W)` in [-1, 1].
        names: Of the photos that these are tiles of.
    """

    training: Source
    held_out: Tensor
    names: list[str]


def open_photos(
    more: str | None = None,
    *,
    data: str | None = None,
    held_out: str | None = None,
    side: int = 144,
    tile: int = 72,
) -> Photos:
    """The photos, decoded and shrunk.

    Args:
        more: Further photos to train on: a folder or a data set id.
        data: Photos to train on; `None`: those that come with packages.
        held_out: Photos to measure on, with `data`.
        side: Shorter side that all are shrunk to, in pixels.
        tile: Side of the held-out tiles, in pixels.
    """
    if data is not None and held_out is not None:
        training: Source = open_source(data, None, "train", "train")
        measured: Source = open_source(held_out, None, "validation", "validation")
    else:
        training, measured = packaged_photos()
    shown, names = tiles(shrunk([measured], side, CHANNELS), tile, CHANNELS)
    sources = [training]
    if more is not None:
        sources.append(open_source(more, None, "train", "train"))
    return Photos(shrunk(sources, side, CHANNELS), shown, names)


@dataclass(frozen=True)
class Result:
    """What became of one objective and seed.

    Attributes:
        scores: On held-out photos.
        stripes: Ratios by the critic's learned distance, after training and (`untrained ...`)
            before; empty without a critic.
        seconds: What training it took.
    """

    scores: Scores
    stripes: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Start:
    """A first stage after the warm-up that all objectives share.

    Attributes:
        snapshot: Its weights, their average and the optimizer's state.
        ema: The averaged weights.
    """

    snapshot: Snapshot
    ema: Any


class Experiment:
    """One table: rows of objectives, several seeds.

    What is finished is kept in `output` and not made again, so a run that was cut off goes on.

    Args:
        photos: The photos.
        budget: Steps, sizes and rates.
        output: Folder for the results.
        say: Prints a line.
        vgg: Weights of VGG16, for the row that needs them.
    """

    def __init__(
        self, photos: Photos, budget: Budget, output: Path, say: Say, vgg: str | None = None
    ):
        self.photos, self.budget, self.output, self.say = photos, budget, output, say
        self.vgg = vgg
        self.accelerator = Accelerator()
        self.processes = Processes()
        if self.processes.world > 1:
            raise UserError("compare_objectives.py runs as one process: start it with python")
        self.network = LocalFeatures().to(self.accelerator.device)
        self._starts: dict[int, Start] = {}

    def result(self, row: str, seed: int) -> Result:
        """The result of one objective and seed; made only where it is not there yet."""
        return self._stored(row, seed) or self._make(row, seed)

    def first_stage_folder(self, row: str, seed: int) -> Path:
        """Where the trained first stage of a row lies, as a diffusers folder."""
        return self.output / f"seed-{seed}" / row

    def _identity(self, config: Config) -> str:
        """A hash of all that decides a result."""
        parts = {
            "config": _changed(to_dict(config), to_dict(with_sections(Config)())),
            "photos": fingerprint(self.photos.training),
            "held_out": hashlib.sha256(self.photos.held_out.numpy().tobytes()).hexdigest(),
            "warmup": self.budget.warmup_steps,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def _same(self, made_by: str, config: Config, file: Path) -> None:
        """Refuse what was made with other settings or photos."""
        if made_by != self._identity(config):
            raise UserError(
                f"{file} was made with other settings or photos: choose another --output, or "
                "delete it"
            )

    def _stored(self, row: str, seed: int) -> Result | None:
        file = self.first_stage_folder(row, seed) / "scores.json"
        if not file.exists():
            return None
        stored = json.loads(file.read_text())
        self._same(stored["made_by"], self._config(row, seed), file)
        scores = Scores(**stored["scores"])
        return Result(scores, stored.get("stripes", {}), stored["seconds"])

    def _config(self, row: str, seed: int) -> Config:
        return row_config(row, self.budget, seed, self.vgg)

    def _make(self, row: str, seed: int) -> Result:
        config = self._config(row, seed)
        start = self._start(seed)
        began = time.perf_counter()
        stripes: dict[str, float] = {}
        if row == START:
            vae = start.ema
        else:
            trainer = Trainer(config, self.accelerator, self.processes)
            _restore(trainer, start)
            untrained = self._stripes(trainer)
            self._train(trainer, config, self.budget.warmup_steps, row)
            with trainer.ema_weights() as averaged:
                vae = copy.deepcopy(averaged.model)
            stripes = self._stripes(trainer)
            stripes |= {f"untrained {name}": ratio for name, ratio in untrained.items()}
        seconds = time.perf_counter() - began
        result = Result(score(vae, self.photos.held_out, self.network), stripes, seconds)

        def write(folder: Path) -> None:
            vae.save_pretrained(folder, safe_serialization=True)
            made = {"made_by": self._identity(config), **dataclasses.asdict(result)}
            write_json(folder / "scores.json", made)

        write_folder(self.first_stage_folder(row, seed), write)
        self.say(f"seed {seed}, {row}: {describe(result.scores)} ({seconds / 60:.1f} min)")
        return result

    def _stripes(self, trainer: Trainer) -> dict[str, float]:
        if trainer.critic is None:
            return {}
        photos = self.photos.held_out[:: max(len(self.photos.held_out) // 32, 1)]
        return critic_ratios(trainer.critic.network, photos.to(self.accelerator.device))

    def _start(self, seed: int) -> Start:
        """The first stage after the warm-up, from its checkpoint if there is one."""
        if seed in self._starts:
            return self._starts[seed]
        config, steps = warmup_config(self.budget, seed), self.budget.warmup_steps
        folder = self.output / f"seed-{seed}" / "warm-up"
        saved = checkpoint_folder(folder, steps)
        if not saved.exists():
            trainer = Trainer(config, self.accelerator, self.processes)
            self._train(trainer, config, 0, "warm-up")
            snapshot = trainer.snapshot(steps)
            snapshot.state["made_by"] = self._identity(config)
            save_checkpoint(folder, snapshot, trainer.averaged_model, keep=1)
        loaded = load_checkpoint(saved)
        self._same(loaded.state["made_by"], config, saved)
        ema = load_autoencoder(str(saved / "ema"))
        self._starts = {seed: Start(loaded, ema.to(self.accelerator.device))}
        return self._starts[seed]

    def _train(self, trainer: Trainer, config: Config, start_step: int, name: str) -> None:
        size, every = config.train.batch_size, config.train.log_every
        began = time.perf_counter()
        sampler = StepSampler(size, size, range(start_step, config.train.max_steps), 0, 1)
        for step, batch in enumerate(self._batches(trainer, config, sampler), start_step):
            trainer.training_step(step, [batch.to(self.accelerator.device)])
            if (step + 1) % every == 0:
                values = trainer.meter.averages(self.processes.average)
                if (bad := trainer.meter.first_bad(self.processes.minimum)) is not None:
                    raise UserError(f"{name}: {', '.join(bad[1])} not finite at step {bad[0]}")
                shown = ", ".join(
                    f"{k.removeprefix('loss/')} {v:.4f}"
                    for k, v in values.items()
                    if k.startswith("loss/")
                )
                rate = (step + 1 - start_step) / (time.perf_counter() - began)
                left = (config.train.max_steps - step - 1) / rate / 60
                self.say(
                    f"seed {config.seed}, {name}, step {step + 1} of {config.train.max_steps}: "
                    f"{shown} ({rate * size:.0f} images/s, {left:.0f} min left)"
                )

    def _batches(self, trainer: Trainer, config: Config, sampler: StepSampler) -> Iterator[Batch]:
        stream = TrainingStream(
            self.photos.training,
            config.data.view(config.data.resolution),
            trainer.first_stage.network.in_channels,
            config.seed,
        )
        return iter(training_loader(stream, sampler, workers=0, pin_memory=False))


def _restore(trainer: Trainer, start: Start) -> None:
    """Start a trainer from the warmed-up first stage; its critic is as it was made."""
    fresh = trainer.snapshot(start.snapshot.step)
    tensors = copy.deepcopy(start.snapshot.tensors)
    for name in fresh.tensors.keys() - tensors.keys():  # the critic, and its average
        tensors[name] = copy.deepcopy(fresh.tensors[name])
    tensors["means"] = {}
    trainer.restore(Snapshot(fresh.step, tensors, start.snapshot.state), start.ema)


def _changed(fields: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields that differ from their defaults: a new option that is off changes no result."""
    return {
        name: _changed(value, defaults[name]) if isinstance(value, dict) else value
        for name, value in fields.items()
        if value != defaults[name]
    }


def describe(scores: Scores) -> str:
    """The scores in a line."""
    return (
        f"PSNR {scores.psnr:.2f} dB, local Frechet distance {scores.local_frechet:.1f}, "
        f"high frequencies {scores.high_frequencies:.2f}, feature distance "
        f"{scores.feature_distance:.2f}"
    )
