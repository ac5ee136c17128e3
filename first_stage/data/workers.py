"""The processes that decode ahead of a training step."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader

from first_stage.data.faults import end_where_batches_cannot_be_handed_over, no_shared_memory
from first_stage.data.stream import Batch, TrainingStream, collate
from first_stage.errors import DataError


def spare_workers(busy: int = 1) -> int:
    """How many decoding processes each process of a run gets when nobody says: at most 8.

    Args:
        busy: Cores that each of this machine's processes keeps busy itself.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(0, min(8, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - busy))


def training_loader(
    stream: TrainingStream, sampler: Iterable[list[int]], workers: int, pin_memory: bool
) -> DataLoader[Any]:
    """Decode a process's micro-batches in workers, ahead of the step.

    Args:
        stream: The stream.
        sampler: Which positions: a list per micro-batch.
        workers: Worker processes; 0 decodes in this one.
        pin_memory: Copy batches to page-locked memory, for a GPU.

    Returns:
        A loader of `Batch`; it ends when the sampler does.
    """
    return DataLoader(
        stream,
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if workers else None,
        persistent_workers=False,
        worker_init_fn=prepare_worker,
    )


def prepare_worker(_: int) -> None:
    """Set up a worker process: one thread, and signals are for the training process.

    A terminal and a scheduler signal every process of a job. The training process then wants to
    finish its step, and needs its workers for that; it ends them itself.
    """
    torch.set_num_threads(1)
    end_where_batches_cannot_be_handed_over()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_says_so, daemon=True).start()


def _end_when_the_parent_says_so() -> None:
    parent = os.getppid()
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def start_loader(loader: Iterable[Batch]) -> Generator[Batch, None, None]:
    """Iterate a loader whose workers' deaths are noticed where a batch is asked for.

    torch also installs a handler that raises as soon as a worker dies, wherever the training is
    just then: in the middle of an update or of a save. Without it the loader itself notices within
    5 s, between two steps, where everything can still be saved. torch installs it once in a
    process, so it stays silent from here on, for every loader of the process.

    Returns:
        The batches. Closing it ends the workers.
    """
    try:
        batches = iter(loader)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(no_shared_memory(int(os.environ.get("RANK", "0")))) from error
    handler = signal.getsignal(signal.SIGCHLD)
    is_torchs = getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling"
    if callable(handler) and is_torchs and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, partial(_without_raising, handler))
    return (batch for batch in batches)


def _without_raising(handler: Callable[[int, FrameType | None], Any], *arguments: Any) -> None:
    """torch's handler calls the one that it found, which is the user's."""
    with suppress(RuntimeError):
        handler(*arguments)
