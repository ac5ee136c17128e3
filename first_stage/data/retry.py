"""Reading where a network lies between: a failed attempt is repeated, a few times, ever later."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from first_stage.data.broken import BrokenImage
from first_stage.errors import UserError

Result = TypeVar("Result")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before each further attempt."""
_PASSING = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, errno.ECONNREFUSED,
    errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EREMOTEIO, errno.EPIPE,
}  # fmt: skip
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, UserError, BrokenImage)


def with_retries(read: Callable[[], Result], url: str) -> Result:
    """Read something, and try again where that may help.

    Args:
        read: Reads from the start; it may be called several times.
        url: What it reads. Of local files only the faults of network file systems are retried.

    Raises:
        Exception: What the last attempt raised.
    """
    for wait in WAITS:
        try:
            return read()
        except _LASTING:
            raise
        except Exception as error:
            number = getattr(error, "errno", None)
            if "://" not in url and number not in _PASSING:
                raise
            time.sleep(wait)
    return read()
