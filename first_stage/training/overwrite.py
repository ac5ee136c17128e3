"""The run that a new one replaces: kept until the new one has saved something.

    replaced-run/   the earlier run, from the start of the new one to its first checkpoint
    failed-run/     what a new run wrote that ended before its first checkpoint
    .moving-run/    while files move from one place to another: what is in it belongs in the folder

Each name moves by one rename, so wherever this is cut off every file is in the folder or in
`.moving-run/`, and the next start finishes it.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from first_stage.errors import ConfigError
from first_stage.files import remove, remove_folder, sync_folder
from first_stage.training.checkpoint import list_checkpoints

REPLACED = "replaced-run"
FAILED = "failed-run"
_MOVING = ".moving-run"


def settle(folder: Path) -> None:
    """Finish what a run began that was killed while it moved files."""
    moving = folder / _MOVING
    if moving.is_dir():
        for entry in sorted(moving.iterdir()):
            os.rename(entry, folder / entry.name)
        moving.rmdir()
    if list_checkpoints(folder):
        let_go(folder)


def set_aside(folder: Path, names: Sequence[str]) -> None:
    """Keep an earlier run while a new one begins.

    A run that was to replace an earlier one and never saved anything is not worth keeping: then
    the earlier one stays aside.

    Args:
        folder: The run's folder.
        names: What of the run is in it.

    Raises:
        ConfigError: When something cannot be moved, such as a mounted disk; all is where it was.
    """
    if (folder / REPLACED).exists():
        for name in names:
            remove(folder / name)
        return
    if not names:
        return
    try:
        (folder / _MOVING).mkdir()
        for name in names:
            os.rename(folder / name, folder / _MOVING / name)
        os.rename(folder / _MOVING, folder / REPLACED)
        sync_folder(folder)
    except OSError as error:
        settle(folder)
        raise ConfigError(
            f"the run in output_dir {str(folder)!r} cannot be set aside: {error.strerror} "
            f"({error.filename}); choose another output_dir, or remove that yourself"
        ) from error


def put_back(folder: Path, names: Sequence[str]) -> str | None:
    """Put the earlier run back after a new one ended without having saved anything.

    Args:
        folder: The run's folder.
        names: What of the new run is in it; it goes to `failed-run`.

    Returns:
        What was done, for the user; `None` when there was nothing to do.
    """
    replaced, failed = folder / REPLACED, folder / FAILED
    if not replaced.is_dir():
        return None
    try:
        if names:
            remove(failed)
            failed.mkdir()
            for name in names:
                os.rename(folder / name, failed / name)
        os.rename(replaced, folder / _MOVING)
        settle(folder)
    except OSError as error:
        return f"the earlier run is kept in {replaced} ({error})"
    told = "nothing of the new run was saved, so the earlier one is back in its place"
    return f"{told}; what the new one wrote lies in {failed}" if names else told


def let_go(folder: Path) -> None:
    """Delete the earlier run: the new one has saved something."""
    if (folder / REPLACED).exists():
        remove_folder(folder / REPLACED)
