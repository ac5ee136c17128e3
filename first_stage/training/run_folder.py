"""The folder of a run: what lies where, and whether a new run may write into it."""

import contextlib
import errno
import os
import shlex
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from first_stage.errors import ConfigError
from first_stage.files import remove_leftovers

CONFIG = "config.yaml"
LOG = "log.jsonl"
BROKEN = "broken_files.jsonl"
GIF = "training.gif"
REPORT = "report.html"
EXPORT = "export"
EVALUATION = "evaluation"
CHECKPOINTS = "checkpoints"
PICTURES = "pictures"
TRACKER = "tracker"
SHARDS = "shards"
INVENTORY = "files.txt"
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
    SHARDS,
    INVENTORY,
    "held_out.txt",
)


def prepare_folder(folder: Path, overwrite: bool, resume: bool) -> None:
    """Make a run's folder, and make sure that nothing in it is lost by mistake.

    Args:
        folder: The run's folder.
        overwrite: Remove an earlier run's files; nothing else in the folder is touched.
        resume: The earlier run goes on.

    Raises:
        ConfigError: When it cannot be written, or holds a run that neither goes on nor may go.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"output_dir {str(folder)!r} cannot be written: {error.strerror or error}"
        ) from error
    if resume:
        for place in (folder, folder / CHECKPOINTS, folder / PICTURES):
            if place.is_dir():
                remove_leftovers(place)
        return
    present = [name for name in _ALL if (folder / name).exists()]
    if present and not overwrite:
        raise ConfigError(
            f"output_dir {str(folder)!r} already holds a run ({', '.join(present)}): go on with "
            "--resume latest, replace it with --overwrite true, or choose another folder"
        )
    for name in present:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def locked(folder: Path, wanted: bool = True) -> Iterator[None]:
    """Keep two runs from writing into one folder; the system unlocks it when its holder dies.

    Args:
        folder: The run's folder; it is made when it is not there.
        wanted: Do nothing when false: one process of a job holds the lock for all.

    Raises:
        ConfigError: When another process holds it, with its name.
    """
    handle = _take_lock(folder) if wanted else None
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _take_lock(folder: Path) -> int | None:
    try:
        import fcntl
    except ImportError:  # Windows has no such thing
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return None  # `prepare_folder` says what is wrong with the folder
    try:
        # Of the two kinds this one belongs to the process: what it forks, such as the workers that
        # decode images, does not hold the lock any longer than it lives itself.
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise ConfigError(
                f"output_dir {str(folder)!r} is being written by another run ({holder}): end that "
                "one first, or choose another folder"
            ) from error
        return None  # a file system without locks
    with contextlib.suppress(OSError):  # a full disk is told where something is lost by it
        os.ftruncate(handle, 0)
        os.write(handle, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
    return handle


def resume_command(folder: Path, world: int = 1) -> str:
    """The command that goes on with a run.

    Args:
        folder: The run's folder.
        world: Number of processes it had.
    """
    count = f"--num_processes {world} " if world > 1 else ""
    config = shlex.quote(str(folder / CONFIG))
    return f"accelerate launch {count}scripts/train.py --config {config} --resume latest"


def frame_path(folder: Path, step: int) -> Path:
    """Where the grid of a step lies."""
    return folder / PICTURES / f"step-{step:06d}.png"


def list_frames(folder: Path) -> list[tuple[int, Path]]:
    """Steps and files of the grids, oldest first."""
    files = (folder / PICTURES).glob("step-*.png")
    return sorted((int(file.stem.removeprefix("step-")), file) for file in files)
