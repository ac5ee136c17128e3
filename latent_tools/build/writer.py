"""Units written by a thread behind a bounded queue: the encoder does not wait for the disk."""

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from latent_tools.format.shards import Dtype, EncodedUnit, TokenDtype, write_unit


class UnitWriter:
    """Writes units in the order in which they come.

    Used as a context: leaving it, with or without an error, first writes the complete units that
    still wait, so that no finished work is lost.

    Args:
        folder: The cache.
        dtype: What latents are stored as.
        channels: Latent channels C; 1 for tokens.
        written: Called with each commit, in the thread.
        waiting: How many units may wait; more make `put` block, which bounds the memory.
    """

    def __init__(
        self,
        folder: Path,
        dtype: Dtype | TokenDtype,
        channels: int,
        written: Callable[[dict[str, Any]], None],
        waiting: int = 2,
    ):
        self._arguments = (folder, dtype, channels)
        self._written = written
        self._queue: queue.Queue[EncodedUnit | None] = queue.Queue(waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="unit-writer", daemon=True)

    def put(self, unit: EncodedUnit) -> None:
        """Hand a unit over.

        Raises:
            OSError: What went wrong with an earlier one, such as a full disk.
        """
        self._raise()
        self._queue.put(unit)

    def _run(self) -> None:
        folder, dtype, channels = self._arguments
        while (unit := self._queue.get()) is not None:
            # After an error the queue is still emptied, so that `put` cannot block for ever.
            if self._error is None:
                try:
                    self._written(write_unit(folder, unit, dtype, channels))
                except BaseException as error:
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "UnitWriter":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if error is None:
            self._raise()
