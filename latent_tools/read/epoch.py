"""Which epoch draws are of: told by the training loop, restored from a state, counted by a loader.

A loader that `accelerate` prepared counts its passes from 0, after a restart too, and tells its
count to the data set before each. Taken at its word it would bring back the draws of epoch 0 after
every restart, whatever the training loop told the data set. So its count only says how many passes
came since the loop last told the epoch.
"""

import sys
from types import FrameType
from typing import Any

import torch

from latent_tools.format.files import CacheError

_NEVER = -1
_BETWEEN = ("torch.", "torchdata.", "accelerate.")
_READERS = 1024  # more worker processes than a machine's data loader has


class Epoch:
    """A number in shared memory, so that it reaches workers that stay alive between epochs."""

    def __init__(self) -> None:
        # The epoch; the one that was told; the loader's count when it was, and by now; whether any
        # reader's was restored.
        self._state = torch.tensor([0, _NEVER, _NEVER, _NEVER, 0]).share_memory_()
        self._restored = torch.full((_READERS,), _NEVER).share_memory_()
        self._reads_unasked = False  # of this process alone

    @property
    def is_told(self) -> bool:
        """Whether the training loop has said which epoch it is."""
        return int(self._state[1]) != _NEVER

    @property
    def number(self) -> int:
        """The epoch."""
        number, told, _, _, is_restored = self._state.tolist()
        return self._of_readers() if is_restored and told == _NEVER else number

    def check_worker(self) -> None:
        """Called by a data loader's worker when it draws.

        Raises:
            CacheError: When the worker had begun before anybody said the epoch, and it is none of
                the first two by now: what it has read ahead is of epoch 0.
        """
        number, told, _, passes, is_restored = self._state.tolist()
        if told == passes == _NEVER and not is_restored:
            self._reads_unasked = True
        elif self._reads_unasked:
            if number > 1:
                raise CacheError(
                    f"the epoch was set to {number} when a worker had already drawn items of epoch "
                    "0: accelerate's stateful loaders start their workers in prepare, so call "
                    "set_epoch before it"
                )
            self._reads_unasked = False

    def _of_readers(self) -> int:
        # Where one reader is not done with an epoch, it is the one that goes on.
        return int(self._restored[self._restored != _NEVER].min())

    def tell(self, epoch: int) -> None:
        """The training loop says which epoch comes."""
        self._state[:3] = torch.tensor([epoch, epoch, _NEVER])

    def count(self, passes: int) -> None:
        """A loader says how many passes it has made."""
        _, told, first, before, is_restored = self._state.tolist()
        if told == _NEVER and is_restored:  # in the pass before
            told, first = self._of_readers(), before
        if told == _NEVER:
            epoch = passes
        else:
            first = passes if first == _NEVER else first
            epoch = told + passes - first
        self._state[:4] = torch.tensor([epoch, told, first, passes])

    def restore(self, epoch: int, reader: int = 0) -> None:
        """A reader's saved state says which epoch it is of; what the loop told goes first.

        Args:
            epoch: The epoch in which the reader goes on.
            reader: Its number among those of this process.
        """
        self._restored[reader] = epoch
        self._state[4] = 1


def loader_of_accelerate() -> Any:
    """The loader of accelerate that asks the caller of the function that calls this one.

    Its prepared loaders call `set_epoch` like everybody else and hand nothing over that would tell
    them apart: https://github.com/huggingface/accelerate/blob/main/src/accelerate/data_loader.py
    What lies between is passed over: torch's loaders, and what accelerate wraps a data set in.

    Returns:
        The loader, or another object of accelerate's; `None` when it is somebody else who asks.
    """
    frame: FrameType | None = sys._getframe(2)
    found = None
    while frame is not None and _module(frame).startswith(_BETWEEN):
        if _module(frame) == "accelerate.data_loader":
            found = frame.f_locals.get("self", found)
            if hasattr(found, "base_dataloader"):
                break
        frame = frame.f_back
    return found


def let_readers_begin_now(loader: Any) -> None:
    """Leave readers alone that were started before it was known which epoch comes.

    With `use_stateful_dataloader` a loader of accelerate asks torchdata's for its state in
    `prepare`, which starts the workers, and they read ahead: of epoch 0, whatever is told later. An
    empty state makes torchdata's loader start others; a state that was loaded meanwhile stays.

    Args:
        loader: A loader of accelerate that is about to begin a pass.

    Raises:
        CacheError: When its states would be wrong, see `check_states`.
    """
    check_states(loader)
    stateful = getattr(loader, "base_dataloader", None)
    if stateful is not None and getattr(stateful, "_initial_iter_for_state_dict", False):
        stateful.load_state_dict({})


def check_states(loader: Any) -> None:
    """Refuse a loader of accelerate that would save places that training has not come to.

    Raises:
        CacheError: When one process reads for several (`dispatch_batches`) and states are kept: it
            has read the next batches when it keeps its state, and every process saves a state of
            its own under the same name.
    """
    keeps_states = getattr(loader, "use_stateful_dataloader", False)
    if keeps_states and reads_for_all(loader) and processes() > 1:
        raise CacheError(
            "accelerate's state of a loader that reads for several processes (dispatch_batches) "
            "is not where training is, and resumed with it samples would be left out: set "
            "use_stateful_dataloader=False, or dispatch_batches=False, or give rank and world and "
            "do not prepare torchdata's StatefulDataLoader"
        )


def reads_for_all(loader: Any) -> bool:
    """Whether a loader of accelerate reads on one process for all of them (`dispatch_batches`)."""
    return hasattr(loader, "_fetch_batches")


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def processes() -> int:
    """How many processes train together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1
