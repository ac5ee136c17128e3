"""The processes that decode ahead of a training step."""

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader

from first_stage.data.faults import (
    end_where_batches_cannot_be_handed_over,
    loader_fault,
    no_shared_memory,
)
from first_stage.data.stream import TrainingStream, collate
from first_stage.errors import DataError, UserError

Item = TypeVar("Item")

_LOOK_AGAIN = 1.0  # seconds between a worker's looks at whether anybody still wants its batches


def spare_workers(busy: int = 1) -> int:
    """How many decoding processes each process of a run gets: its part of the cores that are left.

    Args:
        busy: Cores that each of this machine's processes keeps busy itself.
    """
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(0, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - busy)


def cache_workers(device: torch.device) -> int:
    """How many decoding processes a process that caches gets, by the device that it encodes on."""
    if device.type == "cpu":
        # The encoder's threads are busy all the time: a worker beside them slows both.
        return spare_workers(torch.get_num_threads())
    # A GPU's process waits for its device: all of its cores decode.
    return max(1, spare_workers(0))


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
    finish its step, and needs its workers for that; it ends them itself. When it is killed instead,
    they end too, whatever they are at.
    """
    torch.set_num_threads(1)
    end_where_batches_cannot_be_handed_over()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and hasattr(signal, "sigtimedwait"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: Any) -> None:
    """End when the process that wants the batches says so, or is no more.

    It need not be the system's parent: where a server forks the workers, as from Python 3.14 on,
    that one is. The kernel's signal of a parent's death would not do either: it tells when the
    *thread* ends that started the worker.
    """
    is_its_child = os.getppid() == parent.pid
    while parent.is_alive() and (os.getppid() == parent.pid or not is_its_child):
        told = signal.sigtimedwait({signal.SIGTERM}, _LOOK_AGAIN)
        if told is not None and told.si_pid == parent.pid:
            break
    os._exit(0)


def start_loader(loader: Iterable[Item]) -> Generator[Item, None, None]:
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
        raise DataError(no_shared_memory(_rank())) from error
    handler = signal.getsignal(signal.SIGCHLD)
    is_torchs = getattr(handler, "__module__", "") == "torch.utils.data._utils.signal_handling"
    if callable(handler) and is_torchs and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, partial(_without_raising, handler))
    return (batch for batch in batches)


def _without_raising(handler: Callable[[int, FrameType | None], Any], *arguments: Any) -> None:
    """torch's handler calls the one that it found, which is the user's."""
    with suppress(RuntimeError):
        handler(*arguments)


def deliver(loader: Iterable[Item]) -> Iterator[Item]:
    """Iterate a loader for a command that ends where a worker does.

    Raises:
        UserError: What a worker died of, or could not go on for, in a line.
    """
    try:
        yield from start_loader(loader)
    except (UserError, RuntimeError, OSError, EOFError) as error:
        fault = loader_fault(error, _rank())
        if fault is None:
            raise
        raise fault from error


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))
