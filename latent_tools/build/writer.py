"""Units put together and written by a thread behind a bounded queue.

Packing, summing and writing happen beside the encoder, which waits for the disk only when the queue
is full.
"""

import queue
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from latent_tools.build.unit import EncodedChunk, OpenUnit
from latent_tools.format.shards import Dtype, TokenDtype


class UnitWriter:
    """Puts units together from their chunks and writes each when its last one is there.

    Used as a context: leaving it, with or without an error, first writes the complete units that
    still wait, so that no finished work is lost.

    Args:
        folder: The cache.
        dtype: What latents are stored as.
        channels: Latent channels C; 1 for tokens.
        written: Called with each commit, in the thread.
        waiting: How many chunks may wait; more make `put` block, which bounds the memory.
    """

    def __init__(
        self,
        folder: Path,
        dtype: Dtype | TokenDtype,
        channels: int,
        written: Callable[[dict[str, Any]], None],
        waiting: int = 8,
    ):
        self._folder, self._dtype, self._channels = folder, dtype, channels
        self._written = written
        self._open: dict[int, OpenUnit] = {}
        self._queue: queue.Queue[EncodedChunk | None] = queue.Queue(waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="unit-writer", daemon=True)

    def put(self, chunk: EncodedChunk) -> None:
        """Hand a chunk over; those of a unit in their order.

        Raises:
            OSError: What went wrong with an earlier one, such as a full disk.
        """
        self._raise()
        self._queue.put(chunk)

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            # After an error the queue is still emptied, so that `put` cannot block for ever.
            if self._error is None:
                try:
                    self._take(chunk)
                except BaseException as error:
                    self._error = error

    def _take(self, chunk: EncodedChunk) -> None:
        number = chunk.unit
        unit = self._open.setdefault(number, OpenUnit(number, self._dtype, self._channels))
        unit.add(chunk)
        if chunk.is_last:
            self._written(self._open.pop(number).write(self._folder))

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
