"""Types of fields: numbers with their range, and the mark of what may change on resume.

`--help` shows a range as part of the type ("int above 0"), and the parser refuses what lies outside
it; `misfits` says the same of values that were set in Python. Type checkers see plain numbers.
"""

import dataclasses
import math
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

T = TypeVar("T")

Precision = Literal["no", "bf16", "fp16"]
"""Type of autocast; no: float32."""

_MAY_CHANGE = {"may_change": True}


def may_change(default: T) -> T:
    """The default of a field that a run may go on with at another value.

    Every other field says what is trained on what: changing it would change the result, so resuming
    is refused.
    """
    return dataclasses.field(default=default, metadata=_MAY_CHANGE)


def section_may_change(section: type[T]) -> T:
    """The default of a section, all of whose fields may change."""
    return dataclasses.field(default_factory=section, metadata=_MAY_CHANGE)


if TYPE_CHECKING:
    PositiveInt = int
    NonNegativeInt = int
    PositiveFloat = float
    NonNegativeFloat = float
    Share = float
    PositiveShare = float
    Decay = float
else:
    from jsonargparse.typing import restricted_number_type

    def number(base, words, *restrictions):
        """A number with restrictions; `words`, after the base type, make up its name."""
        return restricted_number_type(f"{base.__name__} {words}", base, list(restrictions))

    # The same as jsonargparse's own, but named by their range.
    PositiveInt = number(int, "above 0", (">=", 1))
    NonNegativeInt = number(int, "of 0 or above", (">", -1))
    # The upper bound keeps infinity out; NaN fails every comparison.
    PositiveFloat = number(float, "above 0", (">", 0), ("<", math.inf))
    NonNegativeFloat = number(float, "of 0 or above", (">=", 0), ("<", math.inf))
    Share = number(float, "from 0 to 1", (">=", 0), ("<=", 1), ("<", math.inf))
    PositiveShare = number(float, "above 0, up to 1", (">", 0), ("<=", 1))
    Decay = number(float, "of at least 0 and below 1", (">=", 0), ("<", 1))


def misfits(options: Any, prefix: str = "") -> Iterator[str]:
    """Fields whose values are not of their types, ranges included.

    Args:
        options: A dataclass; its sections are looked into.
        prefix: Put before the names of the fields.

    Yields:
        One line each: field, value, what it must be.
    """
    hints = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        name, value = f"{prefix}{field.name}", getattr(options, field.name)
        if dataclasses.is_dataclass(value):
            yield from misfits(value, f"{name}.")
        elif not _fits(value, hints[field.name]):
            yield misfit(name, value, _words(hints[field.name]))


def misfit(name: str, value: object, words: str) -> str:
    """The line about a value that is not what it must be."""
    shown = list(value) if isinstance(value, tuple) else value
    return f"{name} is {shown}; it must be {'an' if words[0] in 'aeiou' else 'a'} {words}"


def changeable(options: type) -> Iterator[str]:
    """Dotted names of the fields, and of the sections, that may change on resume."""
    sections: list[str] = []
    for name, field, _ in _walk(options):
        if "may_change" in field.metadata and not name.startswith(tuple(sections)):
            sections.append(f"{name}.")
            yield name


def field_names(options: type) -> Iterator[str]:
    """Dotted names of all fields, without those that are sections themselves."""
    return (name for name, _, kind in _walk(options) if not dataclasses.is_dataclass(kind))


def mappings(options: type) -> Iterator[str]:
    """Dotted names of the fields that are mappings themselves, such as weights by name."""
    return (name for name, _, kind in _walk(options) if get_origin(kind) is dict)


def _walk(options: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Name, field and type of every field of a class of options, its sections looked into."""
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        name, kind = f"{prefix}{field.name}", hints[field.name]
        yield name, field, kind
        if dataclasses.is_dataclass(kind):
            yield from _walk(cast(type, kind), f"{name}.")


def plain(value: Any) -> Any:
    """A value, or a dataclass, whose restricted numbers are ordinary ones again.

    As subclasses of `int` and `float` they would be refused by YAML and retraced by compilers.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain(entry) for entry in value)
    return value._type(value) if _is_restricted(type(value)) else value


def _is_restricted(kind: Any) -> bool:
    return isinstance(kind, type) and hasattr(kind, "_restrictions")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type: of those that fields have."""
    if hint is Any:
        return True
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, kind) for kind in arguments)
    if origin is Literal:
        return value in arguments
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, arguments[1]) for v in value.values())
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return False
        if origin is list or arguments[1:] == (...,):
            return all(_fits(entry, arguments[0]) for entry in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if _is_restricted(hint):
        return _is_number(value, hint._type) and all(
            holds(value, bound) for holds, bound in hint._restrictions
        )
    if hint in (int, float):
        return _is_number(value, hint)
    return isinstance(value, hint)


def _is_number(value: Any, kind: type) -> bool:
    wanted = int if kind is int else (int, float)
    return isinstance(value, wanted) and not isinstance(value, bool)


def _words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, arguments))
    if origin is Literal:
        return f"choice of {', '.join(map(str, arguments))}"
    if origin is dict:
        return f"mapping to {_words(arguments[1])}"
    if origin is list or arguments[1:] == (...,):
        return f"list, each {_words(arguments[0])}"
    if origin is tuple:
        return f"list of {len(arguments)}, each {_words(arguments[0])}"
    return "null" if hint is NoneType else str(hint.__name__)
