"""What is wrong with a recipe or a command line, in one line: file or field, value, remedy."""

import contextlib
import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from first_stage.config.types import field_names, misfit
from first_stage.errors import ConfigError

_NO_IMPORT = re.compile(r"Importing ('[^']*') is not allowed, .*")
_SAID_PLAINLY = r"\1 is no set of fields (nothing that a recipe names is imported)"
_UNKNOWN = re.compile(r"unrecognized arguments: --([\w.]+)")
_SECTION = re.compile(r"Parser key \"([^\"]+)\": Unable to load config '([^']*)'")
_KIND = re.compile(r"Expected a (?:<class '(\w+)'>|typing\.Literal\[([^\]]*)\])")
_KINDS = {"NoneType": "null", "tuple": "list", "dict": "mapping"}
_VALUE = re.compile(r"(?:Got|Given) value: (.+)$")
_FIELD = re.compile(r'Parser key "([^"]+)"')
_RANGE = re.compile(r"Not of type ((?:int|float) [^:]+): ")
_WHOLE = re.compile(r"Given value: (.+)$")
_PART = re.compile(r": (?:(\S+) does not conform|[^:]+: '([^']*)'$)")


def _out_of_range(message: str, parser: Any) -> str | None:
    """The parser's words about a number that is none or outside its range, as `misfits` has them.

    Args:
        message: In one line.
        parser: Knows whether the field is a number, or a list of them.

    Returns:
        `None` when the message is about something else.
    """
    fields, kind = _FIELD.findall(message), _RANGE.search(message)
    whole, part = _WHOLE.search(message), _PART.search(message)
    found = whole or part
    if not fields or kind is None or found is None:
        return None
    name, words, value = fields[-1], kind[1], found[found.lastindex or 0]
    if whole is None and isinstance(parser.get_default(name), tuple | list | dict):
        return f"{name} has {value}, which is no {words}"
    if value.startswith(("[", "(")):
        words = f"list, each {words}"
    elif words.startswith("float"):
        with contextlib.suppress(ValueError):
            value = str(float(value))
    return misfit(name, value, words + (" or null" if "NoneType" in message else ""))


def in_plain_words(message: str, parser: Any) -> str:
    """What `jsonargparse` says of a mistake, as `misfits` would say it where it can be.

    Args:
        message: In one line.
        parser: Knows the fields.
    """
    message = _NO_IMPORT.sub(_SAID_PLAINLY, message)
    if message.startswith('expected "subcommand"'):
        there = next(a.choices for a in parser._actions if a.dest == "subcommand")
        return f"a subcommand is missing: there are {', '.join(there)}; --help says more"
    if found := _UNKNOWN.search(message):
        near = did_you_mean(found[1], [action.dest for action in parser._actions], "--")
        return f"{message}{near or '; --help lists the fields'}"
    if found := _SECTION.search(message):
        first = next((a.dest for a in parser._actions if a.dest.startswith(f"{found[1]}.")), "")
        return f"{found[1]} is {found[2]}; it must be a section: set its fields, such as --{first}"
    return _out_of_range(message, parser) or _wrong_kind(message) or message


def _wrong_kind(message: str) -> str | None:
    """The parser's words about a value of another kind, such as none of a field's choices."""
    fields, kinds, value = _FIELD.findall(message), _KIND.findall(message), _VALUE.search(message)
    if not fields or not kinds or value is None:
        return None
    words = [
        _KINDS.get(kind, kind) if kind else f"choice of {choices.replace(chr(39), '')}"
        for kind, choices in kinds
    ]
    return misfit(fields[-1], value[1], " or ".join(words))


def did_you_mean(name: str, names: Iterable[str], before: str = "") -> str:
    """The hint about a name that is not there; empty where nothing is like it.

    Args:
        name: The dotted name that was given.
        names: Those that there are.
        before: Put before the one that was meant.
    """
    names = list(names)
    last = name.rpartition(".")[2]
    elsewhere = [other for other in names if other.rpartition(".")[2] == last]
    near = elsewhere[:1] or difflib.get_close_matches(name, names, 1, 0.7)
    return f": did you mean {before}{near[0]}?" if near else ""


def check_file(path: str, kind: type, more: Collection[str] = ()) -> None:
    """Whether a recipe's file holds fields, all of which there are, and sections where they are.

    Args:
        path: A YAML file.
        kind: The dataclass of options that it sets.
        more: Further fields.

    Raises:
        ConfigError: With the file and the first thing that is wrong with it.
    """
    told = f"--config {path!r}"
    try:
        found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{told} is no text: give a recipe in YAML") from error
    except OSError as error:
        raise ConfigError(f"{told} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        what = getattr(error, "problem", None) or "it cannot be read"
        raise ConfigError(f"{told} is no YAML{where}: {what}") from error
    if found is None:
        raise ConfigError(
            f"{told} is empty: first-stage recipes lists the recipes, and prints one to begin with"
        )
    if not isinstance(found, dict):
        raise ConfigError(
            f"{told} holds a {type(found).__name__} instead of fields such as output_dir: runs/mine"
        )
    for problem in _misplaced(found, [*field_names(kind), *more, "config"]):
        raise ConfigError(f"{told}: {problem}")


def _misplaced(values: dict[Any, Any], names: Collection[str]) -> Iterator[str]:
    parts = [name.split(".") for name in names]
    sections = {".".join(p[:end]) for p in parts for end in range(1, len(p))}
    for name, value in _flat(values, sections):
        if name in sections:
            first = next(n for n in names if n.startswith(f"{name}."))
            shown = "empty" if value is None else value
            yield f"{name} is {shown}; it must be a section of fields, such as {first}"
        elif name not in names:
            yield f"there is no field {name}{did_you_mean(name, [*names, *sections])}"


def _flat(values: dict[Any, Any], sections: Collection[str], prefix: str = "") -> Iterator[Any]:
    """Dotted names and values; of sections that are mappings, those of their fields."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name in sections and isinstance(value, dict):
            yield from _flat(value, sections, f"{name}.")
        else:
            yield name, value
