"""Loading first stages: any diffusers autoencoder, with every weight in its place.

`from_pretrained` only logs the weights that it found no place for, and leaves those that it found
none for without values; here both are refused by name.
"""

import contextlib
import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from first_stage.errors import UserError, first_line, root_cause
from first_stage.files import standing
from first_stage.models.families import FAMILIES
from first_stage.models.padding import padding_of, set_padding
from first_stage.models.places import WEIGHTS, Place, find, is_of_a_folder, read_config
from first_stage.models.quiet import quiet_diffusers
from first_stage.models.single_file import SUFFIXES, is_single_file, load_single_file

STATISTICS_FILE = "latent_statistics.json"
"""Beside the config of one of our exports: what was measured of its latents."""
_PREFIXES = ("_orig_mod.", "module.")
"""What `torch.compile` and data-parallel wrappers put before every weight's name."""
_SHOWN = 3
_LOG = logging.getLogger(__name__)


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
            when its weights are not finite, or not those that its `config.json` asks for.
    """
    try:
        file = standing(Path(name))
        if is_single_file(file) and not is_of_a_folder(file):
            place = Place(name, field, str(file), None, {})
            model, remark = load_single_file(file, place.problem)
            if remark:
                _LOG.warning("%s %r: %s", field, name, remark)
        else:
            place = find(str(file.parent) if file.is_file() else name, revision, field)
            model = _load(place, _class_of(read_config(place), place))
    except UserError:
        raise
    except Exception as error:
        raise place.problem(f"cannot be loaded: {_why(error)}") from error
    _refuse_damage(model, place)
    # It would go out with every export; it is a folder of this machine.
    from diffusers.configuration_utils import FrozenDict

    model._internal_dict = FrozenDict(
        {key: value for key, value in model.config.items() if key != "_name_or_path"}
    )
    try:
        if padding_of(model) == "reflect":
            set_padding(model, "reflect")
    except UserError as error:
        raise place.problem(f"cannot be loaded: {error}") from error
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
    cuts large images into; in other folders, and of single files, `sample_size` is all there is.

    Args:
        name: The folder or hub id that it was loaded from.
        autoencoder: What `load_autoencoder` made of it.
        revision: The hub revision.

    Raises:
        UserError: When the first stage is not there, or the hub gives no answer.
    """
    if is_single_file(file := standing(Path(name))):
        file = file.parent / STATISTICS_FILE if is_of_a_folder(file) else Path()
    else:
        file = _statistics(find(name, revision, "first_stage"))
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(file.read_text(encoding="utf-8")).get("resolution")
        if isinstance(found, int) and found > 0:
            return found
    side = autoencoder.config.get("sample_size")
    return side if isinstance(side, int) and side > 0 else None


def _statistics(place: Place) -> Path:
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


def _class_of(config: Mapping[str, Any], place: Place) -> Any:
    import diffusers

    others = config.get("architectures") or [""]  # as transformers has it
    class_name = str(config.get("_class_name", others[0]))
    registered = {family.model_class.__name__: family.model_class for family in FAMILIES.values()}
    cls = registered.get(class_name) or getattr(diffusers, class_name, None)
    if cls is None and "_diffusers_version" in config and "utoencoder" in class_name:
        raise place.problem(
            f"is of the class {class_name}, which diffusers {config['_diffusers_version']} wrote "
            f"and diffusers {diffusers.__version__} here does not have: pip install -U diffusers"
        )
    if cls is None or not (hasattr(cls, "encode") and hasattr(cls, "decode")):
        raise place.problem(
            f"is not an autoencoder: its config.json names the class {class_name!r}, which has no "
            "encode and decode in diffusers"
        )
    return cls


# -- weights -------------------------------------------------------------------------------------


def _load(place: Place, cls: Any) -> Any:
    """The model, once every weight fits; names with a wrapper's prefix are read without it."""
    lies = Path(place.source, place.subfolder or ".")
    if lies.is_dir() and not any(lies.glob("*.safetensors*")):
        pickled = sorted(file.name for file in lies.iterdir() if file.suffix in SUFFIXES)
        raise place.problem(
            "has no weights as .safetensors"
            + (f", only {pickled[0]}: name that file itself, or convert it" if pickled else "")
        )
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


def _why(error: BaseException) -> str:
    """What went wrong: `diffusers` says of damaged weights that it is unable to load them."""
    cause = root_cause(error)
    if isinstance(cause, SafetensorError):
        damage = first_line(cause)
        return f"its weights are damaged or cut short ({damage}): copy or download them again"
    return first_line(error)


def _refuse_damage(model: nn.Module, place: Place) -> None:
    damaged = [name for name, value in model.state_dict().items() if not value.isfinite().all()]
    if damaged:
        raise place.problem(
            f"has weights with NaN or infinite values: {_some(damaged)}. They come from a "
            "training that diverged, or the file is damaged: take another one"
        )


def _from_pretrained(
    cls: Any, source: str, subfolder: str | None, options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    def load(**more: str) -> Any:
        return cls.from_pretrained(
            source, subfolder=subfolder, use_safetensors=True, torch_dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True, **options, **more,
        )  # fmt: skip

    with quiet_diffusers():
        try:
            found: tuple[Any, dict[str, Any]] = load()
        except OSError:
            if Path(source).exists():
                raise
            found = load(variant="fp16")  # on the hub: what its folder holds is seen only now
    return found


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


def _write_without_prefix(place: Place, cls: Any, prefix: str, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights: dict[str, torch.Tensor] = {}
    for file in _weight_files(place):
        weights |= {key.removeprefix(prefix): value for key, value in load_file(file).items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(read_config(place)), encoding="utf-8")


def _weight_files(place: Place) -> list[Path]:
    if Path(place.source).exists():
        folder = Path(place.source, place.subfolder or ".")
    else:
        from huggingface_hub import snapshot_download

        inside = f"{place.subfolder}/" if place.subfolder else ""
        options = {**place.options, "allow_patterns": f"{inside}{WEIGHTS}*"}
        folder = Path(snapshot_download(place.source, **options), place.subfolder or ".")
    variant = f".{place.options['variant']}" if "variant" in place.options else ""
    index = folder / f"{WEIGHTS}.safetensors.index{variant}.json"
    if not index.exists():
        return [folder / f"{WEIGHTS}{variant}.safetensors"]
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [folder / Path(name).name for name in sorted(names)]
