"""Write the pages of `docs/reference` from the docstrings: `python docs/generate_reference.py`.

Plain Markdown, so that they read well in a file browser too. A test demands that they are current.
"""

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser

import first_stage
import latent_tools
from first_stage.__main__ import COMMANDS, usage
from first_stage.commands import cache, evaluate, export
from first_stage.config.schema import Config
from first_stage.config.sections import with_sections
from first_stage.losses import objective  # noqa: F401  # terms and families bring sections
from first_stage.models import built_in  # noqa: F401
from latent_tools import __main__ as latents

FOLDER = Path(__file__).resolve().parent / "reference"
_NOTE = "<!-- Made by docs/generate_reference.py from the docstrings: change them instead. -->"
_OPTIONS = {"evaluate": evaluate.Arguments, "cache": cache.Options, "export": export.Options}
_LATENTS = (
    latents.info, latents.verify, latents.stats, latents.preview, latents.gc, latents.export,
)  # fmt: skip
_FUNCTIONS = (
    "first_stage.metrics.images",
    "first_stage.metrics.spectrum",
    "first_stage.metrics.frechet",
    "first_stage.metrics.latents",
    "first_stage.losses.adversarial",
    "first_stage.losses.penalties",
    "first_stage.losses.learned",
    "first_stage.losses.latent_terms",
    "first_stage.models.disturb",
)
"""Modules of functions that take tensors and numbers."""


def pages() -> dict[str, str]:
    """Name to text of every page."""
    return {
        "commands.md": "\n".join(_commands()),
        "configuration.md": "\n".join(_configuration()),
        "python.md": "\n".join(_python()),
    }


# -- commands --------------------------------------------------------------------------------


def _commands() -> Iterator[str]:
    yield from ("# Commands", "", _NOTE, "", "```", usage(), "```", "")
    for name, about in COMMANDS.items():
        yield from (f"## first-stage {name}", "", about, "")
        if name == "train":
            yield "Its options are the fields of the [configuration](configuration.md)."
        elif name == "recipes":
            yield "`first-stage recipes` lists them; `first-stage recipes NAME` prints one."
        elif name == "latents":
            for function in _LATENTS:
                yield from _subcommand(function)
            continue
        else:
            yield from _sections(_OPTIONS[name], level="###")
        yield ""


def _subcommand(function: Callable[..., Any]) -> Iterator[str]:
    said = docstring_parser.parse(inspect.getdoc(function) or "")
    meant = {entry.arg_name: entry.description or "" for entry in said.params}
    yield from (f"### first-stage latents {function.__name__} CACHE", "", _sentences(said), "")
    lines = [
        f"- `--{p.name}` (default {_default(p.default)}): {_line(meant.get(p.name))}"
        for p in inspect.signature(function).parameters.values()
        if p.default is not p.empty
    ]
    if lines:
        yield from (*lines, "")


# -- configuration ---------------------------------------------------------------------------


def _configuration() -> Iterator[str]:
    yield from ("# Configuration", "", _NOTE, "")
    yield (
        "Every field is a key of the YAML that `--config` names, and a flag of the command:\n"
        "`first-stage train --loss.kl_weight 1e-6`. Flags override the file, and a misspelt name\n"
        "is refused. A run that is resumed may have another value of the fields marked with *,\n"
        "and of no other."
    )
    yield ""
    yield from _sections(with_sections(Config))


def _sections(
    kind: type, prefix: str = "", level: str = "##", may_change: bool = False
) -> Iterator[str]:
    """The fields of a class of options, and then those of each of its sections."""
    if prefix:
        title = prefix.removesuffix(".")
        yield from (
            f"{level} {title}",
            "",
            _first(kind),
            "",
        )
    lines, sections = [], []
    hints, meant = get_type_hints(kind), _meanings(kind)
    for field in dataclasses.fields(kind):
        hint, name = _without_none(hints[field.name]), f"{prefix}{field.name}"
        about = _type(hints[field.name])
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            sections.append((f"{name}.", hint, may_change or "may_change" in field.metadata))
            if field.default is not None:
                continue
            about = "section, or null"
        default = _default(_default_of(field))
        about += f", default {default}" if default else ""
        mark = " \\*" if may_change or "may_change" in field.metadata else ""
        lines.append(f"- `{name}`{mark} ({about}): {_line(meant.get(field.name))}")
    if lines:
        yield from (*lines, "")
    for name, section, may in sections:
        yield from _sections(section, name, level, may)


def _meanings(kind: type) -> dict[str, str]:
    """Field to the docstring below it, those of base classes too."""
    found = (
        {name: re.sub(r" \(.*\)$", "", text) for name, text in evaluate._SEVERAL.items()}
        if kind is evaluate.Arguments
        else {}
    )
    for ancestor in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(ancestor):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(ancestor))).body
        for line, below in itertools.pairwise(body.body):  # type: ignore[attr-defined]
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                text = getattr(getattr(below, "value", None), "value", None)
                if isinstance(text, str) and text:  # else the base class says it
                    found[line.target.id] = text
    return found


def _default_of(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else ""


def _default(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        value = list(value)
    return f"`{value}`" if value != "" else ""


def _without_none(hint: Any) -> Any:
    rest = [part for part in get_args(hint) if part is not type(None)]
    return rest[0] if get_origin(hint) in (Union, types.UnionType) and len(rest) == 1 else hint


def _type(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("null" if p is type(None) else _type(p) for p in get_args(hint))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) in (tuple, list, dict):
        inner = [_type(p) for p in get_args(hint) if p is not Ellipsis]
        if get_origin(hint) is tuple and Ellipsis not in get_args(hint):
            return f"[{', '.join(inner)}]"
        return f"{'map' if get_origin(hint) is dict else 'list'} of {' to '.join(inner)}"
    return getattr(hint, "__name__", str(hint))


# -- Python ----------------------------------------------------------------------------------


def _python() -> Iterator[str]:
    yield from ("# Python", "", _NOTE, "")
    yield (
        "Images are `(B, C, H, W)` float in [-1, 1] everywhere. What is named here is what other\n"
        "code may rely on."
    )
    for package in (first_stage, latent_tools):
        yield from ("", f"## {package.__name__}", "", _first(package), "")
        for name in package.__all__:
            yield from _object(f"{package.__name__}.{name}", getattr(package, name), "###")
    for name in _FUNCTIONS:
        module = importlib.import_module(name)
        yield from (f"## {name}", "", _first(module), "")
        for key, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == name and key[0] != "_":
                yield from _object(f"{name}.{key}", value, "###")


def _first(thing: Any) -> str:
    return _sentences(docstring_parser.parse(inspect.getdoc(thing) or ""))


def _object(name: str, value: Any, level: str) -> Iterator[str]:
    short = name.rpartition(".")[2]
    yield from (f"{level} {short}", "", "```python", *_signature(short, value), "```", "")
    yield from _docstring(value)
    if not inspect.isclass(value) or issubclass(value, Exception):
        return
    for key, member in vars(value).items():
        function = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        if key[0] == "_" or not inspect.getdoc(function):
            continue
        if inspect.isfunction(function):
            yield from _object(f"{name}.{key}", function, f"{level}#")
        elif isinstance(member, property):
            yield from (f"{level}# {key}", "", *_docstring(member.fget))


def _signature(name: str, value: Any) -> list[str]:
    if inspect.isclass(value) and issubclass(value, Exception):
        return [f"class {name}({value.__base__.__name__})"]
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return [name]
    parts = []
    for parameter in signature.parameters.values():
        if parameter.name == "self":
            continue
        default = "" if parameter.default is parameter.empty else f" = {_code(parameter.default)}"
        if "FACTORY" in default:  # a section's own defaults
            default = f" = {parameter.annotation.__name__}()"
        star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        hint = "" if parameter.annotation is parameter.empty else _annotation(parameter.annotation)
        parts.append(f"{star}{parameter.name}{': ' * bool(hint)}{hint}{default}")
    result = signature.return_annotation
    returns = "" if result is signature.empty or inspect.isclass(value) else _annotation(result)
    head = f"{name}({', '.join(parts)}){' -> ' * bool(returns)}{returns}"
    if len(head) <= 96:
        return [head]
    return [f"{name}(", *(f"    {p}," for p in parts), f"){' -> ' * bool(returns)}{returns}"]


def _annotation(hint: Any) -> str:
    text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    text = re.sub(r"\b(int|float) (?:above|of|from) [\w ]+?(?= \||\]|$)", r"\1", text)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z_])", "", text)


def _code(value: Any) -> str:
    """A default as it could stand in code; a default that is an object, by its name."""
    text = repr(value)
    return getattr(value, "__name__", type(value).__name__) if text.startswith("<") else text


def _docstring(value: Any) -> Iterator[str]:
    said = docstring_parser.parse(inspect.getdoc(value) or "")
    yield from (_sentences(said), "")
    for title, entries in (
        ("Arguments", [p for p in said.params if p.args[0] == "param"]),
        ("Attributes", [p for p in said.params if p.args[0] == "attribute"]),
    ):
        if entries:
            yield from (f"{title}:", "")
            yield from (f"- `{p.arg_name}`: {_line(p.description)}" for p in entries)
            yield ""
    if said.returns is not None:
        yields = "Yields" if said.returns.is_generator else "Returns"
        words = [f"{said.returns.type_name}:" if said.returns.type_name else "",
                 said.returns.description or ""]  # fmt: skip
        yield from (f"{yields}: {_line(' '.join(word for word in words if word))}", "")
    if said.raises:
        yield from ("Raises:", "")
        yield from (f"- `{r.type_name}`: {_line(r.description)}" for r in said.raises)
        yield ""


# -- small pieces ----------------------------------------------------------------------------


def _sentences(said: Any) -> str:
    parts = [said.short_description, said.long_description]
    return "\n\n".join(part.strip() for part in parts if part)


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def tidy(text: str) -> str:
    """A page without repeated blank lines."""
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(tidy(text), "utf-8")


if __name__ == "__main__":
    main()
