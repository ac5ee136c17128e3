"""The recipes that come with first-stage: the folder `configs` of a clone, or of the package."""

from pathlib import Path

from first_stage.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent


def recipe_folder() -> Path:
    """Where the recipes are."""
    installed = _PACKAGE / "configs"
    return installed if installed.is_dir() else _PACKAGE.parent / "configs"


def recipe_names() -> list[str]:
    """The recipes' names, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def recipe_file(name: str) -> Path:
    """The YAML file of a recipe.

    Args:
        name: Such as `kl_f8`.

    Raises:
        ConfigError: When there is no such recipe.
    """
    if name not in recipe_names():
        raise ConfigError(f"{name!r} is no recipe: there are {', '.join(recipe_names())}")
    return recipe_folder() / f"{name}.yaml"


def find_config(given: str) -> str:
    """What `--config` means: a file, or the name of a recipe where there is no such file.

    Args:
        given: The option's value.

    Returns:
        A path.

    Raises:
        ConfigError: When it is neither.
    """
    if Path(given).is_file():
        return given
    if given in recipe_names():
        return str(recipe_file(given))
    raise ConfigError(
        f"--config {given!r} is neither a file nor a recipe; the recipes are "
        f"{', '.join(recipe_names())}"
    )
