"""The folder of a run: what lies where, and whether a new run may write into it."""

import os
import shutil
from pathlib import Path

from first_stage.errors import ConfigError

CONFIG = "config.yaml"
LOG = "log.jsonl"
BROKEN = "broken_files.jsonl"
GIF = "training.gif"
REPORT = "report.html"
EXPORT = "export"
CHECKPOINTS = "checkpoints"
PICTURES = "pictures"
TRACKER = "tracker"
_ALL = (CONFIG, LOG, BROKEN, GIF, REPORT, EXPORT, CHECKPOINTS, PICTURES, TRACKER)


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


def frame_path(folder: Path, step: int) -> Path:
    """Where the grid of a step lies."""
    return folder / PICTURES / f"step-{step:06d}.png"


def list_frames(folder: Path) -> list[tuple[int, Path]]:
    """Steps and files of the grids, oldest first."""
    files = (folder / PICTURES).glob("step-*.png")
    return sorted((int(file.stem.removeprefix("step-")), file) for file in files)
