"""Going on with a run: what its configuration and data may differ in from the checkpoint's."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from first_stage.config.parsing import to_dict
from first_stage.config.schema import Config
from first_stage.config.sections import with_sections
from first_stage.config.types import changeable, mappings
from first_stage.data import Source, earlier_fingerprint
from first_stage.distributed.processes import Processes, on_main
from first_stage.errors import ConfigError, DataError, UserError
from first_stage.models.families import LAYOUT
from first_stage.models.loading import fingerprint_weights
from first_stage.training.checkpoint import Snapshot, find_checkpoint
from first_stage.training.players import make_first_stage

MAY_CHANGE = tuple(changeable(Config))
"""Fields, and sections, that a run may go on with at another value; the schema marks them."""
_SILENT = ("output_dir", "overwrite", "plan", "resume")
_ABSENT = object()
_ONCE = {"data": {"color": "keep"}}
"""What was done before a field existed, where that is not the field's default."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Fields that differ between two configurations.

    Args:
        before: Nested, as `to_dict` gives it, or read back from JSON.
        now: The same.

    Returns:
        Dotted name to the two values, for the fields that `now` has. A group of fields that is null
        on one side differs in the fields of the other side; a field that is a mapping itself, such
        as `loss.penalties`, is compared whole.
    """
    whole = frozenset(mappings(with_sections(Config)))
    old, new = _flat(before, whole), _flat(now, whole)
    changed = {}
    for name, value in new.items():
        known = _find(old, name)
        if known is not _ABSENT and known != value:
            changed[name] = (known, value)
    return changed


def find_start(config: Config, processes: Processes) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run goes on from: found and verified by one process for all.

    Args:
        config: The run's configuration.
        processes: All of them must call this.

    Returns:
        Its folder, or `None` for a run that begins; and remarks for the user.

    Raises:
        UserError: When the named checkpoint is not one, or every checkpoint is damaged.
    """
    if config.resume is None:
        return None, []
    folder, resume = Path(config.output_dir), str(config.resume)
    found: tuple[Path | None, list[str]] = (None, [])

    def find() -> None:
        nonlocal found
        found = find_checkpoint(folder, resume)
        if found[0] is None:
            found[1].append(f"no checkpoint in {folder} yet: starting at step 0")

    on_main(processes, find)
    return processes.gather(found)[0]  # type: ignore[no-any-return]


def as_saved(config: Config, checkpoint: Path | None) -> Config:
    """The configuration to build the networks from.

    A checkpoint holds all of a fine-tuned first stage, also its layout: what it once began from may
    be gone by now.
    """
    if checkpoint is None or config.model.pretrained is None:
        return config
    model = replace(config.model, pretrained=str(checkpoint / "ema"), more_latent_channels=0)
    return replace(config, model=model)


def lasting(config: Config) -> Config:
    """The configuration without what concerns only how one command began."""
    return replace(config, resume=None, overwrite=False, plan=False)


def recipe(config: Config) -> str:
    """The configuration as YAML that `--config` reads, ready to be resumed."""
    return yaml.safe_dump(_lists(to_dict(lasting(config))), sort_keys=False)


def check_resumable(
    config: Config, snapshot: Snapshot, *, checkpoint: str, fingerprint: str, source: Source
) -> str:
    """Whether a run is the one that a checkpoint belongs to.

    Args:
        config: The run's configuration.
        snapshot: The checkpoint's contents.
        checkpoint: Where it lies, for messages.
        fingerprint: Of the run's data.
        source: What there is to train on.

    Returns:
        What has changed and may change, one line per field; empty when nothing has.

    Raises:
        ConfigError: Naming the fields that may not change.
        DataError: When the data set is another one.
    """
    state = snapshot.state
    before, now = state["config"], to_dict(config)
    if config.model.pretrained is not None and before["model"]["pretrained"] is not None:
        _check_origin(config, before["model"]["pretrained"], state, checkpoint)
        # The layout is that of the weights, whatever the recipe says of it.
        same = {name: now["model"][name] for name in (*LAYOUT, "pretrained")}
        before = {**before, "model": {**before["model"], **same}}
    changes = changed_fields(before, now, _defaults(type(config)), checkpoint)
    known = state["data_fingerprint"]
    if known != fingerprint and known != earlier_fingerprint(source):
        raise DataError(
            f"the data set {config.data.path!r} has changed since the checkpoint {checkpoint}: "
            f"{state['samples']:,} samples to train on then, {len(source):,} now, fingerprint "
            f"{state['data_fingerprint']} then, {fingerprint} now. Put it back as it was, or begin "
            f"a new run in another output_dir (--model.pretrained {checkpoint}/ema starts it from "
            "these weights)"
        )
    if snapshot.step > config.train.max_steps:
        raise ConfigError(
            f"train.max_steps ({config.train.max_steps}) is below the {snapshot.step} steps of the "
            f"checkpoint {checkpoint}: raise it, or resume from an earlier checkpoint"
        )
    return changes


def _check_origin(config: Config, then: str, state: Mapping[str, Any], checkpoint: str) -> None:
    """Whether a fine-tuned run still begins from the same weights, wherever they lie now.

    Raises:
        ConfigError: When another first stage is named, or one that cannot be looked at.
    """
    name = config.model.pretrained
    if name == then:
        return
    line = f"model.pretrained ({json.dumps(then)} -> {json.dumps(name)})"
    advice = f"put {then!r} back; it need not be there any more, the checkpoint holds everything"
    try:
        # As the run began: with the channels that were added to it.
        begun = make_first_stage(config.model, config.data.resolution)
        found = fingerprint_weights(begun.model)
    except UserError as error:
        raise ConfigError(f"{line} cannot be compared: {error}; {advice}") from error
    if found != state.get("pretrained_fingerprint"):
        raise ConfigError(
            f"the checkpoint {checkpoint} was trained from other weights than {line}: {advice}, or "
            "begin a new run in another output_dir"
        )


def changed_fields(
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


def with_defaults(saved: Mapping[str, Any], config: type[Config]) -> dict[str, Any]:
    """A checkpoint's configuration, nested, with all fields that are known today.

    Args:
        saved: As its `state.json` has it.
        config: The class, with the registered sections.
    """
    return _filled(saved, _defaults(config))


def _defaults(config: type[Config]) -> dict[str, Any]:
    """What a field had that an older checkpoint does not know."""
    return _filled(_ONCE, to_dict(config()))


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


def _flat(nested: Mapping[str, Any], whole: frozenset[str], prefix: str = "") -> dict[str, Any]:
    """Dotted names to values, tuples as lists; mappings named in `whole` are values."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and prefix + key not in whole:
            flat |= _flat(value, whole, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


def _lists(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, list | tuple) else value
