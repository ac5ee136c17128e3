"""`first-stage COMMAND ...`; the same as `python -m first_stage COMMAND ...`.

On several processes: `accelerate launch --multi_gpu --num_processes 8 -m first_stage train ...`.
"""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from first_stage import __version__
from first_stage.errors import ConfigError, interrupted_at_once, run_command

COMMANDS = {
    "train": "Train a first stage on your images, and export it.",
    "evaluate": "Measure first stages and compare them; write a report to look at.",
    "cache": "Precompute the latents of a data set.",
    "latents": "Look after a cache: info, verify, stats, preview, gc, export.",
    "export": "Write a first stage anew: as one file, into a checkpoint, with standard latents.",
    "recipes": "List the recipes that come with first-stage, or print one.",
}
"""The commands and what they do; each is `main()` of its module in `first_stage.commands`."""

_WAITS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
"""How OpenMP's threads wait. GNU's, which torch brings on Linux, reads the second, others the
first."""
_OTHER_WAITS = ("KMP_BLOCKTIME",)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; what the user got wrong ends as one line and exit code 2.

    Args:
        arguments: The command's name and its arguments; `None` reads `sys.argv`.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    run_command(lambda: run(given[0] if given else "--help", given[1:]))


def run(name: str, arguments: Sequence[str]) -> None:
    """Run one of `COMMANDS`, or say which there are.

    Args:
        name: Which.
        arguments: Its arguments.

    Raises:
        ConfigError: When there is no such command.
    """
    if name in ("-h", "--help"):
        print(usage())
        return
    if name == "--version":
        print(f"first-stage {__version__}")
        return
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
        raise ConfigError(f"{name!r} is no command: {hint} first-stage --help says more")
    wait_without_spinning()
    sys.argv = [f"first-stage {name}", *arguments]
    with interrupted_at_once():
        command = import_module(f"first_stage.commands.{name}")
    command.main()


def usage() -> str:
    """What `first-stage --help` prints."""
    lines = [f"  {name:<10}{about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: first-stage COMMAND ...",
            "",
            "Train the first stage of a latent diffusion model on your own images, hand it to",
            "diffusers, and precompute the latents of your data set.",
            "",
            *lines,
            "",
            "first-stage COMMAND --help lists a command's options. On several processes:",
            "  accelerate launch --multi_gpu --num_processes 8 -m first_stage train ...",
        ]
    )


def wait_without_spinning() -> None:
    """Let OpenMP's threads spin for a tenth of a millisecond, then sleep; what the user set stays.

    Threads that spin on take the cores from those that have work: beside other processes on the
    same cores a training step was up to eight times slower. Threads that sleep at once are woken
    thousands of times in a step, which costs more than a short spin does, on a quiet machine too
    (figures: docs/guides/why-is-my-step-slow.md). The library reads the variables once, when it is
    loaded, so this comes before the first import of torch.
    """
    if not any(name in os.environ for name in (*_WAITS, *_OTHER_WAITS)):
        os.environ.update(_WAITS)


if __name__ == "__main__":
    main()
