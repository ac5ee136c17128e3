"""What the commands of both comparisons ask for, and how they read it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from experiments.objectives.rows import Size
from first_stage.config.parsing import plain_parser

_KINDS: dict[str, dict[str, Any]] = {
    "quick": {"action": "store_true"},
    "small": {"action": "store_true"},
    "seeds": {"nargs": "+", "type": int, "default": [0]},
    "rows": {"nargs": "+", "type": str, "default": None},
}


@dataclass(frozen=True)
class Options:
    """What to compare, for how long, and where the results go.

    Attributes:
        quick: The short size.
        small: The middle size; neither is the full one.
        seeds: Seeds; everything but the photos follows from them.
        rows: Which rows of the table; `None`: all.
    """

    output: str = ""
    """Folder for the results. Finished ones in it are kept: a run that was cut off goes on."""
    quick: bool = False
    small: bool = False
    seeds: Sequence[int] = (0,)
    rows: Sequence[str] | None = None
    more: str | None = None
    """Further photos to train on: a folder or a data set id."""
    threads: int | None = None
    """CPU threads; null: one for each core."""

    @property
    def size(self) -> Size:
        """Which budget they ask for."""
        return "quick" if self.quick else "small" if self.small else "full"

    def set_threads(self) -> None:
        """Let torch use as many threads as they say."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)


Kind = TypeVar("Kind", bound=Options)


def read(
    kind: type[Kind], description: str, words: Mapping[str, str], arguments: list[str] | None
) -> Kind:
    """The options of a command line.

    Args:
        kind: A comparison's own options.
        description: What the command does.
        words: The help of `quick`, `small`, `seeds` and `rows`.
        arguments: Command line without the program's name; `None` reads `sys.argv`.
    """
    parser = plain_parser(description)
    for name, how in _KINDS.items():
        parser.add_argument(f"--{name}", help=words[name], **how)
    parser.add_class_arguments(kind, nested_key=None, as_group=False, skip=set(_KINDS))
    return kind(**vars(parser.instantiate_classes(parser.parse_args(arguments))))


def problems(options: Options, known: Sequence[str]) -> Iterator[str]:
    """What cannot work, in a line each.

    Args:
        options: The options.
        known: The rows that there are.
    """
    if options.quick and options.small:
        yield "--quick and --small are two sizes of the comparison: choose one"
    if min(options.seeds) < 0 or len(set(options.seeds)) < len(options.seeds):
        yield f"--seeds is {list(options.seeds)}: seeds are different and at least 0"
    for row in options.rows or ():
        if row not in known:
            yield f"--rows names {row!r}; there are: {', '.join(known)}"
    if options.threads is not None and options.threads < 1:
        yield f"--threads is {options.threads}; it must be above 0"
