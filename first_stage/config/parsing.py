"""Options of a command: a dataclass read from flags and YAML, mistakes told in one line."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from first_stage.config.checks import check
from first_stage.config.mistakes import check_file, in_plain_words
from first_stage.config.schema import Config
from first_stage.config.sections import with_sections
from first_stage.config.types import plain
from first_stage.errors import ConfigError
from first_stage.recipes import find_config

Options = TypeVar("Options")


def parser_class() -> Any:
    """`jsonargparse`'s parser, with errors as one-line `ConfigError`s and fields' docstrings.

    It imports nothing that a recipe names: a recipe may come from anyone.
    """
    import jsonargparse

    jsonargparse.set_parsing_settings(
        docstring_parse_attribute_docstrings=True, import_path_denylist=["*"]
    )

    class Parser(jsonargparse.ArgumentParser):
        """Raises where the original prints its usage and exits."""

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            """Tell a mistake in one line."""
            raise ConfigError(in_plain_words(" ".join(str(message).split()), self)) from ex

        def parse_args(self, *args: Any, **kwargs: Any) -> Any:
            """Parse, and tell of a class to import as of any other mistake."""
            try:
                return super().parse_args(*args, **kwargs)
            except ValueError as error:
                self.error(str(error), error)

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
    parser.add_argument(
        "--config", action="config", help="A YAML file, or a recipe's name; flags override it."
    )
    for name, text in (several or {}).items():
        parser.add_argument(f"--{name}", nargs="+", help=text)
    parser.add_class_arguments(kind, nested_key=None, as_group=False, skip=set(several or {}))

    def recipe(name: str) -> str:
        file = find_config(name)
        check_file(file, kind, several or ())
        return file

    parsed = parser.parse_args(with_values(with_recipes(given, recipe), switches or {}))
    values = vars(parser.instantiate_classes(parsed))
    # A field named like a method of the parser's namespace, `update`, comes with a mark before it.
    named = {name.lstrip("\u200b"): value for name, value in values.items()}
    options = {name: value for name, value in named.items() if name != "config"}
    return with_home(plain(kind(**options)))


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """Read a run's configuration from `--config FILE` and `--field.name value`.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: In one line for anything that cannot work.
    """
    config: Config = read_options(
        with_sections(Config),
        arguments,
        description="Train the first stage of a latent diffusion model on your own images.",
    )
    check(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain nested dictionaries, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def with_home(value: Any) -> Any:
    """Options in which `~` stands for the user's folder no more.

    A shell expands it at the start of a word only, and nobody does in YAML. No text that is not a
    path begins with it.

    Args:
        value: Text, or a dataclass, list or tuple of such values; others stay as they are.
    """
    if isinstance(value, str):
        return str(Path(value).expanduser()) if value.startswith("~") else value
    if isinstance(value, list | tuple):
        return type(value)(with_home(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        changed = {name: with_home(getattr(value, name)) for name in names}
        return dataclasses.replace(value, **changed)
    return value


def with_recipes(arguments: Sequence[str], find: Callable[[str], str]) -> list[str]:
    """A command line in which every `--config` names a file.

    Args:
        arguments: The command line; `--config kl_f8` names a recipe.
        find: Gives the file that a value means.
    """
    result: list[str] = []
    for argument in arguments:
        if result and result[-1] == "--config":
            argument = find(argument)
        elif argument.startswith("--config="):
            argument = f"--config={find(argument.removeprefix('--config='))}"
        result.append(argument)
    return result


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
