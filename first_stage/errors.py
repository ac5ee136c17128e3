"""Errors that a user can cause and mend.

Anything a user can get wrong (a path, a field, a damaged file) is raised as a `UserError` whose
message is one line: what was wrong, where, and what to do. `run_command` turns it into that line
on stderr and exit code 2; every other exception keeps its traceback, because it is our defect.
"""

import logging
import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in the input, told in one line: field or file, value, remedy."""


class ConfigError(UserError):
    """A configuration field has a value that cannot work."""


class DataError(UserError):
    """The data cannot be read as asked."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def run_command(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` ends as one line on stderr and exit code 2.

    Args:
        main: The command, without arguments; it reads `sys.argv` itself.

    Raises:
        SystemExit: With code 2 after a `UserError`.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        main()
    except UserError as error:
        # Every process meets the same mistake; one line is enough. When a process was lost, the
        # first one that is left tells.
        if int(os.environ.get("RANK", "0")) == getattr(error, "told_by", 0):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
