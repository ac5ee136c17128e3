"""Command lines that a program prints: they can be pasted into a shell where they are printed.

Installed or in a clone, with or without the environment's programs on the search path, for one
process or many, on GPUs or on CPUs.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

_ON_MANY = ("train", "evaluate", "cache")
"""Commands that share their work out to the processes of a launch."""


def command_line(command: str, *arguments: object, processes: int | None = None) -> str:
    """The line that runs a command as this process runs.

    Args:
        command: One of `first_stage.__main__.COMMANDS`.
        arguments: Its arguments; they are quoted.
        processes: How many processes, for commands that take several; `None`: as many as now.
    """
    world = int(os.environ.get("WORLD_SIZE", "1")) if processes is None else processes
    words = [command, *map(str, arguments)]
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on")
    before = "ACCELERATE_USE_CPU=true " if on_cpu else ""
    if world == 1 or command not in _ON_MANY:
        return before + shlex.join([*_program("first-stage", "first_stage"), *words])
    launcher = _program("accelerate", "accelerate.commands.accelerate_cli")
    # Several processes on CPUs need --multi_gpu too: without it accelerate starts a single one.
    launch = [*launcher, "launch", "--multi_gpu", "--num_processes", str(world), *_machines()]
    return before + shlex.join([*launch, "-m", "first_stage", *words])


def _machines() -> list[str]:
    """How a launch on several machines is told to the launcher; nothing on a single one."""
    count = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    if count == 1:
        return []
    options = {
        "--num_machines": str(count),
        "--machine_rank": os.environ.get("GROUP_RANK"),
        "--main_process_ip": os.environ.get("MASTER_ADDR"),
        "--main_process_port": os.environ.get("MASTER_PORT"),
    }
    return [word for name, value in options.items() if value for word in (name, value)]


def _program(script: str, module: str) -> list[str]:
    """A script that this environment has, or else the interpreter with the module."""
    beside = Path(sys.executable).with_name(script)
    if beside.exists():
        return [_short(beside)]
    return [_short(Path(sys.executable)), "-m", module]


def _short(program: Path) -> str:
    """How a shell in the current folder names a program: as shortly as possible."""
    if shutil.which(program.name) == str(program):
        return program.name
    if program.is_relative_to(Path.cwd()):
        return str(program.relative_to(Path.cwd()))
    return str(program)
