"""Sections of the recipe that come with a registered term or family: `loss.NAME`, `model.NAME`.

Whoever registers a term of the loss or a family of first stages brings a dataclass. It becomes a
field of the parent section: read from YAML and flags, listed by `--help`, checked, and compared on
resume like every other.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

Parent = Literal["model", "loss"]

_SECTIONS: dict[Parent, dict[str, type]] = {"model": {}, "loss": {}}


def add_section(parent: Parent, name: str, kind: type) -> None:
    """Make a dataclass a section of the recipe.

    Args:
        parent: The section it is in.
        name: Its name there; a Python identifier that the parent does not have yet.
        kind: A frozen dataclass whose fields all have defaults; their docstrings are the help.
    """
    _SECTIONS[parent][name] = kind


def sections_of(parent: Parent) -> Mapping[str, type]:
    """The registered sections of a parent."""
    return MappingProxyType(_SECTIONS[parent])


def section(parent: Any, name: str, kind: type) -> Any:
    """A registered section's values; its defaults where the parent was made without it."""
    return getattr(parent, name, None) or kind()


def with_sections(config: type) -> type:
    """A configuration class whose parents have the registered sections as fields.

    Args:
        config: A frozen dataclass with the fields `model` and `loss`.

    Returns:
        `config` itself while nothing is registered, else a subclass of it: the same one as long as
        the same sections are registered, so that configurations can be compared.
    """
    registered = tuple((parent, *each.items()) for parent, each in _SECTIONS.items() if each)
    return _extended(config, registered) if registered else config


@functools.cache
def _extended(config: type, registered: tuple[Any, ...]) -> type:
    fields: list[tuple[str, type, Any]] = []
    for parent, *sections in registered:
        kind = next(f for f in dataclasses.fields(config) if f.name == parent).type
        assert isinstance(kind, type)  # annotations are not strings in this package
        fields.append(_field(parent, _made(kind, [_field(*each) for each in sections])))
    return _made(config, fields)


def _field(name: str, kind: type) -> tuple[str, type, Any]:
    return name, kind, dataclasses.field(default_factory=kind)


def _made(kind: type, fields: list[tuple[str, type, Any]]) -> type:
    made = dataclasses.make_dataclass(kind.__name__, fields, bases=(kind,), frozen=True)
    made.__module__, made.__doc__ = kind.__module__, kind.__doc__
    return made
