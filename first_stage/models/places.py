"""Finding first stages: in folders, pipelines' folders, on the hub and in its cache here."""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from first_stage.errors import UserError, first_line
from first_stage.files import standing
from first_stage.hub import why_out_of_reach
from first_stage.models.quiet import quiet_diffusers
from first_stage.models.single_file import SUFFIXES

WEIGHTS = "diffusion_pytorch_model"
"""What files with a diffusers model's weights are named."""
_VARIANT = rf"{WEIGHTS}\.(\w+)\.safetensors|{WEIGHTS}\.safetensors\.index\.(\w+)\.json"
_OF_A_FOLDER = re.compile(rf"{WEIGHTS}(-\d+-of-\d+)?\.safetensors")


@dataclass(frozen=True)
class Place:
    """Where a first stage lies.

    Attributes:
        name: What the user called it.
        field: The option or field that named it.
        source: A folder, or a hub id.
        subfolder: `vae` in a pipeline.
        options: More arguments of `from_pretrained`.
    """

    name: str
    field: str
    source: str
    subfolder: str | None
    options: dict[str, Any]

    def problem(self, text: str) -> UserError:
        """A mistake that names the field."""
        return UserError(f"{self.field} {self.name!r} {text}")


def find(given: str, revision: str | None, field: str) -> Place:
    """Where a first stage lies that is no single file.

    Args:
        given: A folder, a pipeline's folder, or a hub id, with `@REVISION` where it is not the
            newest.
        revision: The hub revision.
        field: The option or field that names it, for messages.

    Raises:
        UserError: When there is none.
    """
    name = given
    if not name.strip():
        raise UserError(f"{field}: no first stage was named: give a diffusers folder or a hub id")
    local = standing(Path(name))
    if local.exists():
        subfolder = "vae" if (local / "vae" / "config.json").exists() else None
        if subfolder is None and not (local / "config.json").exists():
            raise UserError(
                f"{field} {name!r} is no diffusers folder: it has neither config.json nor "
                f"vae/config.json{_single_files(local)}"
            )
        return Place(name, field, str(local), subfolder, _variant(local / (subfolder or ".")))
    name, _, named_revision = given.partition("@")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"{field} {given!r} does not exist (and is no hub id of the form owner/name)"
        )
    return _find_on_hub(name, revision or named_revision or None, field)


def is_of_a_folder(file: Path) -> bool:
    """Whether a file is the weights of a diffusers folder, whose config says more than shapes."""
    return bool(_OF_A_FOLDER.fullmatch(file.name)) and (file.parent / "config.json").is_file()


def _single_files(folder: Path) -> str:
    """What to take instead of a folder that only holds files."""
    found = sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES)
    return f"; name the file itself ({', '.join(found[:3])})" if found else ""


def _variant(folder: Path) -> dict[str, str]:
    """Argument of `from_pretrained` for a folder that only has variants, such as fp16."""
    for name in ("safetensors", "safetensors.index.json"):
        if (folder / f"{WEIGHTS}.{name}").exists():
            return {}
    found = [re.fullmatch(_VARIANT, file.name) for file in folder.iterdir()]
    variants = sorted({match[1] or match[2] for match in found if match}, key=lambda v: v != "fp16")
    return {"variant": variants[0]} if variants else {}


def _find_on_hub(name: str, revision: str | None, field: str) -> Place:
    """A first stage on the hub, or in its cache here; says at once when it is neither."""
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    out_of_reach = why_out_of_reach()
    options = {"revision": revision, "local_files_only": out_of_reach is not None}
    try:
        for subfolder in (None, "vae"):
            place = Place(name, field, name, subfolder, options)
            with contextlib.suppress(EntryNotFoundError, OSError):
                read_config(place)
                return place
    except RepositoryNotFoundError:
        pass
    named = f"{name}@{revision}" if revision else name
    if out_of_reach is not None:
        raise UserError(
            f"{field} {named!r}: there is no such folder here, the hub's cache here has no such "
            f"first stage, and the hub cannot be reached ({out_of_reach})"
        )
    raise UserError(
        f"{field} {named!r}: there is no such folder here, and the hub has no first stage of that "
        "name that you may read (neither config.json nor vae/config.json)"
    )


def read_config(place: Place) -> dict[str, Any]:
    """What its `config.json` says.

    Raises:
        UserError: When it is no JSON object.
    """
    from diffusers.configuration_utils import ConfigMixin

    if Path(place.source).exists():
        folder = Path(place.source, place.subfolder or ".")
        try:
            return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise place.problem(
                f"has a config.json that cannot be read: {first_line(error)}"
            ) from error

    class _Any(ConfigMixin):
        config_name = "config.json"

    with quiet_diffusers():
        return dict(_Any.load_config(place.source, subfolder=place.subfolder, **place.options))
