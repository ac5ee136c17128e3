"""A new run that begins from a whole checkpoint of another: `--start_from`.

Networks, their average, the critic and both optimizers' moments go over; steps, schedules, the
order of the data and all noise begin at 0. Data and recipe may be others, the networks may not. A
resume may differ in less, since its result must be that of one undisturbed run.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from first_stage.config.parsing import to_dict
from first_stage.config.schema import Config, ModelConfig
from first_stage.distributed.processes import Processes, on_main
from first_stage.errors import ConfigError, UserError
from first_stage.files import sha256
from first_stage.models.families import LAYOUT
from first_stage.models.loading import fingerprint_weights, load_autoencoder
from first_stage.training.checkpoint import (
    Snapshot,
    list_checkpoints,
    read_checkpoint,
    verify_checkpoint,
)
from first_stage.training.resume import as_saved, differences, with_defaults
from first_stage.training.step import Trainer

_ANY_CRITIC = ("learning_rate", "start_step")
_ANY_MODEL = ("gradient_checkpointing", "pretrained")


@dataclass(frozen=True)
class Origin:
    """A checkpoint whose networks a run has.

    Attributes:
        path: Its folder.
        state: What of it is not a tensor.
    """

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps that its run had done."""
        return int(self.state["step"])

    def holds(self, name: str) -> bool:
        """Whether there are tensors of this name."""
        return (self.path / f"{name}.safetensors").exists()


@dataclass(frozen=True)
class Lineage:
    """Where a run's weights came from, as its checkpoints and its card say.

    Attributes:
        pretrained_fingerprint: Of the weights that `model.pretrained` began with; `None` without.
        started_from: Step and checksum of the checkpoint that it began from; `None` without.
        keeps_latents: Whether latents are still those of `model.pretrained`.
    """

    pretrained_fingerprint: str | None = None
    started_from: dict[str, Any] | None = None
    keeps_latents: bool = False

    @classmethod
    def resumed(cls, config: Config, state: Mapping[str, Any]) -> "Lineage":
        """As the run's own checkpoint has it."""
        kept = state.get("keeps_latents", config.keeps_latents)
        return cls(state.get("pretrained_fingerprint"), state.get("started_from"), kept)

    @classmethod
    def begun(cls, config: Config, origin: "Origin | None", model: nn.Module) -> "Lineage":
        """Of a run that begins.

        Args:
            config: Its configuration.
            origin: The checkpoint that it begins from, if any.
            model: What it begins to train; its weights are read where nothing else says them.
        """
        if origin is None:
            fine_tuned = config.model.pretrained is not None
            known = fingerprint_weights(model) if fine_tuned else None
            return cls(known, None, config.keeps_latents)
        before = with_defaults(origin.state["config"], type(config))["train"]
        then = replace(
            config.train, encoder_steps=before["encoder_steps"], parts=tuple(before["parts"])
        )
        kept = origin.state.get("keeps_latents", replace(config, train=then).keeps_latents)
        record = {"step": origin.step, "sha256": sha256(origin.path / "checksums.json")}
        known = origin.state.get("pretrained_fingerprint")
        return cls(known, record, kept and config.keeps_latents)


def find_origin(config: Config, processes: Processes, resumed: Path | None = None) -> Origin | None:
    """The checkpoint that `start_from` names, verified by one process for all.

    Args:
        config: The run's configuration.
        processes: All of them must call this.
        resumed: The checkpoint that a run goes on from: it then stands for the other, which need
            not be there any more.

    Returns:
        `None` for a run that begins from nothing, or from `model.pretrained`.

    Raises:
        UserError: When it is no checkpoint, or damaged.
    """
    if config.start_from is None:
        return None
    path = resumed or Path(config.start_from)
    if resumed is None:
        on_main(processes, lambda: _verify(path))
    return Origin(path, json.loads((path / "state.json").read_text(encoding="utf-8")))


def as_started(config: Config, origin: Origin | None) -> Config:
    """The configuration with the model of the checkpoint that the run begins from.

    Args:
        config: The run's configuration, as the user gave it.
        origin: From `find_origin`.

    Returns:
        `config` itself where nothing is to be changed: the checkpoint of a fine-tuned run says its
        own layout, and what it once began from.

    Raises:
        ConfigError: When model or critic are others than the checkpoint's.
    """
    if origin is None:
        return config
    line = f"start_from {str(origin.path)!r}"
    before = with_defaults(origin.state["config"], type(config))
    then, now = before["model"], to_dict(config)["model"]
    if now["pretrained"] not in (None, then["pretrained"]):
        raise ConfigError(
            f"model.pretrained is {now['pretrained']!r}, but {line} holds a whole model already: "
            "leave one of them out"
        )
    if then["pretrained"] is not None:
        config = replace(config, model=_model_of(config.model, then))
        now = to_dict(config)["model"]
    _refuse(line, "model", then, now, _ANY_MODEL)
    if config.needs_critic and origin.holds("critic"):
        _refuse(line, "critic", before["critic"], to_dict(config)["critic"], _ANY_CRITIC)
    if config.loss.weight_of("original") > 0 and not origin.holds("original"):
        raise ConfigError(
            f"loss.original has a weight, but {line} holds no original encoder, since its run had "
            f"no such term: begin from its weights alone (--model.pretrained {origin.path}/ema), "
            "or set loss.original.weight to 0"
        )
    return config


def built_for(config: Config, start: Path | None, origin: Origin | None) -> Config:
    """The configuration to build the networks from: a checkpoint's own, where there is one."""
    return as_saved(config, origin.path if origin is not None else start)


def carry_over(trainer: Trainer, origin: Origin) -> str:
    """Give a new trainer what the checkpoint holds. Every process must call it.

    Args:
        trainer: Built from `built_for`'s configuration.
        origin: The checkpoint.

    Returns:
        What went over and what begins anew, for the user.
    """
    snapshot = read_checkpoint(origin.path)
    tensors, taken, anew = _carried(trainer, origin, snapshot.tensors)
    state = {name: snapshot.state[name] for name in ("ema_steps", "scaler")}
    trainer.restore(Snapshot(0, tensors, state), load_autoencoder(str(origin.path / "ema")))
    begins = "".join(f", {name}" for name in anew)
    return (
        f"starting from step {origin.step} of {origin.path}: {', '.join(taken)} go on; "
        f"steps and schedules begin at 0{begins}"
    )


_Groups = dict[str, dict[str, Tensor]]


def _carried(
    trainer: Trainer, origin: Origin, theirs: _Groups
) -> tuple[_Groups, list[str], list[str]]:
    """A new trainer's tensors with those of a checkpoint in the place of what it can take up.

    Returns:
        The tensors; in words what of them goes on, and what begins anew.
    """
    config, own = trainer.config, trainer.snapshot(0).tensors
    before, now = with_defaults(origin.state["config"], type(config)), to_dict(config)
    tensors, taken, anew = dict(own), ["weights", "their average"], list[str]()
    for name in ("first_stage", "bottleneck", "bottleneck_ema", "original"):
        if name in theirs and name in own:
            tensors[name] = theirs[name]
    for name in ("critic", "critic_ema"):
        if name in own:
            found = theirs.get(name, theirs.get("critic"))  # an average begins as its network
            (anew if found is None else taken).append(name.replace("_ema", "'s average"))
            tensors[name] = own[name] if found is None else found
    tensors["optimizers"] = {}
    same_kind = before["train"]["optimizer"] == now["train"]["optimizer"]
    learned = [before["train"]["parts"], before["loss"]["learned_logvar"]]
    same = {
        "first_stage": learned == [list(config.train.parts), config.loss.learned_logvar],
        "critic": "critic" in theirs and "critic" in own,
    }
    for player, fits in same.items():
        moments = _of_player(theirs["optimizers"], player) if fits and same_kind else {}
        (taken if moments else anew).append(f"{player.replace('_', ' ')}'s optimizer")
        tensors["optimizers"] |= moments
    if trainer.critic is None:
        anew = [name for name in anew if "critic" not in name]
    if not differences({"loss": before["loss"]}, {"loss": now["loss"]}):
        own_means = {k: v for k, v in own["means"].items() if k.startswith("meter.")}
        objective = {k: v for k, v in theirs["means"].items() if k.startswith("objective.")}
        tensors["means"] = own_means | objective
        taken.append("the balance's means")
    return tensors, taken, anew


def _verify(path: Path) -> None:
    if path.is_dir() and not (path / "checksums.json").exists():
        newest = list_checkpoints(path)
        if newest:
            raise UserError(
                f"start_from {str(path)!r} is a run's folder: name one of its checkpoints, such as "
                f"{newest[-1][1]}"
            )
    verify_checkpoint(path)


def _model_of(model: ModelConfig, then: Mapping[str, Any]) -> ModelConfig:
    """The section of a fine-tuned run: its layout, and how it came from what it began from."""
    taken: dict[str, Any] = {
        field.name: tuple(value) if isinstance(value, list) else value
        for field in fields(ModelConfig)
        if field.name != "gradient_checkpointing"
        for value in (then[field.name],)
    }
    default = ModelConfig()
    for name, value in taken.items():
        given = getattr(model, name)
        if name not in (*LAYOUT, "pretrained") and given not in (value, getattr(default, name)):
            taken[name] = given  # refused by the comparison that follows
    return replace(model, **taken)


def _refuse(
    line: str, section: str, then: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...]
) -> None:
    """Refuse a section that differs in more than the fields that are free."""
    kept = [{k: v for k, v in values.items() if k not in free} for values in (then, now)]
    changed = differences({section: kept[0]}, {section: kept[1]})
    if changed:
        told = ", ".join(
            f"{name} ({json.dumps(a)} -> {json.dumps(b)})" for name, (a, b) in changed.items()
        )
        raise ConfigError(
            f"{line} was trained with other values of {told}: a run takes over its networks as "
            "they are. Put them back, or begin from nothing"
        )


def _of_player(optimizers: Mapping[str, Tensor], player: str) -> dict[str, Tensor]:
    return {name: value for name, value in optimizers.items() if name.startswith(f"{player}/")}
