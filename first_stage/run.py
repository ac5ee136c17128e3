"""A training run, from its configuration to its export."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from diffusers import AutoencoderKL
from torch import Tensor

from first_stage import folder as files
from first_stage.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from first_stage.config import Config, factor_problems, micro_batch_size, to_dict
from first_stage.data import (
    Batch,
    BrokenFiles,
    Source,
    StepSampler,
    TrainingStream,
    View,
    fingerprint,
    fixed_images,
    images_from_pixels,
    is_builtin,
    open_source,
    split_source,
    training_loader,
)
from first_stage.errors import ConfigError, UserError
from first_stage.export import measure_latents, model_card, write_export
from first_stage.files import write_text
from first_stage.logbook import Logbook, Progress, tracker_of
from first_stage.pictures import save_gif, save_png
from first_stage.processes import Processes, StopRequest
from first_stage.trainer import Trainer
from first_stage.validation import draw_grid, validate


class TrainingDiverged(UserError):
    """A loss or gradient stopped being a number."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: Whether all steps were done; otherwise a signal stopped it.
        step: Steps done.
        metrics: Of the held-out images, when it finished.
        held_out: Number of held-out images.
    """

    finished: bool
    step: int
    metrics: dict[str, float]
    held_out: int


def train(config: Config) -> Outcome:
    """Train a first stage and export it.

    Args:
        config: The run's configuration, as `parse_config` gives it. In a launched job every
            process calls this.

    Returns:
        How it ended; the files are in `config.output_dir`.

    Raises:
        UserError: For anything in the configuration, data or files that cannot work.
    """
    return Run(config).fit()


def recipe(config: Config) -> str:
    """The configuration as YAML that `--config` reads, ready to be resumed."""
    plain = to_dict(replace(config, resume=None, overwrite=False))
    return yaml.safe_dump(_lists(plain), sort_keys=False)


def open_data(config: Config) -> tuple[Source, Source | None]:
    """The samples to train on, and the held-out ones if there are any."""
    data = config.data

    def opened(path: str, split: Any) -> Source:
        return open_source(path, data.image_column, split, data.split)

    if data.validation_path is not None:
        return opened(data.path, "train"), opened(data.validation_path, "validation")
    if is_builtin(data.path):
        return opened(data.path, "train"), opened(data.path, "validation")
    source = opened(data.path, "all")
    if data.validation_share == 0:
        return source, None
    return split_source(source, data.validation_share, config.seed)


class Run:
    """A run's data, trainer and files.

    Args:
        config: The configuration.
    """

    def __init__(self, config: Config):
        self.config = config
        self.folder = Path(config.output_dir)
        self.accelerator = self._make_accelerator()
        self.processes = Processes()
        self.micro = micro_batch_size(config, self.processes.world)
        self._on_main(
            lambda: files.prepare_folder(self.folder, config.overwrite, config.resume is not None)
        )
        self.source, held_out = open_data(config)
        self.held_out = len(held_out) if held_out is not None else 0
        self.trainer = Trainer(config, self.accelerator, self.processes)
        stage = self.trainer.first_stage.network
        for problem in factor_problems(config, stage.downsample_factor):
            raise ConfigError(problem)
        self.stream = TrainingStream(
            self.source,
            View(config.data.resolution, config.view_resize),
            stage.in_channels,
            config.seed,
            stage.latent_shape(config.data.resolution),
            random_crop=config.data.crop == "random",
            flip=config.data.flip,
        )
        self.shown = fixed_images(
            self.source if held_out is None else held_out,
            View(*config.validation_view),
            stage.in_channels,
            config.validation.images,
            config.seed,
        )
        self.broken = BrokenFiles(self.folder / files.BROKEN, config.data.max_broken)
        self.start_step = self._resume()
        self.logbook = self._open_logbook()
        self._introduce()

    def fit(self) -> Outcome:
        """Train to the last step, or until a signal asks to stop; then export."""
        train = self.config.train
        metrics = self._validate(0) if self.start_step == 0 else {}
        batches = iter(self._loader(self._positions()))
        progress = Progress(
            self.start_step, train.max_steps, train.batch_size, visible=self.processes.is_main
        )
        done, stopping = self.start_step, False
        with StopRequest() as stop, contextlib.closing(progress):
            while done < train.max_steps and not stopping:
                micro_batches = self._next(batches, progress)
                self.trainer.training_step(done, micro_batches)
                done += 1
                last = done == train.max_steps
                progress.advance()
                stopping = self._agree(stop, micro_batches)
                if done % train.log_every == 0 or last:
                    self._log(done, progress)
                if done % self.config.validation.every == 0 or last:
                    metrics = self._validate(done)
                if done % train.checkpoint_every == 0 or last or stopping:
                    self._save(done)
        finished = done == train.max_steps
        if finished:
            metrics = metrics or self._validate(done)
            self._export(metrics)
        self.accelerator.end_training()
        return Outcome(finished, done, metrics, self.held_out)

    # -- parts of the loop -------------------------------------------------------------------

    def _positions(self) -> StepSampler:
        return StepSampler(
            self.config.train.batch_size,
            self.micro,
            self.start_step,
            self.config.train.max_steps,
            self.processes.rank,
            self.processes.world,
        )

    def _loader(self, positions: Any) -> Any:
        workers = self.config.data.workers
        if workers is None:
            local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            workers = min(8, max((os.cpu_count() or 1) // local - 1, 0))
        pin = self.accelerator.device.type == "cuda"
        return training_loader(self.stream, positions, workers, pin_memory=pin)

    def _next(self, batches: Iterator[Batch], progress: Progress) -> list[Batch]:
        began = time.perf_counter()
        micro_batches = [next(batches) for _ in range(self._positions().micro_batches)]
        progress.waited(time.perf_counter() - began)
        return [batch.to(self.accelerator.device) for batch in micro_batches]

    def _agree(self, stop: StopRequest, micro_batches: list[Batch]) -> bool:
        """Tell the other processes about a signal and about broken files; learn theirs."""
        skipped = [entry for batch in micro_batches for entry in batch.broken.items()]
        asked, skips = self.processes.totals(int(stop.signal is not None), len(skipped))
        parts = self.processes.gather(skipped) if skips else [[]]
        self.broken.add(
            self.config.train.batch_size,
            [entry for part in parts for entry in part],
            write=self.processes.is_main,
        )
        return asked > 0

    def _log(self, step: int, progress: Progress) -> None:
        self._check_finite()
        values = gradient_shares(self.trainer.meter.averages(self.processes.average))
        values["learning_rate"] = self.trainer.first_stage.optimizer.param_groups[0]["lr"]
        speed = progress.window()
        if self.logbook is not None:
            self.logbook.write(step, values)
            self.logbook.write_speed(step, speed)
        progress.show(
            f"{self.config.loss.pixel} {values['loss/pixel']:.4f}, "
            f"waiting for data {speed['speed/waiting_for_data']:.0%}"
        )

    def _validate(self, step: int) -> dict[str, float]:
        """Measure the held-out images, and add a frame to the pictures."""
        metrics: dict[str, float] = {}
        with self.trainer.ema_weights() as vae:
            if self.held_out:
                metrics = validate(vae, self.shown, self.processes, self.micro)
            if self.processes.is_main:
                picture = draw_grid(vae, self.shown, self.config.validation.pictures)
                save_png(picture, files.frame_path(self.folder, step))
        if metrics and self.logbook is not None:
            self.logbook.write(step, {f"validation/{k}": v for k, v in metrics.items()})
        return metrics

    def _check_finite(self) -> None:
        """Stop when a value was not finite, before anything of it is saved."""
        found = self.trainer.meter.first_bad(self.processes.minimum)
        if found is None:
            return
        step, names = found
        saved = find_checkpoint(self.folder, "latest")[0]
        raise TrainingDiverged(
            f"{', '.join(names)} stopped being finite at step {step}; "
            + (f"the last good checkpoint is {saved}" if saved else "no checkpoint was due yet")
            + ". Lower train.learning_rate or the weight of that term, or use train.precision no"
        )

    def _save(self, step: int) -> None:
        self._check_finite()
        snapshot = self.trainer.snapshot(step)
        snapshot.state |= {
            "config": to_dict(self.config),
            "data_fingerprint": fingerprint(self.source),
            "broken": self.broken.state_dict(),
        }
        if self.processes.is_main:
            with self.trainer.ema_weights() as vae:
                save_checkpoint(self.folder, snapshot, vae, self.config.train.keep_checkpoints)
            frames = [(f"step {number}", file) for number, file in files.list_frames(self.folder)]
            save_gif(frames, self.shown.pixels.shape[1], self.folder / files.GIF)
        self.processes.wait()

    def _export(self, metrics: dict[str, float]) -> None:
        with self.trainer.ema_weights() as vae:
            statistics = measure_latents(vae, self._measured_images(), self.processes)
            if self.processes.is_main:
                picture = files.list_frames(self.folder)[-1][1]
                card = model_card(
                    statistics,
                    data=self.config.data.path,
                    recipe=recipe(self.config),
                    metrics=metrics,
                    steps=self.config.train.max_steps,
                    images_seen=self.config.train.max_steps * self.config.train.batch_size,
                    downsample_factor=self.trainer.first_stage.network.downsample_factor,
                    picture="reconstructions.png",
                )
                extras: dict[str, str | Path] = {"README.md": card, "reconstructions.png": picture}
                write_export(vae, statistics, self.folder / files.EXPORT, extras)
        self.processes.wait()

    def _measured_images(self) -> Iterator[Tensor]:
        """This process's share of the first views of the training stream."""
        count = self.config.export.images
        mine = list(range(self.processes.rank, count, self.processes.world))
        chunks = [mine[i : i + self.micro] for i in range(0, len(mine), self.micro)]
        for batch in self._loader(chunks):
            yield images_from_pixels(batch.pixels.to(self.accelerator.device))

    # -- before the loop ---------------------------------------------------------------------

    def _make_accelerator(self) -> Accelerator:
        config = self.config.train
        tracker, remark = tracker_of(config.tracker)
        try:
            accelerator = Accelerator(
                mixed_precision=config.precision,
                log_with=tracker,
                project_dir=self.folder,
                # Buffers never differ between processes, and copying them in the critic's second
                # forward pass would change what its first one saved for the backward pass.
                kwargs_handlers=[
                    DistributedDataParallelKwargs(
                        broadcast_buffers=False, gradient_as_bucket_view=True
                    )
                ],
            )
        except ValueError as error:
            raise ConfigError(
                f"train.precision {config.precision!r} cannot be used: {error}"
            ) from error
        if remark and accelerator.is_main_process:
            print(remark, flush=True)
        return accelerator

    def _on_main(self, work: Callable[[], None]) -> None:
        """Do something on the main process; what goes wrong there is raised on all."""
        problem: str | None = None
        if self.processes.is_main:
            try:
                work()
            except UserError as error:
                problem = str(error)
        told = self.processes.gather(problem)[0]
        if told is not None:
            raise UserError(told)

    def _resume(self) -> int:
        """Restore the checkpoint that `resume` names; returns the steps done."""
        if self.config.resume is None:
            return 0
        found: tuple[Path | None, list[str]] = (None, [])
        if self.processes.is_main:
            found = find_checkpoint(self.folder, self.config.resume)
        path, remarks = self.processes.gather(found)[0]
        for remark in remarks:
            self._say(remark)
        if path is None:
            self._say(f"no checkpoint in {self.folder} yet: starting at step 0")
            return 0
        snapshot = load_checkpoint(path)
        self.trainer.restore(
            snapshot, AutoencoderKL.from_pretrained(path / "ema", use_safetensors=True)
        )
        self.broken.load_state_dict(snapshot.state["broken"])
        self._say(f"resuming at step {snapshot.step} from {path}")
        return snapshot.step

    def _open_logbook(self) -> Logbook | None:
        self.accelerator.init_trackers(files.TRACKER)
        if not self.processes.is_main:
            return None
        for step, frame in files.list_frames(self.folder):
            if step > self.start_step:
                frame.unlink()
        write_text(self.folder / files.CONFIG, recipe(self.config))
        return Logbook(self.folder / files.LOG, self.accelerator, self.start_step)

    def _introduce(self) -> None:
        config, stage = self.config, self.trainer.first_stage.network
        sizes = f"first stage of {_millions(stage)} parameters"
        if self.trainer.critic is not None:
            sizes += f", critic of {_millions(self.trainer.critic.network)}"
        processes = (
            "1 process" if self.processes.world == 1 else f"{self.processes.world} processes"
        )
        self._say(
            f"{processes} on {self.accelerator.device.type}, precision {config.train.precision}, "
            f"batch of {config.train.batch_size} in micro-batches of {self.micro}\n"
            f"{len(self.source):,} images to train on, {self.held_out:,} held out, from "
            f"{config.data.path}\n"
            f"{sizes}, f{stage.downsample_factor}, {stage.latent_channels} latent channels"
        )

    def _say(self, text: str) -> None:
        if self.processes.is_main:
            print(text, flush=True)


def gradient_shares(values: dict[str, float]) -> dict[str, float]:
    """Adds `share/x` for every `norm/x`: its share of the sum of all terms' gradient norms."""
    norms = {k.removeprefix("norm/"): v for k, v in values.items() if k.startswith("norm/")}
    total = sum(norms.values())
    return values | {f"share/{k}": v / total if total > 0 else 0.0 for k, v in norms.items()}


def _lists(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value


def _millions(module: Any) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
