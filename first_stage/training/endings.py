"""How a run ends: at its last step, when asked to, or by an accident that is told in words."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from first_stage.config.checks import micro_batch_size
from first_stage.config.schema import Config
from first_stage.data import Batch, BrokenFiles
from first_stage.distributed.memory import OutOfMemory, is_out_of_memory
from first_stage.distributed.processes import Processes
from first_stage.errors import DataError, UserError
from first_stage.training.checkpoint import list_checkpoints
from first_stage.training.run_folder import CONFIG, resume_command


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: Whether all steps were done; otherwise a signal stopped it.
        step: Steps done by this run and those before it; 0 when it was stopped before its first.
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


def agree(
    micro_batches: Sequence[Batch],
    fault: UserError | None,
    processes: Processes,
    asked: bool,
    broken: BrokenFiles,
    batch_size: int,
) -> Ending:
    """Tell the other processes about signals, faults and broken files, and learn theirs.

    All of them then do the same: go on, or end between the same two steps, saved.

    Args:
        micro_batches: This process's of the step.
        fault: Why there are none.
        processes: Those of the job.
        asked: Whether a signal asked this process to end.
        broken: Takes in the samples that were skipped.
        batch_size: Samples drawn in the step, over all processes.
    """
    skipped = [entry for batch in micro_batches for entry in batch.broken.items()]
    stops, faults, skips = processes.totals(int(asked), int(fault is not None), len(skipped))
    if faults:
        told = processes.gather(None if fault is None else str(fault))
        return Ending(True, DataError(next(text for text in told if text is not None)))
    if stops:
        return Ending(True)
    parts = processes.gather(skipped) if skips else [[]]
    try:
        everywhere = [entry for part in parts for entry in part]
        broken.add(batch_size, everywhere, write=processes.is_main)
    except DataError as error:
        return Ending(True, error)
    return Ending(False)


class TrainingDiverged(UserError):
    """A loss or gradient stopped being a number."""


def diverged(folder: Path, step: int, names: Sequence[str]) -> TrainingDiverged:
    """What to say when values stopped being finite.

    Args:
        folder: The run's folder.
        step: The first step with such a value.
        names: Of these values.
    """
    saved = list_checkpoints(folder)
    kept = f"the last good checkpoint is {saved[-1][1]}" if saved else "no checkpoint was due yet"
    return TrainingDiverged(
        f"{', '.join(names)} stopped being finite at step {step}; {kept}. Lower "
        "train.learning_rate or the weight of that term, or use train.precision no"
    )


def what_is_saved(folder: Path, step: int, world: int) -> str:
    """How the user goes on after an accident.

    Args:
        folder: The run's folder.
        step: The last one that is saved; 0 for none.
        world: Number of processes.
    """
    command = resume_command(folder, world)
    if step == 0:
        again = f"; start again with: {command}" if (folder / CONFIG).exists() else ""
        return f"No step had been saved yet{again}"
    return f"Everything up to step {step} is saved; go on with: {command}"


@contextlib.contextmanager
def memory_told(config: Config, world: int, saved: Callable[[], str]) -> Iterator[None]:
    """Tell in a line that the memory ran out, and which fields need less.

    Args:
        config: The run's configuration.
        world: Number of processes.
        saved: Says what the user still has, and how to go on.

    Raises:
        OutOfMemory: Instead of what torch or Python raises.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        remedies = []
        if (micro := micro_batch_size(config, world)) > 1:
            remedies.append(f"lower train.micro_batch_size ({micro} now)")
        if not config.model.gradient_checkpointing:
            remedies.append("set model.gradient_checkpointing to true")
        # Another resolution is another run; the first two may change when it goes on.
        remedies.append(f"train at a lower data.resolution ({config.data.resolution} now)")
        raise OutOfMemory(f"out of memory: {', or '.join(remedies)}. {saved()}") from error
