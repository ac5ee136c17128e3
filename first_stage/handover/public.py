"""What a model card may say: names, but no folders, machines or addresses of its author."""

import dataclasses
import re
from pathlib import Path

from first_stage.config.schema import Config
from first_stage.data import is_builtin

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


def public_name(path: str) -> str:
    """A path as it may be published.

    Args:
        path: A folder, an address, a hub id, or the name of a built-in set.

    Returns:
        Hub ids and built-in names as they are; of folders and addresses the last part alone.
    """
    if is_builtin(path):
        return path
    if _HUB_ID.fullmatch(path) and not path.startswith(".") and not Path(path).exists():
        return path
    without_query = re.split(r"[?#]", path, maxsplit=1)[0] if "://" in path else path
    return Path(without_query.rstrip("/")).name or "data"


def public_config(config: Config) -> Config:
    """A run's configuration as it may be published."""

    def named(path: str | None) -> str | None:
        return None if path is None else public_name(path)

    data = dataclasses.replace(
        config.data,
        path=public_name(config.data.path),
        validation_path=named(config.data.validation_path),
    )
    model = dataclasses.replace(config.model, pretrained=named(config.model.pretrained))
    return dataclasses.replace(
        config,
        output_dir=public_name(config.output_dir),
        start_from=named(config.start_from),
        data=data,
        model=model,
    )
