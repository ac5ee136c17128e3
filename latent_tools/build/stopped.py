"""Why a launch stopped before its end, for whoever looks into the cache afterwards.

Failed samples of a unit that is not committed stand nowhere else.
"""

import contextlib
from pathlib import Path

from first_stage.files import write_json
from latent_tools.format.files import read_json

STOPPED = "stopped.json"


def write_stop(folder: Path, why: str) -> None:
    """Write down why a launch stops; without a word where that cannot be written."""
    with contextlib.suppress(OSError):
        write_json(folder / STOPPED, {"why": why})


def why_stopped(folder: Path) -> str:
    """Why a launch stopped since the cache was last finished; empty when none did."""
    path = folder / STOPPED
    return str(read_json(path)["why"]) if path.exists() else ""


def forget_stop(folder: Path) -> None:
    """Forget it: what stopped the launch is overcome."""
    (folder / STOPPED).unlink(missing_ok=True)
