"""What the processes of a run tell each other, and what the system tells them."""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from first_stage.distributed.heartbeat import Peer, Watch
from first_stage.errors import UserError

_SAME_SIGNAL = 3.0
"""Seconds within which a repeated signal counts as the same request: a scheduler signals every
process of a job, and the launcher passes on what it got."""
_PR_SET_PDEATHSIG = 1
_OFTEN = 0.5
"""Seconds between two looks at work on the main process."""

Made = TypeVar("Made")


class Stopped(KeyboardInterrupt):
    """A signal asked to end while there was nothing to finish or to save."""


class ProcessLost(UserError):
    """Another process of the job ended; the message names it.

    Attributes:
        told_by: The rank that prints it: the first one left.
    """

    def __init__(self, message: str, told_by: int):
        super().__init__(message)
        self.told_by = told_by


class Processes:
    """The processes of a run, or the only one.

    Numbers travel over the process group that training uses; requests and Python objects over a
    second group on the CPU, so that they never wait for the device.

    Args:
        patience: Seconds without a sign of life after which a process counts as lost (see
            `together`); `None` does not look after them.

    Attributes:
        rank: This process.
        world: Number of processes.
    """

    def __init__(self, patience: float | None = None) -> None:
        self._many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self._many else 0
        self.world = dist.get_world_size() if self._many else 1
        self._control = dist.new_group(backend="gloo") if self._many else None
        self._watch: Watch | None = None
        if self._many and patience is not None:
            # A connection of its own: the watch's requests come from another thread.
            shared: Any = dist.distributed_c10d._get_default_store()
            store = dist.distributed_c10d.PrefixStore("watch", shared.clone())
            peers = self.gather(Peer.here(self.rank))
            self._watch = Watch(store, peers, self.rank, patience)
            self.wait()
            self._watch.start()

    @property
    def is_main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over processes, elementwise."""
        return self._reduce(tensor, dist.ReduceOp.SUM) if self._many else tensor

    def average(self, tensor: Tensor) -> Tensor:
        """Mean over processes, elementwise."""
        return self.sum(tensor) / self.world if self._many else tensor

    def minimum(self, tensor: Tensor) -> Tensor:
        """Elementwise minimum over processes."""
        return self._reduce(tensor, dist.ReduceOp.MIN) if self._many else tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over processes."""
        return self._reduce(tensor, dist.ReduceOp.MAX) if self._many else tensor

    def stack(self, tensor: Tensor) -> Tensor:
        """Every process's tensor, `(world, *shape)`, by rank, on every process."""
        if not self._many:
            return tensor.detach().clone()[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(parts, tensor.detach().contiguous())
        return torch.stack(parts)

    def totals(self, *numbers: int) -> list[int]:
        """Sums of whole numbers over processes, on the CPU."""
        if not self._many:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(tensor, group=self._control)
        return [int(n) for n in tensor]

    def gather(self, value: Any) -> list[Any]:
        """Every process's value, by rank, on every process."""
        if not self._many:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._control)
        return values

    def broadcast(self, value: Any) -> Any:
        """The first process's value, on every process; what the others give does not matter."""
        if not self._many:
            return value
        values = [value if self.is_main else None]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self._many:
            dist.barrier(group=self._control)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """End this process, in words, when another one ends before its time.

        Raises:
            ProcessLost: Within about 20 s of the death of a process on this machine, or of a broken
                connection; within `patience` and about 20 s for one that just falls silent on
                another machine. A process that hangs in the device by then is ended from a thread,
                with the same words and exit code 2.
        """
        if self._watch is None:
            yield
            return
        try:
            yield
        except ProcessLost:
            raise
        except KeyboardInterrupt:
            self._watch.tell("it was asked to stop")
            raise
        except Exception as error:
            if not isinstance(error, UserError) and _is_broken_connection(error):
                message, told_by = self._watch.roll_call()
                raise ProcessLost(message, told_by) from error
            self._watch.tell(" ".join(f"{_kind(error)}{error}".split()))
            raise
        else:
            self.wait()
            self._watch.close()

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        result = tensor.detach().clone()
        dist.all_reduce(result, op=operation)
        return result


def _kind(error: Exception) -> str:
    return "" if isinstance(error, UserError) else f"{type(error).__name__}: "


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a collective failed, as opposed to something of this process."""
    if isinstance(error, dist.DistError):
        return True
    # What gloo throws inside a backward pass is a plain RuntimeError.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text)


def on_main(processes: Processes, work: Callable[[], None]) -> None:
    """Do something on the main process; what goes wrong there in words is raised on all.

    It may take hours: the others do not wait in one long call, which would time out.

    Raises:
        UserError: What the main process met.
    """
    problem: list[BaseException] = []

    def attempt() -> None:
        try:
            work()
        except BaseException as error:
            problem.append(error)

    if processes.world == 1 or not processes.is_main:
        worker = None
        if processes.is_main:
            attempt()
    else:
        worker = threading.Thread(target=attempt, daemon=True)
        worker.start()
        worker.join(_OFTEN)
    while processes.totals(int(worker is not None and worker.is_alive()))[0]:
        time.sleep(_OFTEN)
    if problem and not isinstance(problem[0], UserError):
        raise problem[0]
    told = processes.broadcast(str(problem[0]) if problem else None)
    if told is not None:
        raise type(problem[0])(told) if problem else UserError(told)


def shared(processes: Processes, make: Callable[[], Made]) -> Made:
    """Something that the main process makes, on all processes.

    Raises:
        UserError: What the main process met.
    """
    made: list[Made] = []
    on_main(processes, lambda: made.append(make()))
    return cast(Made, processes.broadcast(made[0] if made else None))


class StopRequest:
    """Turns SIGINT, SIGTERM and SIGHUP into a request that the loop reads between two steps.

    SIGHUP comes when a terminal or a connection is closed; under `nohup` it stays ignored.

    A second signal of the same kind acts at once, for those who cannot wait, unless it comes right
    after the first: then it is the same request, passed on by a launcher. Use it as a context
    manager: the handlers that were there before come back.

    Args:
        at_once: Until `defer`, the first signal acts at once too: it raises `Stopped`.
    """

    def __init__(self, at_once: bool = False) -> None:
        self.signal: signal.Signals | None = None
        self._at_once = at_once
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread, as in some notebooks: no handler then
                continue
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From here on the first signal is a request: there is something to finish and to save."""
        self._at_once = False

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self._since = time.monotonic()
            if self._at_once:
                self.signal = signal.Signals(number)
                raise Stopped(f"stopped by {self.signal.name}")
        elif self.signal == number and time.monotonic() - self._since > _SAME_SIGNAL:
            signal.signal(number, self._before.get(number) or signal.SIG_DFL)
            signal.raise_signal(number)
        self.signal = signal.Signals(number)


def end_with_launcher() -> None:
    """Ask to be sent SIGTERM when the launcher that started this process dies.

    `accelerate launch` with one process does not pass signals on: without this, ending the launcher
    would leave a training behind that nobody sees. A process that was started by hand, and may well
    outlive its shell, is left alone. Does nothing where the system is not Linux.
    """
    launched = "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if not launched or not _is_launcher(os.getppid()):
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def _is_launcher(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:
            command = stream.read()
    except OSError:
        return False
    return any(name in command for name in (b"accelerate", b"torchrun", b"torch.distributed"))
