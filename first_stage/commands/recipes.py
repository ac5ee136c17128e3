"""`first-stage recipes [NAME]`: list the recipes that come with first-stage, or print one."""

import re
import sys
from collections.abc import Sequence

from first_stage.command_line import command_line
from first_stage.errors import ConfigError
from first_stage.recipes import recipe_file, recipe_folder, recipe_names

_HELP = """usage: first-stage recipes [NAME]

Without a name, list the recipes that come with first-stage. With one, print its YAML:
  first-stage recipes kl_f8 > mine.yaml
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """List the recipes, or print one.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.

    Raises:
        ConfigError: When there is no such recipe.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in ("-h", "--help"):
        print(_HELP, end="")
    elif not given:
        print("\n".join(_listing()))
    elif len(given) > 1:
        raise ConfigError(f"recipes takes one name, not {' '.join(given)!r}")
    else:
        print(recipe_file(given[0]).read_text(encoding="utf-8"), end="")


def _listing() -> list[str]:
    names = recipe_names()
    width = max(map(len, names)) + 2
    lines = [f"{name:<{width}}{about(name)}" for name in names]
    train = command_line("train", "--config", "kl_f8", "--data.path", "FOLDER", processes=1)
    return [*lines, "", f"In {recipe_folder()}; use one by its name:", f"  {train}"]


def about(name: str) -> str:
    """The first sentence of a recipe's leading comment."""
    comment = []
    for line in recipe_file(name).read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    # "et al. 2023" ends no sentence.
    return re.split(r"(?<! al)\.\s+", " ".join(comment))[0].rstrip(".")
