"""What a failing loader has to say: which worker ended, how, and what helps."""

import multiprocessing.queues
import os
import signal
import socket
import traceback
from typing import Any

from first_stage.errors import DataError, UserError

_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
_NO_ROOM = 74
"""Exit code of a worker that found no room in shared memory."""


def end_where_batches_cannot_be_handed_over() -> None:
    """Have a worker end when a batch does not reach the training process, which waits for it.

    Batches are put into shared memory by a thread of the queue, which prints what goes wrong there,
    forgets the batch and goes on: the training would wait for ever. To be called in the worker.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore


def _end(error: Exception, _batch: Any) -> None:
    if _is_about_shared_memory(error):
        os._exit(_NO_ROOM)
    traceback.print_exception(error)
    os._exit(1)


def _is_about_shared_memory(error: BaseException) -> bool:
    told = ("shared memory", "unable to resize file", "unable to write to file </torch_")
    return any(words in str(error) for words in told)


def loader_fault(error: Exception, rank: int) -> UserError | None:
    """What a failing loader has to say in one line; `None` when it is not the loader's fault.

    Args:
        error: What was raised where a batch was asked for.
        rank: This process.
    """
    if isinstance(error, UserError):
        # From a worker, torch raises the same class with a whole traceback for its message.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        last = lines[-1]
        return DataError(last.partition("Error: ")[2] or last if len(lines) > 1 else last)
    if _is_about_shared_memory(error):
        return DataError(no_shared_memory(rank))  # told by the worker itself, before it died of it
    told_by_torch = isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
    # A worker that dies while it hands over a batch breaks the connection first.
    cut_off = isinstance(error, ConnectionError | EOFError) or (
        isinstance(error, FileNotFoundError) and error.filename is None
    )
    if not told_by_torch and (not cut_off or "Caught " in str(error)):
        return None
    who = f"a data worker of process {rank} (on {socket.gethostname()})"
    codes = [code for code in _exit_codes(error) if code]
    if -signal.SIGBUS in codes or _NO_ROOM in codes:
        return DataError(no_shared_memory(rank))
    if codes and codes[0] > 0:
        return DataError(f"{who} ended with exit code {codes[0]}; data.workers 0 shows why")
    crashes = {-number for number in _CRASHES}
    if found := next((code for code in codes if code in crashes), None):
        return DataError(
            f"{who} crashed ({signal.strsignal(-found)}), most often in the library that decodes "
            "an image: data.workers 0 with python -X faulthandler shows where"
        )
    return DataError(
        f"{who} was killed, most often because memory ran out: fewer data.workers need less"
    )


def no_shared_memory(rank: int) -> str:
    """What to do where workers have no room to hand over batches."""
    return (
        f"a data worker of process {rank} (on {socket.gethostname()}) found no room in /dev/shm, "
        "over which batches come: give the container more (docker run --shm-size 8g), or lower "
        "data.workers (0 needs none)"
    )


def _exit_codes(error: BaseException) -> list[int]:
    """How the workers of the loader ended that raised an error; signals are negative.

    torch keeps the signal out of its message where its own handler of dead children is not
    installed (see `start_loader`), and the loader may lie behind one of ours: it is found where the
    error passed through it.
    """
    codes, trace = [], error.__traceback__
    while trace is not None:
        loader, trace = trace.tb_frame.f_locals.get("self"), trace.tb_next
        for worker in getattr(loader, "_workers", None) or ():
            worker.join(1.0)  # a connection breaks before its worker is quite gone
            if worker.exitcode is not None:
                codes.append(int(worker.exitcode))
    return codes
