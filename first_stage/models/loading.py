"""Loading first stages: any diffusers autoencoder, with every weight in its place.

`from_pretrained` only logs the weights that it found no place for, and leaves those that it found
none for without values; here both are refused by name.
"""

import contextlib
import hashlib
import json
import logging
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from first_stage.errors import UserError, first_line
from first_stage.files import standing
from first_stage.models.families import FAMILIES
from first_stage.models.single_file import SUFFIXES, is_single_file, load_single_file

STATISTICS_FILE = "latent_statistics.json"
"""Beside the config of one of our exports: what was measured of its latents."""
_PREFIXES = ("_orig_mod.", "module.")
"""What `torch.compile` and data-parallel wrappers put before every weight's name."""
_SHOWN = 3
_WEIGHTS = "diffusion_pytorch_model"
_PATIENCE = 6.0
"""Seconds to wait for an answer of the hub before it counts as out of reach."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Place:
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


def load_autoencoder(name: str, revision: str | None = None, field: str = "first_stage") -> Any:
    """Load any diffusers autoencoder: a folder, a pipeline's folder, a single file, or a hub id.

    Args:
        name: A folder with `config.json` and safetensors weights (whole, in shards, or as the fp16
            variant), a pipeline's folder with a `vae` subfolder, a hub id of either, with
            `@REVISION` where it is not the newest, or a single file: a first stage, or a whole
            checkpoint that holds one (see `single_file`).
        revision: The hub revision.
        field: The option or field that names it, for messages.

    Returns:
        The autoencoder as the class that its `config.json` names, float32, in eval mode.

    Raises:
        UserError: When it cannot be loaded, is not an autoencoder with `encode` and `decode`, or
            when its weights are not those that its `config.json` asks for.
    """
    try:
        if is_single_file(file := standing(Path(name))):
            place = _Place(name, field, str(file), None, {})
            model, remark = load_single_file(file, place.problem)
            if remark:
                _LOG.warning("%s %r: %s", field, name, remark)
        else:
            place = _find(name, revision, field)
            model = _load(place, _class_of(_read_config(place), place))
    except UserError:
        raise
    except Exception as error:
        raise place.problem(f"cannot be loaded: {first_line(error)}") from error
    # It would go out with every export; it is a folder of this machine.
    from diffusers.configuration_utils import FrozenDict

    model._internal_dict = FrozenDict(
        {key: value for key, value in model.config.items() if key != "_name_or_path"}
    )
    return model.eval()


def fingerprint_weights(model: nn.Module) -> str:
    """SHA-256 over name, type, shape and bytes of every weight and buffer, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def training_resolution(name: str, autoencoder: Any, revision: str | None = None) -> int | None:
    """The side of the crops that a first stage was trained on, in pixels; `None`: unknown.

    Exports of ours say it beside their config, whose `sample_size` is the tile that diffusers
    cuts large images into; in other folders `sample_size` is all there is.

    Args:
        name: The folder or hub id that it was loaded from.
        autoencoder: What `load_autoencoder` made of it.
        revision: The hub revision.

    Raises:
        UserError: When the first stage is not there, or the hub gives no answer.
    """
    file = _statistics(_find(name, revision, "first_stage"))
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8")).get("resolution")
        if isinstance(found, int) and found > 0:
            return found
    side = autoencoder.config.get("sample_size")
    return side if isinstance(side, int) and side > 0 else None


def _statistics(place: _Place) -> Path:
    """Where the statistics of an export would lie, here or in the hub's cache."""
    if Path(place.source).exists():
        return Path(place.source, place.subfolder or ".", STATISTICS_FILE)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(
            hf_hub_download(
                place.source, STATISTICS_FILE, subfolder=place.subfolder, **place.options
            )
        )
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return Path(STATISTICS_FILE, "is not there")
    except Exception as error:
        raise place.problem(
            f"has a {STATISTICS_FILE} that cannot be fetched: {first_line(error)}"
        ) from error


# -- finding -------------------------------------------------------------------------------------


def _find(name: str, revision: str | None, field: str) -> _Place:
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
        return _Place(name, field, str(local), subfolder, _variant(local / (subfolder or ".")))
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(
            f"{field} {name!r} does not exist (and is no hub id of the form owner/name)"
        )
    name, _, named_revision = name.partition("@")
    return _find_on_hub(name, revision or named_revision or None, field)


def _single_files(folder: Path) -> str:
    """What to take instead of a folder that only holds files."""
    found = sorted(file.name for file in folder.iterdir() if file.suffix in SUFFIXES)
    return f"; name the file itself ({', '.join(found[:3])})" if found else ""


def _variant(folder: Path) -> dict[str, str]:
    """Argument of `from_pretrained` for a folder that has no other weights than fp16's."""
    for name in ("safetensors", "safetensors.index.json"):
        if (folder / f"{_WEIGHTS}.{name}").exists():
            return {}
    halves = (f"{_WEIGHTS}.fp16.safetensors", f"{_WEIGHTS}.safetensors.index.fp16.json")
    return {"variant": "fp16"} if any((folder / name).exists() for name in halves) else {}


def _find_on_hub(name: str, revision: str | None, field: str) -> _Place:
    """A first stage on the hub, or in its cache here; says at once when it is neither."""
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    out_of_reach = _why_the_hub_is_out_of_reach()
    options = {"revision": revision, "local_files_only": out_of_reach is not None}
    try:
        for subfolder in (None, "vae"):
            place = _Place(name, field, name, subfolder, options)
            with contextlib.suppress(EntryNotFoundError, OSError):
                _read_config(place)
                return place
    except RepositoryNotFoundError:
        pass
    if out_of_reach is not None:
        raise UserError(
            f"{field} {name!r}: there is no such folder here, the hub's cache here has no such "
            f"first stage, and the hub cannot be reached ({out_of_reach})"
        )
    raise UserError(
        f"{field} {name!r}: there is no such folder here, and the hub has no first stage of that "
        "name that you may read (neither config.json nor vae/config.json)"
    )


def _why_the_hub_is_out_of_reach() -> str | None:
    """Ask once and briefly: the hub's own client asks six times, half a minute long."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    answer = [f"{constants.ENDPOINT} gave no answer in {_PATIENCE:.0f} s"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
            answer[0] = ""
        except Exception as error:
            answer[0] = f"{constants.ENDPOINT}: {first_line(error)}"

    thread = threading.Thread(target=ask, daemon=True)  # a name server may take longer
    thread.start()
    thread.join(_PATIENCE)
    return answer[0] or None


def _read_config(place: _Place) -> dict[str, Any]:
    from diffusers.configuration_utils import ConfigMixin

    if Path(place.source).exists():
        folder = Path(place.source, place.subfolder or ".")
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))

    class _Any(ConfigMixin):
        config_name = "config.json"

    with _quiet_diffusers():
        return dict(_Any.load_config(place.source, subfolder=place.subfolder, **place.options))


def _class_of(config: Mapping[str, Any], place: _Place) -> Any:
    import diffusers

    class_name = str(config.get("_class_name", ""))
    registered = {family.model_class.__name__: family.model_class for family in FAMILIES.values()}
    cls = registered.get(class_name) or getattr(diffusers, class_name, None)
    if cls is None or not (hasattr(cls, "encode") and hasattr(cls, "decode")):
        raise place.problem(
            f"is not an autoencoder: its config.json names the class {class_name!r}, which has no "
            "encode and decode in diffusers"
        )
    return cls


# -- weights -------------------------------------------------------------------------------------


def _load(place: _Place, cls: Any) -> Any:
    """The model, once every weight fits; names with a wrapper's prefix are read without it."""
    model, info = _from_pretrained(cls, place.source, place.subfolder, place.options)
    prefix = _common_prefix(info["unexpected_keys"])
    if prefix and info["missing_keys"]:
        with tempfile.TemporaryDirectory() as folder:
            _write_without_prefix(place, cls, prefix, Path(folder))
            model, info = _from_pretrained(cls, folder, None, {})
        if not _misfits(info):
            _LOG.warning(
                "%s %r: the prefix %s of its weights' names is left out",
                place.field, place.name, prefix,
            )  # fmt: skip
    if misfits := _misfits(info):
        raise place.problem(
            f"has weights that do not fit its config.json: {'; '.join(misfits)}. It was saved by "
            "another layout or only in part: convert it, or take a complete one"
        )
    return model


def _from_pretrained(
    cls: Any, source: str, subfolder: str | None, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    def load(**more: str) -> Any:
        return cls.from_pretrained(
            source, subfolder=subfolder, use_safetensors=True, torch_dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True, **options, **more,
        )  # fmt: skip

    with _quiet_diffusers():
        try:
            found: tuple[Any, dict[str, Any]] = load()
        except OSError:
            if Path(source).exists():
                raise
            found = load(variant="fp16")  # on the hub: what its folder holds is seen only now
    return found


@contextlib.contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Without warnings: what is wrong with weights is told in one line.

    diffusers still gives the hub's client an argument that newer ones warn about.
    """
    from diffusers.utils import logging as diffusers_logging

    before = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
            yield
    finally:
        diffusers_logging.set_verbosity(before)


def _misfits(info: Mapping[str, Any]) -> list[str]:
    shapes = [
        f"{key} {tuple(there)} instead of {tuple(wanted)}"
        for key, there, wanted in info["mismatched_keys"]
    ]
    kinds = {
        "missing": info["missing_keys"],
        "unknown": info["unexpected_keys"],
        "of another shape": shapes,
    }
    return [f"{_some(names)} {kind}" for kind, names in kinds.items() if names]


def _some(names: Iterable[str]) -> str:
    """A few names, and how many more."""
    names = sorted(names)
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _common_prefix(names: Iterable[str]) -> str:
    """The wrappers' prefix that all names have; empty without one."""
    names, prefix = list(names), ""
    while names and (
        more := [p for p in _PREFIXES if all(n.startswith(prefix + p) for n in names)]
    ):
        prefix += more[0]
    return prefix


def _write_without_prefix(place: _Place, cls: Any, prefix: str, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights: dict[str, torch.Tensor] = {}
    for file in _weight_files(place):
        weights |= {key.removeprefix(prefix): value for key, value in load_file(file).items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(_read_config(place)), encoding="utf-8")


def _weight_files(place: _Place) -> list[Path]:
    if Path(place.source).exists():
        folder = Path(place.source, place.subfolder or ".")
    else:
        from huggingface_hub import snapshot_download

        inside = f"{place.subfolder}/" if place.subfolder else ""
        options = {**place.options, "allow_patterns": f"{inside}{_WEIGHTS}*"}
        folder = Path(snapshot_download(place.source, **options), place.subfolder or ".")
    variant = f".{place.options['variant']}" if "variant" in place.options else ""
    index = folder / f"{_WEIGHTS}.safetensors.index{variant}.json"
    if not index.exists():
        return [folder / f"{_WEIGHTS}{variant}.safetensors"]
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / Path(name).name for name in sorted(names)]
