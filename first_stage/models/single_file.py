"""A first stage in one file: a bare one, or inside a whole checkpoint of a diffusion model.

Safetensors, of which only the first stage's weights are read, or a `.ckpt`, `.pth`, `.pt` or `.bin`
that holds nothing but tensors. Nothing is asked of a hub: the layout is read off the shapes.
"""

import json
import logging
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from first_stage.errors import UserError, first_line
from first_stage.models import ldm_keys
from first_stage.models.layouts import config_of, known_program, scale_remark

_PICKLED = (".ckpt", ".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *_PICKLED)
"""What a single file's name ends in."""
METADATA = "first_stage"
"""Entry of our safetensors' header: what shapes do not say, as JSON."""
PREFIXES = ("first_stage_model.", "vae.", "")
"""What stands before a first stage's names in a whole checkpoint, or nothing; any other prefix is
found too, where it is the only one."""
_WRAPPERS = ("_orig_mod.", "module.")
_PARTS = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv|quantize|bn)\.")
_LATENT_DIFFUSION = re.compile(r"(encoder\.(down|conv_in|down_blocks)|decoder\.(up|up_blocks))\.")
_FIRST = re.compile(r"(.*\.)encoder\.(conv_in|layers\.0)\.weight")
_TRAINING_ONLY = re.compile(r"(loss|model_ema|discriminator|perceptual_loss)\.|.*num_batches_track")
_LORA = re.compile(r".*(lora_up|lora_down|lora_A|lora_B|lora\.up|hada_w1|\.lokr_)")
_OTHERS = (
    (_LORA.pattern, "a LoRA: it changes a model"),
    (r"(control_model\.|controlnet_|input_hint_block\.)", "a ControlNet"),
    (r"(image_proj\.|ip_adapter\.)", "an IP-Adapter"),
    (r"(vision_model|visual_projection)\.", "an image encoder"),
    (r"(.*text_model\.encoder\.|.*transformer\.resblocks\.|encoder\.block\.0\.layer\.|"
     r"shared\.weight|(.*\.)?layers\.0\.self_attn|enc\.blk\.0\.attn)", "a text encoder"),
    (r"(encoder\.downsamples|decoder\.upsamples|decoder\.middle|encoder\.middle)\.",
     "a video autoencoder (Wan, Qwen-Image) in its own layout: take its diffusers folder"),
    (r"(encoder\.project_in|decoder\.project_out)\.",
     "a DC-AE in its own layout: take its diffusers folder"),
    (r".*(diffusion_model\.|input_blocks\.|double_blocks\.|joint_blocks\.|transformer_blocks\.|"
     r"time_embedding\.)", "a diffusion model without its first stage"),
    (r"blocks\.0\.(self_attn|attn)\.", "a diffusion model without its first stage"),
    (r"(string_to_param|emb_params|clip_[lg]$)", "a textual inversion"),
    (r"(RRDB_trunk|body\.0\.rdb1|model\.0\.weight)", "an upscaler"),
    (r"\d+\.conv\.0\.weight$", "half of a TAESD: it takes a file of both, or its diffusers folder"),
)  # fmt: skip
_LONGEST_HEADER = 100_000_000
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contents:
    """What a file holds of a first stage.

    Attributes:
        weights: By the file's own names, without the prefix.
        prefix: That it had there.
        others: Names of everything else in the file.
        metadata: What one of our exports says beside the shapes.
    """

    weights: dict[str, Tensor]
    prefix: str
    others: list[str]
    metadata: dict[str, Any]


def is_single_file(path: Path) -> bool:
    """Whether a path is a file that could hold a first stage."""
    return path.is_file()


def load_single_file(path: Path, problem: Callable[[str], UserError]) -> tuple[Any, str]:
    """Load a first stage from one file, as the diffusers class whose weights have these shapes.

    Args:
        path: The file.
        problem: Makes a message of what is wrong with it.

    Returns:
        The model, float32, and a remark on what the file leaves open; empty when it leaves nothing.

    Raises:
        UserError: In one line that says what the file is instead.
    """
    import diffusers

    found = read_contents(path, problem)
    weights = to_diffusers_names(found.weights)
    _refuse_kinds(weights, problem)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    try:
        config = config_of(shapes, found.metadata.get("norm_num_groups"))
    except KeyError as error:
        raise problem(
            f"holds only a part of a first stage: it has no {error.args[0]!r} among its "
            f"{len(shapes):,} weights"
        ) from error
    except ValueError as error:
        raise problem(f"cannot be read: {error}") from error
    cls = getattr(diffusers, config["_class_name"])
    remark = _settle_scale(config, found)
    arguments = {key: value for key, value in config.items() if key != "_class_name"}
    with torch.device("meta"):
        model = cls(**arguments)
    wanted = model.state_dict()
    if "bn.num_batches_tracked" in wanted:
        weights.setdefault("bn.num_batches_tracked", torch.zeros((), dtype=torch.int64))
    _refuse_misfits({name: tuple(v.shape) for name, v in wanted.items()}, weights, problem)
    for name, value in weights.items():
        # Of their own memory: else a slice would hold, and save, what it was cut from.
        weights[name] = value.to(wanted[name].dtype).clone(memory_format=torch.contiguous_format)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(True), remark


def read_contents(path: Path, problem: Callable[[str], UserError]) -> Contents:
    """The first stage's weights in a file, whatever its prefix.

    Raises:
        UserError: When it has none, saying what it holds.
    """
    reader = _pickled if _is_pickled(path, problem) else _safetensors
    names, read, metadata = reader(path, problem)
    prefix = _prefix(names, problem)
    if prefix is None or any(_LORA.match(name) for name in names):
        raise problem(f"is {_what_it_is(names)}, not a first stage")
    inside = [name for name in names if _is_ours(name, prefix)]
    others = [name for name in names if not _is_ours(name, prefix)]
    if prefix == "":
        left = [name for name in others if not _TRAINING_ONLY.match(name)]
        if left and len(left) > len(inside):
            raise problem(f"is {_what_it_is(names)}, not a first stage")
    weights = {name.removeprefix(prefix): value for name, value in read(inside).items()}
    return Contents(weights, prefix, others, metadata)


def _is_ours(name: str, prefix: str) -> bool:
    if not name.startswith(prefix):
        return False
    rest = name.removeprefix(prefix)
    return bool(_PARTS.match(rest) or rest.startswith(("taesd_encoder.", "taesd_decoder.")))


def _prefix(names: Iterable[str], problem: Callable[[str], UserError]) -> str | None:
    """What stands before the first stage's weights; `None` when there are none.

    Raises:
        UserError: When there are several, and nothing says which is meant.
    """
    names = list(names)
    wrappers = ["", *_WRAPPERS, "".join(reversed(_WRAPPERS))]
    for prefix in (outer + inner for inner in PREFIXES for outer in wrappers):
        rests = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if any(_LATENT_DIFFUSION.match(r) for r in rests) or ldm_keys.is_tiny(rests):
            return prefix
    found = sorted({match[1] for name in names if (match := _FIRST.fullmatch(name))})
    if len(found) > 1:
        raise problem(
            f"holds {len(found)} first stages, under {', '.join(found)}: save the one that is "
            "meant in a file of its own"
        )
    return found[0] if found else None


def _what_it_is(names: Iterable[str]) -> str:
    names = list(names)
    for pattern, kind in _OTHERS:
        if any(re.match(pattern, name) for name in names):
            return kind
    shown = ", ".join(names[:3])
    return (
        f"a file of {len(names):,} other weights ({shown})" if names else "a file without weights"
    )


def to_diffusers_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's weights, in their order, under the names of the diffusers class.

    Args:
        weights: Without a prefix, by any of the names that are read here.
    """
    if ldm_keys.is_tiny(weights):
        return ldm_keys.tiny_to_diffusers(weights)
    if any(name.startswith("encoder.layers.") for name in weights):
        return dict(weights)
    return ldm_keys.to_diffusers(weights)


def _settle_scale(config: dict[str, Any], found: Contents) -> str:
    """Put scaling and shift into a config, as far as the file says them; what stays open."""
    known = {key: value for key, value in found.metadata.items() if key in config}
    config |= known
    if "scaling_factor" in found.metadata or "scaling_factor" not in config:
        return ""
    program = known_program(found.others)
    if program is not None and config["_class_name"] == "AutoencoderKL":
        name, (scaling, shift) = program
        config |= {"scaling_factor": scaling, "shift_factor": shift}
        shown = f" and shift_factor {shift}" if shift is not None else ""
        return f"the checkpoint is {name}'s: scaling_factor {scaling}{shown}"
    return scale_remark(config) or ""


def _refuse_kinds(weights: Mapping[str, Tensor], problem: Callable[[str], UserError]) -> None:
    """Refuse weights that no first stage of images has, whatever their names."""
    for name, value in weights.items():
        if value.ndim == 5:
            raise problem(
                f"is a video autoencoder ({name} is {tuple(value.shape)}) in its own layout, not a "
                "first stage of images: take its diffusers folder"
            )
        if value.ndim > 0 and not value.is_floating_point():
            raise problem(
                f"is quantized: {name} is {str(value.dtype).removeprefix('torch.')}. Take the file "
                "in float16, bfloat16 or float32"
            )


def _refuse_misfits(
    wanted: Mapping[str, tuple[int, ...]],
    weights: Mapping[str, Tensor],
    problem: Callable[[str], UserError],
) -> None:
    missing = sorted(wanted.keys() - weights.keys())
    unknown = sorted(weights.keys() - wanted.keys())
    shapes = [
        f"{name} {tuple(weights[name].shape)} instead of {wanted[name]}"
        for name in sorted(wanted.keys() & weights.keys())
        if tuple(weights[name].shape) != wanted[name]
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    told = [
        ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
        + f" {kind}"
        for kind, names in kinds.items() if names
    ]  # fmt: skip
    if told:
        raise problem(
            f"has weights of another layout than those this reads: {'; '.join(told)}. It is a "
            "variant of its own, or saved only in part"
        )


# -- reading -------------------------------------------------------------------------------------

_Read = tuple[list[str], Callable[[Iterable[str]], dict[str, Tensor]], dict[str, Any]]


def _is_pickled(path: Path, problem: Callable[[str], UserError]) -> bool:
    """How a file is to be read, by its first bytes, whatever its name ends in.

    Raises:
        UserError: When it is neither of the two kinds.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < _LONGEST_HEADER:
        return False  # safetensors, also where the length looks like another kind's first letters
    if start.startswith(b"GGUF"):
        raise problem("is a GGUF file: take the first stage as .safetensors")
    if start.lstrip()[:1] in (b"<", b"{", b"[") or start.startswith(b"version"):
        if path.suffix.lower() == ".json":
            raise problem("describes a first stage: name the folder that it lies in")
        raise problem(
            "is a web page or a pointer to the file, not the file itself: download it again"
        )
    named = path.suffix.lower() in _PICKLED
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        if named:
            cut = "is truncated: it has no more than its beginning" if len(start) < 9 else ""
            raise problem(cut or "is no file of weights: it holds neither tensors nor a pickle")
        return False  # what is wrong with it is said where it is read
    if not named:
        kind = path.suffix or "nothing that says so"
        raise problem(f"is named {kind} but holds pickled objects: it is not opened")
    if start.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise problem("is truncated: its archive has no end; download it again")
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise problem("is a TorchScript program, not weights: it is not run")
    return True


def _safetensors(path: Path, problem: Callable[[str], UserError]) -> _Read:
    try:
        with safe_open(path, framework="pt") as file:
            names, metadata = list(file.keys()), dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise problem(_why_unreadable(path, error)) from error

    def read(wanted: Iterable[str]) -> dict[str, Tensor]:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in wanted}

    try:
        ours = json.loads(metadata.get(METADATA, "{}"))
    except ValueError:
        ours = {}
    return names, read, ours if isinstance(ours, dict) else {}


def _why_unreadable(path: Path, error: Exception) -> str:
    """What is wrong with a safetensors file, by its header."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if len(start) == 8 and (length := struct.unpack("<Q", start)[0]) <= size - 8:
            try:
                header = json.loads(file.read(length))
                ends = [e["data_offsets"][1] for k, e in header.items() if k != "__metadata__"]
                if (whole := 8 + length + max(ends, default=0)) > size:
                    return f"is truncated: {size:,} of {whole:,} bytes are there; download it again"
            except (ValueError, KeyError, TypeError, AttributeError):
                pass
        elif size < 8 or (length := struct.unpack("<Q", start)[0]) < _LONGEST_HEADER:
            return f"is truncated: its {size:,} bytes end within its header; download it again"
    return f"is no safetensors file: {first_line(error)}"


def _pickled(path: Path, problem: Callable[[str], UserError]) -> _Read:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=None)
    except pickle.UnpicklingError as error:
        raise problem(
            "holds code or objects beside tensors, which could run anything, so it is not opened: "
            "take its .safetensors, or convert it where you trust it"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise problem(f"is truncated or no file of weights: {first_line(error)}") from error
    while isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise problem("holds no weights by name")
    tensors = dict(_by_name(loaded))
    return list(tensors), lambda wanted: {name: tensors[name] for name in wanted}, {}


def _by_name(loaded: Mapping[Any, Any], before: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dictionaries; the names of those they lie in stand before theirs."""
    for key, value in loaded.items():
        if isinstance(value, Tensor):
            yield f"{before}{key}", value
        elif isinstance(value, Mapping):
            yield from _by_name(value, f"{before}{key}.")
