"""Errors that a user can cause and mend.

Anything a user can get wrong (a path, a field, a damaged file) is raised as a `UserError` whose
message is one line: what was wrong, where, and what to do. `run_command` turns it into that line
on stderr and exit code 2; every other exception keeps its traceback, because it is our defect.
"""

import contextlib
import errno
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TextIO

DISK_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "choose a file system that takes files of this size",
    errno.EROFS: "make it writable",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network's file system",
}
"""Errors of a disk that cannot be written, by number, and what a user can do."""
_SIGNALLED = 128
"""A shell's exit code of a program that a signal ended is this plus the signal's number."""


class UserError(Exception):
    """A mistake in the input, told in one line: field or file, value, remedy."""


class ConfigError(UserError):
    """A configuration field has a value that cannot work."""


class DataError(UserError):
    """The data cannot be read as asked."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def root_cause(error: BaseException) -> BaseException:
    """The innermost error that another one wraps: what went wrong first."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def run_command(main: Callable[[], None]) -> None:
    """Run a script's `main`, and end as command-line programs do.

    A `UserError` ends as one line on stderr, and so does a disk that is full or broken. Ctrl-C is
    one line. When whoever read the output has gone, as `head` does, nothing is said.

    Args:
        main: The command, without arguments; it reads `sys.argv` itself.

    Raises:
        SystemExit: With code 2 after a `UserError` or a disk's error, 130 after Ctrl-C, and 141
            when nobody reads the output.
    """
    _open_what_is_closed()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # here, and not at the interpreter's end, its errors can be told
    except UserError as error:
        # When a process was lost, the first one that is left tells.
        _tell(f"error: {error}", getattr(error, "told_by", 0))
        sys.exit(2)
    except KeyboardInterrupt:
        _tell("stopped")
        sys.exit(_SIGNALLED + signal.SIGINT)
    except OSError as error:
        if is_unread(sys.stdout) or is_unread(sys.stderr):
            _discard_output()
            sys.exit(_SIGNALLED + signal.SIGPIPE)
        if error.errno not in DISK_REMEDIES:
            raise
        where = error.filename or "the output"
        _tell(f"error: {where} cannot be written: {error.strerror}; {DISK_REMEDIES[error.errno]}")
        _discard_output()
        sys.exit(2)


@contextlib.contextmanager
def interrupted_at_once() -> Iterator[None]:
    """Ctrl-C ends the process on the spot, while there is nothing to tidy up.

    An interrupt that is raised inside the import of a C extension may come out as another error,
    or be swallowed and leave half a module behind.
    """

    def end(*_: object) -> None:
        _tell("stopped")
        os._exit(_SIGNALLED + signal.SIGINT)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # ignored, or in the hands of another program
        return
    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def is_unread(stream: TextIO) -> bool:
    """Whether a stream is a pipe whose reader has gone.

    Args:
        stream: An output.
    """
    with contextlib.suppress(OSError, ValueError):  # no file at all, as in a notebook
        looking = select.poll()
        looking.register(stream.fileno(), 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in looking.poll(0))
    return False


def _tell(line: str, told_by: int = 0) -> None:
    """Every process of a launch meets the same end; one line is enough."""
    if int(os.environ.get("RANK", "0")) == told_by:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def _open_what_is_closed() -> None:
    """A program that was started without outputs (`>&-`) writes to none."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _discard_output() -> None:
    """What is left to write goes nowhere: the interpreter would fail on it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
