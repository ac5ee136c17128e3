"""Which fields of a configuration may differ from those that a checkpoint was trained with."""

import json
from collections.abc import Mapping
from typing import Any

from first_stage.errors import ConfigError

MAY_CHANGE = (
    "output_dir",
    "overwrite",
    "resume",
    # The samples are compared by their fingerprint, wherever they lie now.
    "data.path",
    "data.validation_path",
    "data.workers",
    "data.max_broken",
    "model.gradient_checkpointing",
    "critic.learning_rate",
    "train.max_steps",
    "train.micro_batch_size",
    "train.learning_rate",
    "train.weight_decay",
    "train.warmup_steps",
    "train.decay_steps",
    "train.final_rate",
    "train.clip_norm",
    "train.precision",
    "train.ema_decay",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.tracker",
    "train.process_timeout",
    "validation",
    "export",
)
"""Fields, and groups of fields, that a run may go on with at another value. Everything else says
what is trained on what: with another value the result would be neither the one run nor the other.
"""
_SILENT = ("output_dir", "overwrite", "resume")
_ABSENT = object()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that differ between two configurations.

    Args:
        before: Nested, as `to_dict` gives it, or read back from JSON.
        now: The same.

    Returns:
        Dotted name to the two values, for the fields that `now` has. A group of fields that is null
        on one side differs in the fields of the other side.
    """
    old, new = _flat(before), _flat(now)
    changed = {}
    for name, value in new.items():
        known = _find(old, name)
        if known is not _ABSENT and known != value:
            changed[name] = (known, value)
    return changed


def check_resumable(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any], checkpoint: str
) -> str:
    """Compare the configuration of a checkpoint with that of the run that goes on.

    Args:
        before: The checkpoint's, nested.
        now: The run's, nested.
        defaults: Of all fields, nested: what a field had that an older checkpoint does not know.
        checkpoint: Where it lies, for the message.

    Returns:
        What has changed and may change, one line per field; empty when nothing has.

    Raises:
        ConfigError: Naming the fields that may not change.
    """
    changed = differences(_filled(before, defaults), now)
    refused = {name: values for name, values in changed.items() if not _may_change(name)}
    if refused:
        raise ConfigError(
            f"the checkpoint {checkpoint} was trained with other values of "
            f"{', '.join(_line(*entry) for entry in refused.items())}: put them back, or begin a "
            f"new run in another output_dir (--model.pretrained {checkpoint}/ema starts it from "
            "these weights)"
        )
    return "\n".join(
        f"  {_line(name, values)}" for name, values in changed.items() if name not in _SILENT
    )


def _may_change(name: str) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in MAY_CHANGE)


def _line(name: str, values: tuple[Any, Any]) -> str:
    return f"{name} ({json.dumps(values[0])} -> {json.dumps(values[1])})"


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, and the defaults where they have none."""
    filled = dict(values)
    for name, default in defaults.items():
        if name not in filled:
            filled[name] = default
        elif isinstance(default, Mapping) and isinstance(filled[name], Mapping):
            filled[name] = _filled(filled[name], default)
    return filled


def _find(flat: Mapping[str, Any], name: str) -> Any:
    if name in flat:
        return flat[name]
    if any(other.startswith(f"{name}.") for other in flat):
        return "..."
    parents = [name[:place] for place, letter in enumerate(name) if letter == "."]
    return next((flat[p] for p in parents if p in flat), _ABSENT)


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names to values, tuples as lists."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
