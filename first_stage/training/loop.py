"""A training run, from its configuration to its export."""

import contextlib
import functools
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from first_stage.config.checks import check, factor_problems, micro_batch_size
from first_stage.config.parsing import to_dict
from first_stage.config.schema import Config
from first_stage.data import (
    Batch,
    BrokenFiles,
    StepSampler,
    fixed_images,
    images_from_pixels,
    loader_fault,
    start_loader,
)
from first_stage.data.checks import value_remark
from first_stage.data.paired import LatentStore
from first_stage.distributed.processes import (
    Processes,
    Stopped,
    StopRequest,
    end_with_launcher,
    on_main,
)
from first_stage.errors import ConfigError, UserError
from first_stage.evaluation import HeldImages, Options, evaluate
from first_stage.files import write_text, writing
from first_stage.handover.statistics import measure_latents
from first_stage.metrics.training import Watch, derived
from first_stage.models.loading import load_autoencoder
from first_stage.report import write_report
from first_stage.spans import span
from first_stage.training import run_folder as files
from first_stage.training import start_from
from first_stage.training.checkpoint import read_checkpoint, save_checkpoint, set_aside
from first_stage.training.data import (
    agreed_fingerprint,
    make_accelerator,
    open_data,
    open_loader,
    open_stream,
    pair_latents,
)
from first_stage.training.endings import (
    Ending,
    Outcome,
    agree,
    diverged,
    memory_told,
    what_is_saved,
)
from first_stage.training.finish import hand_over
from first_stage.training.introduction import draw_first_batch, introduction
from first_stage.training.log import Logbook, Progress
from first_stage.training.profiling import StepProfiler
from first_stage.training.resume import check_resumable, find_start, lasting, recipe
from first_stage.training.step import Trainer
from first_stage.training.validation import draw_pictures, validate


def train(config: Config, latents: LatentStore | None = None) -> Outcome:
    """Train a first stage and export it.

    Args:
        config: The run's configuration, as `parse_config` gives it. In a launched job every
            process calls this.
        latents: What opens `config.data.latents`; `latent_tools.CachedLatents` does.

    Returns:
        How it ended; the files are in `config.output_dir`.

    Raises:
        UserError: For anything in the configuration, data or files that cannot work, and when
            another process of the job ended before its time.
    """
    check(config)
    end_with_launcher()
    with StopRequest(at_once=True) as stop:
        try:
            accelerator = make_accelerator(config.train, config.output_dir)
            processes = Processes(config.train.process_timeout)
            run = functools.partial(Run, config, accelerator, processes, stop, latents)
            outcome = _train(config, processes, run)
        except Stopped:
            return Outcome(False, 0, {}, 0, 1)
        accelerator.end_training()
    return outcome


def _train(config: Config, processes: Processes, make: Callable[[], "Run"]) -> Outcome:
    folder, run = Path(config.output_dir), None

    def saved() -> str:
        return run.saved_so_far() if run is not None else what_is_saved(folder, 0, 1)

    with (
        processes.together(),
        files.locked(folder, processes.is_main),
        files.earlier_run_kept(folder, processes.is_main),
        memory_told(config, processes.world, saved),
    ):
        run = make()
        return run.fit()


class Run:
    """A run's data, trainer and files.

    Args:
        config: The configuration.
        accelerator: From `make_accelerator`.
        processes: Those that take part.
        stop: Whether a signal asked to end.
        latents: Where the latents of the training images are kept, if they are.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        processes: Processes,
        stop: StopRequest,
        latents: LatentStore | None = None,
    ):
        self.config, self.folder = config, Path(config.output_dir)
        self.accelerator, self.processes, self.stop = accelerator, processes, stop
        self.micro = micro_batch_size(config, processes.world)
        resume = config.resume is not None
        on_main(processes, lambda: files.prepare_folder(self.folder, config.overwrite, resume))
        start, remarks = find_start(config, processes)
        for remark in remarks:
            self._say(remark)
        origin = start_from.find_origin(config, processes, start)
        config = self.config = start_from.as_started(config, origin)
        sizes = {"seed": config.seed, "batch_size": config.train.batch_size}
        self.source, held_out = open_data(
            config.data, folder=self.folder, processes=processes, say=self._say, **sizes
        )
        self.fingerprint = agreed_fingerprint(self.source, processes)
        self.held_out = len(held_out) if held_out is not None else 0
        self.trainer = Trainer(start_from.built_for(config, start, origin), accelerator, processes)
        stage = self.trainer.first_stage.network
        for problem in factor_problems(config, stage.downsample_factor):
            raise ConfigError(problem)
        if config.model.pretrained is not None:
            layout = {"family": stage.family.name, **stage.family.layout(stage.model)}
            self.config = replace(config, model=replace(config.model, **layout))
        given = pair_latents(latents, self.source, config.data, stage)
        channels = stage.in_channels
        self.stream = open_stream(
            self.source, config.data, given,
            channels=channels, late_start=config.late_start, **sizes,
        )  # fmt: skip
        self.shown = fixed_images(
            self.source if held_out is None else held_out,
            config.held_out_view,
            config.data.reading(channels),
            config.validation.images,
            config.seed,
        )
        self.watch = Watch()
        self.broken = BrokenFiles(self.folder / files.BROKEN, config.data.max_broken)
        self.lineage, self.resumed_at = self._begin(start, origin)
        self.saved = self.resumed_at or 0
        self.logbook = self._open_logbook()
        if processes.is_main and (remark := value_remark(self.source, self.stream.reading)):
            self._say(remark)
        samples, held = len(self.source), self.held_out
        self._say(introduction(self.trainer, micro=self.micro, samples=samples, held_out=held))

    def fit(self) -> Outcome:
        """Train to the last step, or until a signal asks to stop; then export.

        Raises:
            UserError: When data or disk fail. What was trained is saved first, where that is
                still possible, and the message says how to go on.
        """
        train = self.config.train
        metrics = self._validate(0) if self.resumed_at is None else {}
        self.stop.defer()  # until here there is nothing to save
        done, ending = self.saved, Ending(False)
        batches = self._load(self._positions(done))
        progress = Progress(done, train.max_steps, train.batch_size, self.processes.is_main)
        profiler = StepProfiler(train.profile_steps, self.folder / files.PROFILE)
        with contextlib.closing(progress), contextlib.closing(batches), profiler.running():
            while done < train.max_steps:
                if (trace := profiler.begin_step(done)) is not None:
                    progress.say(f"trace of steps {train.profile_steps}: {trace}")
                micro_batches, fault = self._next(batches, progress)
                ending = agree(
                    micro_batches, fault, self.processes, self.stop.signal is not None, self.broken,
                    train.batch_size,
                )  # fmt: skip
                if ending.now:
                    break
                if done == 0:
                    self._draw(micro_batches[0])
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
            raise type(ending.fault)(f"{ending.fault}. {self.saved_so_far()}")
        finished = done == train.max_steps
        if finished:
            metrics = metrics or self._measure()
            self._hand_over(metrics)
        if summary := self.broken.summary():
            self._say(summary)
        return Outcome(finished, done, metrics, self.held_out, self.processes.world)

    # -- parts of the loop -------------------------------------------------------------------

    def _positions(self, start: int) -> StepSampler:
        return StepSampler(
            self.config.train.batch_size,
            self.micro,
            range(start, self.config.train.max_steps),
            self.processes.rank,
            self.processes.world,
        )

    def _load(self, positions: Iterable[list[int]]) -> Generator[Batch, None, None]:
        pin = self.accelerator.device.type == "cuda"
        workers = self.config.data.workers
        return start_loader(open_loader(self.stream, positions, workers=workers, pin_memory=pin))

    def _next(
        self, batches: Iterator[Batch], progress: Progress
    ) -> tuple[list[Batch], UserError | None]:
        """This process's micro-batches of a step, or why there are none."""
        began = time.perf_counter()
        try:
            with span("data"):
                micro_batches = [next(batches) for _ in range(self._positions(0).micro_batches)]
        except (UserError, RuntimeError, OSError, EOFError) as error:
            fault = loader_fault(error, self.processes.rank)
            if fault is None:
                raise
            return [], fault
        progress.waited(time.perf_counter() - began)
        return [batch.to(self.accelerator.device) for batch in micro_batches], None

    def _draw(self, batch: Batch) -> None:
        """Write the first crops, as the network gets them, as a picture."""
        if self.processes.is_main:
            with self._writing():
                draw_first_batch(batch.pixels, self.folder / files.FIRST_BATCH)

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
        with self.trainer.ema_weights() as stage:
            return validate(stage, self.shown, self.processes, self.micro)

    def _validate(self, step: int) -> dict[str, float]:
        """Measure the held-out images, and add a line to the log and a frame to the pictures."""
        metrics = self._measure()
        if self.processes.is_main:
            with self.trainer.ema_weights() as stage:
                drawn = draw_pictures(stage, self.shown, self.config.validation.pictures)
            with self._writing():
                files.save_pictures(self.folder, step, drawn)
                if metrics and self.logbook is not None:
                    self.logbook.write(step, {f"validation/{k}": v for k, v in metrics.items()})
                write_report(self.folder)
        return metrics

    def _check_finite(self) -> None:
        """Stop when a value was not finite, before anything of it is saved."""
        found = self.trainer.meter.first_bad(self.processes.minimum)
        if found is None:
            return
        raise diverged(self.folder, *found)

    def _save(self, step: int) -> None:
        self._check_finite()
        snapshot = self.trainer.snapshot(step)
        snapshot.state |= {
            "config": to_dict(lasting(self.config)),
            "data_fingerprint": self.fingerprint,
            "samples": len(self.source),
            "broken": self.broken.state_dict(),
            **asdict(self.lineage),
        }
        if self.logbook is not None:
            with self._writing():
                self.logbook.sync()
                keep = self.config.train.keep_checkpoints
                save_checkpoint(self.folder, snapshot, self.trainer.averaged_model, keep)
                files.first_saved(self.folder)
        self.processes.wait()
        self.saved = step

    def _writing(self) -> contextlib.AbstractContextManager[None]:
        return writing(self.folder, self.saved_so_far)

    def saved_so_far(self) -> str:
        """How the user goes on after an accident."""
        return what_is_saved(self.folder, self.saved, self.processes.world)

    def _hand_over(self, metrics: dict[str, float]) -> None:
        """Measure latents and reconstructions once more, and write the export and the report."""
        held = "held out" if self.held_out else "trained on"
        images = HeldImages(self.shown, f"{self.config.data.path}, {held}")
        options = Options(batch_size=self.micro)
        with self.trainer.ema_weights() as stage:
            statistics = measure_latents(
                stage, self._first_images(self.config.export.images), self.processes
            )
            found = evaluate(
                [("this run", stage)], images, options, self.processes, self.config.seed
            )
            if self.processes.is_main:
                with self._writing():
                    cell = self.shown.pixels.shape[1]
                    hand_over(self.config, self.lineage, stage, statistics, metrics, found, cell)
        self.processes.wait()

    def _first_images(self, count: int) -> Iterator[Tensor]:
        """This process's share of the first views of the training stream."""
        mine = list(range(self.processes.rank, count, self.processes.world))
        chunks = [mine[i : i + self.micro] for i in range(0, len(mine), self.micro)]
        for batch in self._load(chunks):
            yield images_from_pixels(batch.pixels.to(self.accelerator.device))

    # -- before the loop ---------------------------------------------------------------------

    def _begin(
        self, path: Path | None, origin: start_from.Origin | None
    ) -> tuple[start_from.Lineage, int | None]:
        """Restore a checkpoint that was verified; returns the steps done, `None` for a new run."""
        if path is None:
            if self.config.resume is not None:
                self.broken.load_state_dict(self.broken.state_dict(), write=self.processes.is_main)
            if origin is not None:
                self._say(start_from.carry_over(self.trainer, origin))
            return start_from.Lineage.begun(
                self.config, origin, self.trainer.first_stage.network.model
            ), None
        snapshot = read_checkpoint(path)
        begun = {"checkpoint": str(path), "fingerprint": self.fingerprint}
        changes = check_resumable(self.config, snapshot, source=self.source, **begun)
        if changes:
            self._say(f"changed since the checkpoint was written:\n{changes}")
        self.trainer.restore(snapshot, load_autoencoder(str(path / "ema")))
        self.broken.load_state_dict(snapshot.state["broken"], write=self.processes.is_main)
        self._say(f"resuming at step {snapshot.step} from {path}")
        if self.processes.is_main:
            for place in set_aside(self.folder, snapshot.step):
                self._say(f"a later checkpoint is set aside as {place}; delete it when you like")
        return start_from.Lineage.resumed(self.config, snapshot.state), snapshot.step

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

    def _say(self, text: str) -> None:
        if self.processes.is_main:
            print(text, flush=True)
