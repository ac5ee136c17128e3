"""Options of a command: a dataclass read from flags and YAML, mistakes told in one line."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from first_stage.errors import ConfigError

Options = TypeVar("Options")


def parser_class() -> Any:
    """`jsonargparse`'s parser, with errors as one-line `ConfigError`s and fields' docstrings."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)

    class Parser(jsonargparse.ArgumentParser):
        """Raises where the original prints its usage and exits."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            """Tell a mistake in one line."""
            raise ConfigError(" ".join(str(message).split())) from ex

    return Parser


def plain_parser(description: str | None) -> Any:
    """A parser without arguments.

    Args:
        description: What the command does.
    """
    return parser_class()(prog=Path(sys.argv[0]).name, description=description)


def read_options(
    kind: type[Options],
    arguments: Sequence[str] | None = None,
    switches: Mapping[str, str] | None = None,
    description: str | None = None,
    several: Mapping[str, str] | None = None,
) -> Options:
    """Read a command's options; `--help` lists the fields with their docstrings.

    Args:
        kind: A dataclass; its own docstring says what the command does.
        arguments: Command line without the program's name; `None` reads `sys.argv`.
        switches: Flags that may come without a value, such as `--resume`, and what they mean then.
        description: What the command does, where that is not the dataclass's docstring.
        several: Fields that take several values after one flag, with their help.

    Returns:
        The options.

    Raises:
        ConfigError: In one line for a flag or value that is none.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = plain_parser(description or kind.__doc__)
    parser.add_argument("--config", action="config", help="A YAML file; flags override it.")
    for name, text in (several or {}).items():
        parser.add_argument(f"--{name}", nargs="+", help=text)
    parser.add_class_arguments(kind, nested_key=None, as_group=False, skip=set(several or {}))
    parsed = parser.parse_args(with_values(given, switches or {}))
    values = vars(parser.instantiate_classes(parsed))
    # A field named like a method of the parser's namespace, `update`, comes with a mark before it.
    plain = {name.lstrip("\u200b"): value for name, value in values.items()}
    return kind(**{name: value for name, value in plain.items() if name != "config"})


def with_values(arguments: Sequence[str], switches: Mapping[str, str]) -> list[str]:
    """A command line in which every switch has a value.

    Args:
        arguments: The command line.
        switches: Flags that may come without a value, and what they mean then. After one that means
            `true` only `true` and `false` count as values; after others anything but a flag does.
    """
    result: list[str] = []
    for place, argument in enumerate(arguments):
        result.append(argument)
        meant = switches.get(argument)
        if meant is None:
            continue
        following = arguments[place + 1] if place + 1 < len(arguments) else "--"
        has_value = not following.startswith("--")
        if meant == "true":
            has_value = following in ("true", "false")
        if not has_value:
            result.append(meant)
    return result
