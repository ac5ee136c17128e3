"""What the processes of a run tell each other."""

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """The processes of a run, or the only one.

    Numbers travel over the process group that training uses; requests and Python objects over a
    second group on the CPU, so that they never wait for the device.

    Attributes:
        rank: This process.
        world: Number of processes.
    """

    def __init__(self) -> None:
        self._many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if self._many else 0
        self.world = dist.get_world_size() if self._many else 1
        self._control = dist.new_group(backend="gloo") if self._many else None

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

    def wait(self) -> None:
        """Wait until every process is here."""
        if self._many:
            dist.barrier(group=self._control)

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        result = tensor.detach().clone()
        dist.all_reduce(result, op=operation)
        return result


class StopRequest:
    """Turns SIGINT and SIGTERM into a request that the loop reads between two steps.

    A second signal of the same kind acts at once, for those who cannot wait. Use it as a context
    manager: the handlers that were there before come back.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread, as in some notebooks: no handler then
                continue
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is not None and self.signal == number:
            signal.signal(number, self._before.get(number) or signal.SIG_DFL)
        self.signal = signal.Signals(number)
