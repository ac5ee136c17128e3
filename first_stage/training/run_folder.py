"""The folder of a run: what lies where, and whether a new run may write into it."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image

from first_stage.command_line import command_line
from first_stage.errors import ConfigError
from first_stage.evaluation.grids import save_png
from first_stage.files import FILE_LIST, make_writable, remove_leftovers
from first_stage.locks import RecordLock
from first_stage.training import overwrite as earlier

CONFIG = "config.yaml"
LOG = "log.jsonl"
BROKEN = "broken_files.jsonl"
GIF = "training.gif"
REPORT = "report.html"
EXPORT = "export"
EVALUATION = "evaluation"
CHECKPOINTS = "checkpoints"
PICTURES = "pictures"
FIRST_BATCH = "pictures/first-batch.png"
PLAN = "plan"
TRACKER = "tracker"
PROFILE = "profile"
SHARDS = "shards"
LOCK = ".lock"
_ALL = (
    CONFIG,
    LOG,
    BROKEN,
    GIF,
    REPORT,
    EXPORT,
    EVALUATION,
    CHECKPOINTS,
    PICTURES,
    TRACKER,
    PROFILE,
    SHARDS,
    PLAN,
    FILE_LIST,
    "held_out.txt",
)


def prepare_folder(folder: Path, overwrite: bool, resume: bool) -> None:
    """Make a run's folder, and make sure that nothing in it is lost by mistake.

    Args:
        folder: The run's folder.
        overwrite: Set an earlier run's files aside until `first_saved` or `ended`; nothing else in
            the folder is touched.
        resume: The earlier run goes on.

    Raises:
        ConfigError: When it cannot be written, or holds a run that neither goes on nor may go.
    """
    make_writable(folder, f"output_dir {str(folder)!r}")
    earlier.settle(folder)
    if resume:
        for place in (folder, folder / CHECKPOINTS, folder / PICTURES):
            if place.is_dir():
                remove_leftovers(place)
        return
    if overwrite:
        earlier.set_aside(folder, _present(folder))
        return
    ended(folder)  # a run that was killed before it had saved anything
    if present := _present(folder):
        raise ConfigError(
            f"output_dir {str(folder)!r} already holds a run ({', '.join(present)}): go on with "
            "--resume latest, replace it with --overwrite true, or choose another folder"
        )


def holds_run(folder: Path) -> bool:
    """Whether a run lies in a folder, which a new one would take the place of."""
    return bool(_present(folder))


def first_saved(folder: Path) -> None:
    """Delete the run that this one replaces: from here on this one can go on by itself."""
    earlier.let_go(folder)


@contextlib.contextmanager
def earlier_run_kept(folder: Path, wanted: bool = True) -> Iterator[None]:
    """Put the run back that this one was to replace, if this one ends before it saved anything.

    Args:
        folder: The run's folder.
        wanted: Do nothing when false: one process of a job does it for all.
    """
    try:
        yield
    finally:
        if wanted and (told := ended(folder)):
            print(told, file=sys.stderr, flush=True)


def ended(folder: Path) -> str | None:
    """Put the run back that this one was to replace, if this one has saved nothing.

    Returns:
        What was done, for the user; `None` when there was nothing to do.
    """
    return earlier.put_back(folder, _present(folder))


def _present(folder: Path) -> list[str]:
    """What of a run is in a folder, links that lead nowhere too; what a plan left is no run."""
    found = [name for name in _ALL if os.path.lexists(folder / name)]
    if set(found) <= {PICTURES, SHARDS, PLAN, FILE_LIST} and not list_frames(folder):
        return []
    return found


@contextlib.contextmanager
def locked(folder: Path, wanted: bool = True) -> Iterator[None]:
    """Keep two runs from writing into one folder; the system unlocks it when its holder dies.

    Args:
        folder: The run's folder; it is made when it is not there.
        wanted: Do nothing when false: one process of a job holds the lock for all.

    Raises:
        ConfigError: When another process holds it, with its name.
    """
    with contextlib.ExitStack() as held:
        if wanted:
            with contextlib.suppress(OSError):  # `prepare_folder` says what is wrong with it
                folder.mkdir(parents=True, exist_ok=True)
                lock = held.enter_context(RecordLock(folder / LOCK))
                if holder := lock.take():
                    raise ConfigError(
                        f"output_dir {str(folder)!r} is being written by another run ({holder}): "
                        "end that one first, or choose another folder"
                    )
        yield


def resume_command(folder: Path, world: int = 1) -> str:
    """The command that goes on with a run.

    Args:
        folder: The run's folder.
        world: Number of processes it had.
    """
    line = ("--config", folder / CONFIG, "--resume", "latest")
    return command_line("train", *line, processes=world)


def frame_path(folder: Path, step: int) -> Path:
    """Where the grid of a step lies."""
    return folder / PICTURES / f"step-{step:06d}.png"


def save_pictures(folder: Path, step: int, pictures: Mapping[str, Image.Image]) -> None:
    """Write the pictures of a step: its `grid` is kept, all others are replaced by the next."""
    for name, picture in pictures.items():
        path = frame_path(folder, step) if name == "grid" else folder / PICTURES / f"{name}.png"
        save_png(picture, path)


def list_frames(folder: Path) -> list[tuple[int, Path]]:
    """Steps and files of the grids, oldest first."""
    files = (folder / PICTURES).glob("step-*.png")
    return sorted((int(file.stem.removeprefix("step-")), file) for file in files)
