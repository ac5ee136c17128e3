"""Checkpoints: everything that training needs, written whole or not at all.

`checkpoints/step-000123/` holds

    first_stage.safetensors   the weights being trained
    ema/                      their moving average, as a diffusers folder
    critic.safetensors        when there is a critic
    bottleneck.safetensors    what the bottleneck has learned, and bottleneck_ema its average
    original.safetensors      the encoder it began from, where loss.original holds latents to it
    critic_ema.safetensors    its average, when the learned distance is measured in it
    optimizers.safetensors    AdamW's moments of both players
    means.safetensors         what the objective's balance and the log have averaged so far
    state.json                step, counters, configuration, versions
    checksums.json            SHA-256 of every other file; a checkpoint without it is not one

Order, crops, flips and noise are functions of the seed, so there is no generator state to keep.
"""

import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from first_stage.errors import UserError
from first_stage.files import remove_folder, remove_leftovers, sha256, write_folder, write_json

_NAME = re.compile(r"step-(\d{6,})")
_GROUP = "/"


class DamagedCheckpoint(UserError):
    """A checkpoint that fails its checksums."""


@dataclass
class Snapshot:
    """The contents of a checkpoint.

    Attributes:
        step: Steps done.
        tensors: File name (without suffix) to the tensors in it.
        state: What is not a tensor; JSON.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output_dir / "checkpoints" / f"step-{step:06d}"


def save_checkpoint(
    output_dir: Path,
    snapshot: Snapshot,
    averaged: Callable[[], AbstractContextManager[Any]],
    keep: int,
) -> Path:
    """Write a checkpoint, then drop the oldest beyond `keep`.

    Args:
        output_dir: The run's folder.
        snapshot: What to write.
        averaged: Opens a context that gives a diffusers model with the averaged weights. It may
            put them in the place of the weights being trained, to which the snapshot's tensors
            refer, so those are written before.
        keep: How many of the newest checkpoints stay, at least 1.

    Returns:
        The checkpoint's folder.
    """
    target = checkpoint_folder(output_dir, snapshot.step)

    def write(folder: Path) -> None:
        for name, tensors in snapshot.tensors.items():
            contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            save_file(contiguous, folder / f"{name}.safetensors")
        with averaged() as ema:
            ema.save_pretrained(folder / "ema", safe_serialization=True)
        (folder / "state.json").write_text(
            json.dumps({"step": snapshot.step, **snapshot.state}, indent=2) + "\n"
        )
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        sums = {f.relative_to(folder).as_posix(): sha256(f) for f in files}
        write_json(folder / "checksums.json", sums)

    write_folder(target, write)
    for _, old in list_checkpoints(output_dir)[:-keep]:
        if old != target:
            remove_folder(old)
    return target


def set_aside(output_dir: Path, step: int) -> list[Path]:
    """Rename the checkpoints beyond a step, which a run that goes on from there leaves behind.

    They are damaged, or of a future that will be trained anew: `--resume latest` must not find
    them, and they must not count among those to keep. Nothing is deleted.

    Returns:
        Where they lie now.
    """
    moved = []
    for number, folder in list_checkpoints(output_dir):
        if number > step:
            place, count = folder.with_name(f"set-aside-{folder.name}"), 1
            while place.exists():
                count += 1
                place = folder.with_name(f"set-aside-{folder.name}-{count}")
            folder.rename(place)
            moved.append(place)
    return moved


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the checkpoints of a run, oldest first; damaged ones included."""
    folder = output_dir / "checkpoints"
    found = []
    if folder.is_dir():
        for entry in folder.iterdir():
            match = _NAME.fullmatch(entry.name)
            if match and entry.is_dir():
                found.append((int(match[1]), entry))
    return sorted(found)


def load_checkpoint(folder: Path) -> Snapshot:
    """Read a checkpoint after checking every file.

    Raises:
        DamagedCheckpoint: Naming the file that is missing or altered.
        UserError: When the folder is no checkpoint.
    """
    verify_checkpoint(folder)
    return read_checkpoint(folder)


def verify_checkpoint(folder: Path) -> None:
    """Compare every file of a checkpoint with its checksum: one process does it for all.

    Raises:
        DamagedCheckpoint: Naming the file that is missing or altered.
        UserError: When the folder is no checkpoint.
    """
    for name, expected in _checksums(folder).items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise DamagedCheckpoint(f"checkpoint {folder}: checksums.json names {name}")
        if not file.is_file():
            raise DamagedCheckpoint(f"checkpoint {folder} lacks {name}")
        try:
            found = sha256(file)
        except OSError as error:
            raise DamagedCheckpoint(f"checkpoint {folder}: {name} cannot be read") from error
        if found != expected:
            raise DamagedCheckpoint(f"checkpoint {folder}: {name} differs from its checksum")


def read_checkpoint(folder: Path) -> Snapshot:
    """Read a checkpoint that `verify_checkpoint` has passed.

    Raises:
        DamagedCheckpoint: When it is not the same on this machine.
        UserError: When it is not there.
    """
    sums = _checksums(folder)
    try:
        state = json.loads((folder / "state.json").read_text())
        tensors = {
            Path(name).stem: load_file(folder / name)
            for name in sums
            if name.endswith(".safetensors") and "/" not in name
        }
    except (OSError, ValueError, SafetensorError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder} cannot be read: {error}") from error
    return Snapshot(state.pop("step"), tensors, state)


def _checksums(folder: Path) -> dict[str, str]:
    if not folder.is_dir():
        raise UserError(
            f"there is no checkpoint {str(folder)!r}: name a folder such as "
            "runs/mine/checkpoints/step-000123"
        )
    try:
        sums: dict[str, str] = json.loads((folder / "checksums.json").read_text())
    except FileNotFoundError as error:
        if _NAME.fullmatch(folder.name):
            raise DamagedCheckpoint(f"checkpoint {folder} lacks checksums.json") from error
        raise UserError(
            f"{str(folder)!r} is not a checkpoint: it has no checksums.json. Name a folder such as "
            "checkpoints/step-000123, or latest"
        ) from error
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"checkpoint {folder}: checksums.json cannot be read") from error
    if "state.json" not in sums:
        raise DamagedCheckpoint(f"checkpoint {folder} lacks state.json")
    return sums


def find_checkpoint(output_dir: Path, resume: str) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from.

    Args:
        output_dir: The run's folder.
        resume: `latest`, or a checkpoint's folder.

    Returns:
        Its folder, verified, or `None` when `latest` finds no checkpoint yet; and remarks for the
        user, such as which damaged checkpoint was passed over.

    Raises:
        UserError: When the named checkpoint is not one, or every checkpoint is damaged.
    """
    if resume != "latest":
        verify_checkpoint(Path(resume))
        return Path(resume), []
    remove_leftovers(output_dir / "checkpoints")
    remarks = []
    checkpoints = list_checkpoints(output_dir)
    for _, folder in reversed(checkpoints):
        try:
            verify_checkpoint(folder)
        except DamagedCheckpoint as error:
            remarks.append(f"{error}; falling back to the one before it")
            continue
        return folder, remarks
    if checkpoints:
        raise UserError(
            f"every checkpoint in {output_dir / 'checkpoints'} is damaged: {remarks[0]}"
        )
    return None, remarks


def flatten_optimizer(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimizer's state as named tensors. Its hyperparameters come from the configuration."""
    flat = {}
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            flat[_GROUP.join((prefix, str(index), name))] = torch.as_tensor(value)
    return flat


def restore_optimizer(
    optimizer: torch.optim.Optimizer, flat: Mapping[str, Tensor], prefix: str
) -> None:
    """Take back what `flatten_optimizer` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        owner, index, name = key.split(_GROUP)
        if owner == prefix:
            state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # Files hold plain row-major tensors. The fused AdamW walks a parameter and its moments through
    # memory side by side, so they must lie alike; with other strides it would mix them up silently.
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if value.shape == parameter.shape:
                entries[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
