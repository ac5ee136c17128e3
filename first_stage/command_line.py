"""Options of a command: a dataclass read from flags and YAML, mistakes told in one line."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from first_stage.errors import ConfigError

Options = TypeVar("Options")


def read_options(
    kind: type[Options], arguments: Sequence[str] | None = None, switches: Sequence[str] = ()
) -> Options:
    """Read a command's options; `--help` lists the fields with their docstrings.

    Args:
        kind: A dataclass; its own docstring says what the command does.
        arguments: Command line without the program's name; `None` reads `sys.argv`.
        switches: Flags, such as `--resume`, that mean true when no value follows.

    Returns:
        The options.

    Raises:
        ConfigError: In one line for a flag or value that is none.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Parser(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ConfigError(" ".join(str(message).split())) from ex

    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog=Path(sys.argv[0]).name, description=kind.__doc__)
    parser.add_argument("--config", action="config", help="A YAML file with options.")
    parser.add_class_arguments(kind, nested_key=None, as_group=False)
    values: Any = vars(parser.instantiate_classes(parser.parse_args(_with_values(given, switches))))
    return kind(**{name: value for name, value in values.items() if name != "config"})


def _with_values(arguments: Sequence[str], switches: Sequence[str]) -> list[str]:
    result: list[str] = []
    for place, argument in enumerate(arguments):
        result.append(argument)
        following = arguments[place + 1 : place + 2]
        if argument in switches and (not following or following[0].startswith("--")):
            result.append("true")
    return result
