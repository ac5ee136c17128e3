"""A training run, from its configuration to its export."""

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from first_stage import folder as files
from first_stage.checkpoint import (
    Snapshot,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_aside,
)
from first_stage.config import Config, factor_problems, micro_batch_size, to_dict
from first_stage.data import (
    Batch,
    BrokenFiles,
    StepSampler,
    View,
    fingerprint,
    fixed_images,
    images_from_pixels,
    loader_fault,
    start_loader,
)
from first_stage.diagnostics import Watch, derived
from first_stage.errors import ConfigError, DataError, UserError
from first_stage.evaluation import HeldImages, Options, evaluate, save
from first_stage.export import measure_latents, model_card, write_export
from first_stage.files import write_text, writing
from first_stage.logbook import Logbook, Progress
from first_stage.pictures import save_gif, save_png
from first_stage.processes import Processes, StopRequest, end_with_launcher
from first_stage.report import write_report
from first_stage.resume import check_resumable
from first_stage.setup import make_accelerator, on_main, open_data, open_loader, open_stream
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
        processes: How many took part.
    """

    finished: bool
    step: int
    metrics: dict[str, float]
    held_out: int
    processes: int


@dataclass(frozen=True)
class Ending:
    """Whether the loop ends before its last step.

    Attributes:
        now: It does.
        fault: What went wrong, in some process; `None` when a signal asked.
    """

    now: bool
    fault: UserError | None = None


def train(config: Config) -> Outcome:
    """Train a first stage and export it.

    Args:
        config: The run's configuration, as `parse_config` gives it. In a launched job every
            process calls this.

    Returns:
        How it ended; the files are in `config.output_dir`.

    Raises:
        UserError: For anything in the configuration, data or files that cannot work, and when
            another process of the job ended before its time.
    """
    end_with_launcher()
    with StopRequest() as stop:
        accelerator = make_accelerator(config)
        processes = Processes(config.train.process_timeout)
        with processes.together(), files.locked(Path(config.output_dir), processes.is_main):
            outcome = Run(config, accelerator, processes, stop).fit()
        accelerator.end_training()
    return outcome


def recipe(config: Config) -> str:
    """The configuration as YAML that `--config` reads, ready to be resumed."""
    return yaml.safe_dump(_lists(to_dict(lasting(config))), sort_keys=False)


def lasting(config: Config) -> Config:
    """The configuration without what concerns only how this command began."""
    return replace(config, resume=None, overwrite=False)


class Run:
    """A run's data, trainer and files.

    Args:
        config: The configuration.
        accelerator: From `make_accelerator`.
        processes: Those that take part.
        stop: Whether a signal asked to end.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, processes: Processes, stop: StopRequest
    ):
        self.config, self.accelerator = config, accelerator
        self.processes, self.stop = processes, stop
        self.folder = Path(config.output_dir)
        self.micro = micro_batch_size(config, processes.world)
        resume = config.resume is not None
        on_main(processes, lambda: files.prepare_folder(self.folder, config.overwrite, resume))
        self.source, held_out = open_data(config, processes)
        self.fingerprint = self._agreed_fingerprint()
        self.held_out = len(held_out) if held_out is not None else 0
        self.trainer = Trainer(config, accelerator, processes)
        stage = self.trainer.first_stage.network
        for problem in factor_problems(config, stage.downsample_factor):
            raise ConfigError(problem)
        self.stream = open_stream(config, self.source, stage)
        self.shown = fixed_images(
            self.source if held_out is None else held_out,
            View(*config.validation_view),
            stage.in_channels,
            config.validation.images,
            config.seed,
        )
        self.watch = Watch()
        self.broken = BrokenFiles(self.folder / files.BROKEN, config.data.max_broken)
        self.resumed_at = self._resume()
        self.saved = self.resumed_at or 0
        self.logbook = self._open_logbook()
        self._introduce()

    def fit(self) -> Outcome:
        """Train to the last step, or until a signal asks to stop; then export.

        Raises:
            UserError: When data or disk fail. What was trained is saved first, where that is
                still possible, and the message says how to go on.
        """
        train = self.config.train
        metrics = self._validate(0) if self.resumed_at is None else {}
        start = self.saved
        batches = self._load(self._positions(start))
        progress = Progress(
            start, train.max_steps, train.batch_size, visible=self.processes.is_main
        )
        done, ending = start, Ending(False)
        with contextlib.closing(progress), contextlib.closing(batches):
            while done < train.max_steps:
                micro_batches, fault = self._next(batches, progress)
                ending = self._agree(micro_batches, fault)
                if ending.now:
                    break
                self.trainer.training_step(done, micro_batches)
                done += 1
                last = done == train.max_steps
                progress.advance()
                if done % train.log_every == 0 or last:
                    self._log(done, progress)
                if done % self.config.validation.every == 0 or last:
                    metrics = self._validate(done)
                if done % train.checkpoint_every == 0 or last:
                    self._save(done)
        if done != self.saved:
            self._save(done)
        if ending.fault is not None:
            raise type(ending.fault)(f"{ending.fault}. {self._what_is_saved()}")
        finished = done == train.max_steps
        if finished:
            metrics = metrics or self._measure()
            self._export(metrics)
            self._report()
        return Outcome(finished, done, metrics, self.held_out, self.processes.world)

    # -- parts of the loop -------------------------------------------------------------------

    def _positions(self, start: int) -> StepSampler:
        return StepSampler(
            self.config.train.batch_size,
            self.micro,
            start,
            self.config.train.max_steps,
            self.processes.rank,
            self.processes.world,
        )

    def _load(self, positions: Iterable[list[int]]) -> Generator[Batch, None, None]:
        pin = self.accelerator.device.type == "cuda"
        return start_loader(open_loader(self.config, self.stream, positions, pin))

    def _next(
        self, batches: Iterator[Batch], progress: Progress
    ) -> tuple[list[Batch], UserError | None]:
        """This process's micro-batches of a step, or why there are none."""
        began = time.perf_counter()
        try:
            micro_batches = [next(batches) for _ in range(self._positions(0).micro_batches)]
        except (UserError, RuntimeError, OSError, EOFError) as error:
            fault = loader_fault(error, self.processes.rank)
            if fault is None:
                raise
            return [], fault
        progress.waited(time.perf_counter() - began)
        return [batch.to(self.accelerator.device) for batch in micro_batches], None

    def _agree(self, micro_batches: list[Batch], fault: UserError | None) -> Ending:
        """Tell the other processes about signals, faults and broken files, and learn theirs.

        All of them then do the same: go on, or end between the same two steps, saved.
        """
        skipped = [entry for batch in micro_batches for entry in batch.broken.items()]
        asked, faults, skips = self.processes.totals(
            int(self.stop.signal is not None), int(fault is not None), len(skipped)
        )
        if faults:
            told = self.processes.gather(None if fault is None else str(fault))
            return Ending(True, DataError(next(text for text in told if text is not None)))
        if asked:
            return Ending(True)
        parts = self.processes.gather(skipped) if skips else [[]]
        try:
            self.broken.add(
                self.config.train.batch_size,
                [entry for part in parts for entry in part],
                write=self.processes.is_main,
            )
        except DataError as error:
            return Ending(True, error)
        return Ending(False)

    def _log(self, step: int, progress: Progress) -> None:
        self._check_finite()
        values = derived(self.trainer.meter.averages(self.processes.average))
        values["learning_rate"] = self.trainer.first_stage.optimizer.param_groups[0]["lr"]
        speed = progress.window()
        if self.logbook is not None:
            with self._writing():
                self.logbook.write(step, values)
                self.logbook.write_speed(step, speed)
        for line in self.watch.read(step, values):
            progress.say(line)
        progress.show(
            f"{self.config.loss.pixel} {values['loss/pixel']:.4f}, "
            f"waiting for data {speed['speed/waiting_for_data']:.0%}"
        )

    def _measure(self) -> dict[str, float]:
        """Metrics of the held-out images."""
        if not self.held_out:
            return {}
        with self.trainer.ema_weights() as vae:
            return validate(vae, self.shown, self.processes, self.micro)

    def _validate(self, step: int) -> dict[str, float]:
        """Measure the held-out images, and add a line to the log and a frame to the pictures."""
        metrics = self._measure()
        if self.processes.is_main:
            with self.trainer.ema_weights() as vae:
                picture = draw_grid(vae, self.shown, self.config.validation.pictures)
            with self._writing():
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
            "config": to_dict(lasting(self.config)),
            "data_fingerprint": self.fingerprint,
            "samples": len(self.source),
            "broken": self.broken.state_dict(),
        }
        if self.logbook is not None:
            with self._writing():
                self.logbook.sync()
                keep = self.config.train.keep_checkpoints
                save_checkpoint(self.folder, snapshot, self.trainer.ema_weights, keep)
                frames = files.list_frames(self.folder)
                captioned = [(f"step {number}", file) for number, file in frames]
                save_gif(captioned, self.shown.pixels.shape[1], self.folder / files.GIF)
        self.processes.wait()
        self.saved = step

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(self.folder, self._what_is_saved)

    def _what_is_saved(self) -> str:
        """How the user goes on after an accident."""
        if self.saved == 0:
            return "No step had been saved yet"
        command = files.resume_command(self.folder, self.processes.world)
        return f"Everything up to step {self.saved} is saved; go on with: {command}"

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
                with self._writing():
                    write_export(vae, statistics, self.folder / files.EXPORT, extras)
        self.processes.wait()

    def _report(self) -> None:
        """Look closely at the images of the pictures once more, and make the run's report."""
        held = "held out" if self.held_out else "trained on"
        images = HeldImages(self.shown, f"{self.config.data.path}, {held}")
        with self.trainer.ema_weights() as vae:
            found = evaluate(
                [("this run", vae)],
                images,
                Options(batch_size=self.micro),
                self.processes,
                self.config.seed,
            )
        if self.processes.is_main:
            with self._writing():
                save(found, self.folder / files.EVALUATION)
                write_report(self.folder)
        self.processes.wait()

    def _measured_images(self) -> Iterator[Tensor]:
        """This process's share of the first views of the training stream."""
        count = self.config.export.images
        mine = list(range(self.processes.rank, count, self.processes.world))
        chunks = [mine[i : i + self.micro] for i in range(0, len(mine), self.micro)]
        for batch in self._load(chunks):
            yield images_from_pixels(batch.pixels.to(self.accelerator.device))

    # -- before the loop ---------------------------------------------------------------------

    def _agreed_fingerprint(self) -> str:
        """The data's fingerprint; on several machines each may have its own copy."""
        prints = self.processes.gather(fingerprint(self.source))
        for rank, other in enumerate(prints):
            if other != prints[0]:
                raise DataError(
                    f"data.path {self.config.data.path!r} is not the same everywhere: process "
                    f"{rank} sees other samples than process 0. Give all machines the same files"
                )
        return str(prints[0])

    def _resume(self) -> int | None:
        """Restore the checkpoint that `resume` names; returns the steps done."""
        if self.config.resume is None:
            return None
        found: tuple[Path | None, list[str]] = (None, [])

        def find() -> None:
            nonlocal found
            found = find_checkpoint(self.folder, str(self.config.resume))

        on_main(self.processes, find)
        path, remarks = self.processes.gather(found)[0]
        for remark in remarks:
            self._say(remark)
        if path is None:
            self._say(f"no checkpoint in {self.folder} yet: starting at step 0")
            self.broken.load_state_dict(self.broken.state_dict(), write=self.processes.is_main)
            return None
        snapshot = load_checkpoint(path)
        self._check_resumable(snapshot, path)
        self.trainer.restore(
            snapshot, AutoencoderKL.from_pretrained(path / "ema", use_safetensors=True)
        )
        self.broken.load_state_dict(snapshot.state["broken"], write=self.processes.is_main)
        self._say(f"resuming at step {snapshot.step} from {path}")
        if self.processes.is_main:
            for place in set_aside(self.folder, snapshot.step):
                self._say(f"a later checkpoint is set aside as {place}; delete it when you like")
        return snapshot.step

    def _check_resumable(self, snapshot: Snapshot, path: Path) -> None:
        """Whether this run is the one that the checkpoint belongs to."""
        changes = check_resumable(
            snapshot.state["config"], to_dict(self.config), to_dict(Config()), str(path)
        )
        if changes:
            self._say(f"changed since the checkpoint was written:\n{changes}")
        if snapshot.state["data_fingerprint"] != self.fingerprint:
            raise DataError(
                f"the data set {self.config.data.path!r} has changed since the checkpoint {path}: "
                f"{snapshot.state['samples']:,} samples to train on then, {len(self.source):,} "
                f"now, fingerprint {snapshot.state['data_fingerprint']} then, {self.fingerprint} "
                "now. Put it back as it was, or begin a new run in another output_dir "
                f"(--model.pretrained {path}/ema starts it from these weights)"
            )
        if snapshot.step > self.config.train.max_steps:
            raise ConfigError(
                f"train.max_steps ({self.config.train.max_steps}) is below the {snapshot.step} "
                f"steps of the checkpoint {path}: raise it, or resume from an earlier checkpoint"
            )

    def _open_logbook(self) -> Logbook | None:
        self.accelerator.init_trackers(files.TRACKER)
        if not self.processes.is_main:
            return None
        with self._writing():
            for step, frame in files.list_frames(self.folder):
                if self.resumed_at is None or step > self.resumed_at:
                    frame.unlink()
            write_text(self.folder / files.CONFIG, recipe(self.config))
            return Logbook(self.folder / files.LOG, self.accelerator, self.resumed_at)

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


def _lists(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value


def _millions(module: Any) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M"
