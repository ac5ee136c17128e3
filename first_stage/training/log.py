"""What a run writes down: log.jsonl, the tracker, and the progress bar."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import is_tensorboard_available
from tqdm import tqdm

from first_stage.errors import ConfigError
from first_stage.files import read_log, write_text


def tracker_of(name: str) -> tuple[str | None, str | None]:
    """The tracker to use, and a remark for the user when the default one is not installed.

    Raises:
        ConfigError: When accelerate knows no such tracker, or lacks the package for it.
    """
    if name == "none":
        return None, None
    if name not in LOGGER_TYPE_TO_CLASS:
        known = ", ".join(sorted(LOGGER_TYPE_TO_CLASS))
        raise ConfigError(f"train.tracker is {name!r}; accelerate knows: {known}, or none")
    if name == "tensorboard" and not is_tensorboard_available():
        return None, "tensorboard is not installed, so no tracker is used (log.jsonl has it all)"
    from accelerate.tracking import get_available_trackers

    if name not in {str(getattr(t, "value", t)) for t in get_available_trackers()}:
        raise ConfigError(
            f"train.tracker is {name!r}, but its package is not installed: install it, or choose "
            "tensorboard or none"
        )
    return name, None


class Logbook:
    """Appends to `log.jsonl` and to the tracker; only the main process makes one.

    Lines hold what the training computed, so two runs that compute the same have the same file;
    speed goes to the tracker and the progress bar.

    Args:
        path: The file.
        accelerator: Its trackers get the same numbers.
        resumed_at: The step that the run goes on from; later lines, of a run that was cut off, are
            dropped. `None` begins anew.
    """

    def __init__(self, path: Path, accelerator: Accelerator, resumed_at: int | None):
        self.path = path
        self._accelerator = accelerator
        last = -1 if resumed_at is None else resumed_at
        kept = [_line(line) for line in read_log(self.path) if line["step"] <= last]
        write_text(self.path, "".join(kept))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write one line.

        Args:
            step: Steps done.
            values: Names such as `loss/pixel`, their group before the slash. What is not finite is
                written as null, and kept from the tracker: JSON has no word for it.
        """
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(_line({"step": step, **values}))
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._accelerator.log(finite, step=step)

    def sync(self) -> None:
        """Make the lines so far survive a power cut: a checkpoint that is kept relies on them."""
        with self.path.open("ab") as stream:
            os.fsync(stream.fileno())

    def write_speed(self, step: int, values: Mapping[str, float]) -> None:
        """Hand numbers that depend on the machine to the tracker alone."""
        self._accelerator.log(dict(values), step=step)


def _line(values: Mapping[str, Any]) -> str:
    """A line of JSON, without the words that JSON does not have."""
    plain = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
    return json.dumps(plain, allow_nan=False) + "\n"


class _Heedless:
    """A stream whose reader may go away: a run that trains goes on, and is saved."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Progress:
    """A bar with images/s, time left, and the share of time spent waiting for data.

    Args:
        start_step: Steps done before.
        max_steps: Steps in all.
        batch_size: Images per step.
        visible: Whether this process shows it.
    """

    def __init__(self, start_step: int, max_steps: int, batch_size: int, visible: bool):
        self._batch_size = batch_size
        self._output = _Heedless(sys.stderr)
        self._bar = tqdm(
            total=max_steps * batch_size,
            initial=start_step * batch_size,
            unit="img",
            unit_scale=True,
            disable=not visible,
            file=self._output,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
        )
        self._waited = 0.0
        self._since = time.perf_counter()
        self._images = 0

    def waited(self, seconds: float) -> None:
        """Note time spent waiting for a batch."""
        self._waited += seconds

    def advance(self) -> None:
        """Note a finished step."""
        self._images += self._batch_size
        self._bar.update(self._batch_size)

    def window(self) -> dict[str, float]:
        """Images/s and waiting share since the last call, which the bar then shows."""
        now = time.perf_counter()
        elapsed = max(now - self._since, 1e-9)
        speed = {
            "speed/images_per_second": self._images / elapsed,
            "speed/waiting_for_data": self._waited / elapsed,
        }
        self._since, self._waited, self._images = now, 0.0, 0
        return speed

    def show(self, text: str) -> None:
        """Put a few words behind the bar."""
        self._bar.set_postfix_str(text)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            self._bar.write(line, file=self._output)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
