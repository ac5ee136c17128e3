"""Cuts work off at each of its system calls: a kill there, or a call that fails."""

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from first_stage.errors import UserError

_CALLS = {
    *("os.rename", "os.link", "os.symlink", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"),
    *("open", "shutil.rmtree", "os.scandir", "os.listdir", "ctypes.dlsym"),
}
_KILLED, _DONE, _FAILED, _WRONG = 9, 0, 2, 3


def moments(work: Callable[[], Any], how: str, prepare: Callable[[], Any]) -> Iterator[int]:
    """Run work in forked processes, cut off at its first call, its second, and so on.

    Args:
        work: What to do.
        how: `kill` ends the process there, with nothing that could tidy up; `fail` has the call
            fail as on a broken disk, and the work may do what it does then.
        prepare: Puts everything back as it was before, in this process.

    Yields:
        The number of the call, after the cut; ends when the work comes to its end uncut.
    """
    number = 0
    while True:
        prepare()
        code = _cut(work, number, how)
        assert code in (_KILLED, _FAILED, _DONE), f"exit code {code} at call {number}"
        if code == _DONE:
            return
        yield number
        number += 1


def _cut(work: Callable[[], Any], number: int, how: str) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def at_call(event: str, _: Any) -> None:
        nonlocal count
        if event not in _CALLS:
            return
        count += 1
        if count == number + 1:
            if how == "kill":
                os._exit(_KILLED)
            if event != "ctypes.dlsym":
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    code = _WRONG
    try:
        sys.addaudithook(at_call)
        work()
        code = _DONE if count <= number else _FAILED
    except (OSError, UserError):
        code = _FAILED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
