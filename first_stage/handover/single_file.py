"""A first stage as one file for the programs people draw with, or put into a copy of a checkpoint.

The file has latent diffusion's names. What shapes do not say stands in its header, where other
programs do not look.
"""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from first_stage.errors import UserError
from first_stage.files import write_atomic
from first_stage.models import ldm_keys
from first_stage.models.layouts import CLASSES
from first_stage.models.padding import padding_of
from first_stage.models.single_file import (
    METADATA,
    load_single_file,
    read_contents,
    to_diffusers_names,
)

_SAID = ("norm_num_groups", "scaling_factor", "shift_factor", "sample_size", "force_upcast")
_TYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_ORDINARY = ((128, 256, 512, 512), (128, 256, 512))


def ldm_weights(model: Any) -> dict[str, Tensor]:
    """A model's weights under latent diffusion's names, on the CPU.

    Raises:
        UserError: When its class has no such names, or its decoder pads by reflection.
    """
    name = type(model).__name__
    _refuse_reflection(model, "--layout ldm")
    if name not in CLASSES or model.config.get("norm_type", "group") != "group":
        raise UserError(
            f"--layout ldm: {name} has no layout in latent diffusion's names (those that have are "
            f"{', '.join(CLASSES)}): use --layout diffusers"
        )
    rename = ldm_keys.tiny_to_ldm if name == "AutoencoderTiny" else ldm_keys.to_ldm
    return {key: value.detach().cpu().contiguous() for key, value in
            rename(model.state_dict()).items()}  # fmt: skip


def write_single_file(model: Any, path: Path) -> None:
    """Write one `.safetensors`, read it back, and compare every bit.

    Args:
        model: An autoencoder of `layouts.CLASSES`, in the type that is to be written.
        path: The file.

    Raises:
        UserError: When the layout cannot be written or is not what comes back.
    """
    said = {key: model.config[key] for key in _SAID if key in model.config}
    header = {"format": "pt", METADATA: json.dumps(said)}

    def write(temporary: Path) -> None:
        save_file(ldm_weights(model), temporary, metadata=header)
        again, _ = load_single_file(temporary, lambda text: UserError(f"the file written {text}"))
        found = again.state_dict()
        for name, value in model.state_dict().items():
            if not torch.equal(found[name], value.detach().cpu().to(found[name].dtype)):
                raise UserError(f"the file written does not give {name} back; please report this")

    write_atomic(path, write)


def put_into(model: Any, checkpoint: Path, output: Path) -> tuple[int, str]:
    """Write a copy of a whole checkpoint with its first stage replaced; all other bytes stay.

    Args:
        model: The first stage.
        checkpoint: A `.safetensors` with a first stage of the same shapes.
        output: The copy.

    Returns:
        How many tensors were replaced, and the types that the checkpoint keeps them in.

    Raises:
        UserError: When the checkpoint has no first stage, or one of other shapes, or the decoder
            pads by reflection.
    """

    def problem(text: str) -> UserError:
        return UserError(f"--into {str(checkpoint)!r} {text}")

    _refuse_reflection(model, "--into")
    if not checkpoint.exists():
        raise problem("does not exist")
    if checkpoint.suffix != ".safetensors":
        raise problem("is no .safetensors, which alone can be copied byte by byte: convert it")
    found = read_contents(checkpoint, problem)
    ours, theirs = model.state_dict(), to_diffusers_names(found.weights)
    if missing := sorted(ours.keys() - theirs.keys() - {_COUNTER}):
        raise problem(f"has another first stage, which lacks {missing[0]!r}")
    for name, value in theirs.items():
        if name not in ours or ours[name].shape != value.shape:
            here = tuple(ours[name].shape) if name in ours else "missing"
            raise problem(
                f"has another first stage: {name!r} is {tuple(value.shape)} there and {here} here"
            )
    # Both in the file's order.
    names = [name for name in found.weights if not name.startswith("vae_s")]
    types: set[str] = set()

    def write(temporary: Path) -> None:
        shutil.copyfile(checkpoint, temporary)
        with temporary.open("r+b") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            for name, new in zip(names, theirs, strict=True):
                entry = header[found.prefix + name]
                types.add(entry["dtype"])
                file.seek(8 + length + entry["data_offsets"][0])
                file.write(_stored(ours[new], entry["dtype"], problem))

    write_atomic(output, write)
    return len(names), ", ".join(sorted(types))


def _refuse_reflection(model: Any, option: str) -> None:
    if padding_of(model) == "reflect":
        raise UserError(
            f"{option}: this decoder pads by reflection, which no such file says, so every program "
            "that reads it would decode with zeros, and worse: use --layout diffusers, or train it "
            "on with --model.decoder_padding zeros"
        )


def _stored(value: Tensor, kind: str, problem: Callable[[str], UserError]) -> bytes:
    """A tensor's bytes in a type of safetensors."""
    if kind not in _TYPES:
        raise problem(f"keeps its first stage as {kind}, which this does not write")
    found = value.detach().cpu().to(_TYPES[kind])
    if not bool(found.isfinite().all()):
        raise problem(f"keeps its first stage as {kind}, in which these weights overflow")
    return bytes(found.contiguous().flatten().view(torch.uint8).numpy())


_COUNTER = "bn.num_batches_tracked"


def programs(model: Any) -> str:
    """Which programs take this layout as a single file, and why others do not.

    By the sizes that their sources fix (ComfyUI `comfy/sd.py` at 033046c; A1111, Forge and kohya
    build Stable Diffusion's own first stage).
    """
    config, name = model.config, type(model).__name__
    if padding_of(model) == "reflect":
        return "none: they decode with zeros at the border, and this decoder pads by reflection"
    if name == "AutoencoderTiny":
        if config.in_channels != 3 or config.latent_channels not in (4, 16):
            return f"none: {config.in_channels} image and {config.latent_channels} latent channels"
        return "ComfyUI (its names taesd_encoder. and taesd_decoder.); not A1111, Forge, kohya"
    if name == "AutoencoderKLFlux2":
        return "ComfyUI (by its batch-norm statistics); not A1111, Forge, kohya: they have no Flux2"
    if name != "AutoencoderKL":
        return f"none of ComfyUI, A1111, Forge, kohya: they build no {name}"
    reasons = []
    if tuple(config.block_out_channels) not in _ORDINARY:
        reasons.append(f"widths {list(config.block_out_channels)}, not {list(_ORDINARY[0])}")
    if config.layers_per_block != 2:
        reasons.append(f"{config.layers_per_block} residual blocks per level, not 2")
    if (config.in_channels, config.out_channels) != (3, 3):
        reasons.append(f"{config.in_channels} image channels, not 3")
    if not config.get("mid_block_add_attention", True):
        reasons.append("no attention in its middle")
    if config.norm_num_groups != 32:
        reasons.append(f"{config.norm_num_groups} groups per norm, not 32")
    if any(kind.startswith("Attn") for kind in config.down_block_types):
        reasons.append("attention in its levels")
    if reasons:
        return f"none of ComfyUI, A1111, Forge, kohya: {'; '.join(reasons)}"
    others = []
    if len(config.block_out_channels) != 4:
        others.append("f4, not f8")
    if config.latent_channels != 4:
        others.append(f"{config.latent_channels} latent channels, not 4")
    if not config.get("use_quant_conv", True):
        others.append("no 1x1 convolutions around the latents")
    if others:
        return f"ComfyUI; not A1111, Forge, kohya's --vae: {', '.join(others)}"
    return "ComfyUI, A1111, Forge, kohya's --vae"
