"""What a configuration must fulfil beside the ranges in its types.

Every problem names the field, its value, what would happen, and the remedy.
"""

from collections.abc import Iterator
from pathlib import Path

from first_stage.config.images import shorter_side
from first_stage.config.loss_checks import loss_problems
from first_stage.config.losses import AdversarialConfig, LearnedConfig, latent_term_names
from first_stage.config.schema import Config, DataConfig
from first_stage.config.types import misfits
from first_stage.data import flip_named, is_builtin
from first_stage.errors import ConfigError


def check(config: Config) -> None:
    """Check every field by its type, and those that depend on each other.

    Raises:
        ConfigError: With the first problem: field, value, consequence, remedy.
    """
    for problem in _problems(config):
        raise ConfigError(problem)


def _problems(c: Config) -> Iterator[str]:
    yield from misfits(c)
    if not c.output_dir.strip():
        yield "output_dir is empty: give a folder for the run, such as runs/mine"
    yield from _start_problems(c)
    yield from _data_problems(c.data)
    yield from _layout_problems(c)
    side = min(c.data.crop_shape or (c.data.resolution,))
    yield from loss_problems(c.loss, c.critic, c.model.in_channels, side)
    yield from _late_problems(c)
    yield from _disturb_problems(c, side)
    yield from _part_problems(c)
    yield from _latents_problems(c)
    yield from _schedule_problems(c)


def _start_problems(c: Config) -> Iterator[str]:
    if c.start_from is None or c.resume is not None:
        return
    folder = Path(c.output_dir).resolve()
    if Path(c.start_from).resolve().is_relative_to(folder):
        yield (
            f"start_from ({c.start_from!r}) lies in output_dir ({c.output_dir!r}): a new run needs "
            "a folder of its own, or go on with --resume"
        )


def _data_problems(data: DataConfig) -> Iterator[str]:
    if not data.path:
        yield "data.path is empty: give a folder of images, a hub id, photos or digits"
    if data.crop_shape is not None and data.flip == "dihedral" and len(set(data.crop_shape)) > 1:
        yield (
            f"data.flip is dihedral, which turns crops, but data.crop_shape "
            f"{list(data.crop_shape)} is no square: use both"
        )
    if data.least_scale < 1:
        yield from _scale_problems(data)
    if data.streaming and data.min_side:
        yield (
            f"data.min_side is {data.min_side}, but a stream would have to be read whole to know "
            "sizes: set it to 0, or data.streaming to false"
        )
    if data.streaming and is_builtin(data.path):
        yield (
            f"data.streaming is true, but data.path {data.path!r} is a built-in set, which is in "
            "memory anyway: set it to false"
        )


def _scale_problems(data: DataConfig) -> Iterator[str]:
    given = f"data.least_scale is {data.least_scale:g}"
    if data.crop != "random":
        yield f"{given}, but data.crop is {data.crop}: set it to random, or data.least_scale to 1"
    if data.crop_shape is not None:
        yield (
            f"{given}, but images are resized until they just cover data.crop_shape "
            f"{list(data.crop_shape)}: use data.resolution and data.resize instead of it"
        )
    elif shorter_side(data.resize, data.resolution) == data.resolution:
        yield (
            f"{given}, but images are resized to the crop's {data.resolution} pixels anyway: set "
            "data.resize to 0 (their own size) or to more pixels than data.resolution"
        )


def _late_problems(c: Config) -> Iterator[str]:
    data, steps = c.data, c.train.max_steps
    if data.late_resolution is None:
        if data.late_steps:
            yield (
                f"data.late_steps is {data.late_steps}, but data.late_resolution names no size: "
                "set both"
            )
        return
    given = f"data.late_resolution is {data.late_resolution}"
    if not 0 < data.late_steps < steps:
        yield (
            f"{given}, but data.late_steps is {data.late_steps}: give how many of the {steps} "
            "steps (train.max_steps) have such crops, at the end"
        )
    if data.late_resolution <= data.resolution:
        yield f"{given}; it must be larger than data.resolution ({data.resolution})"
    if data.crop_shape is not None:
        yield (
            f"{given}, but data.crop_shape {list(data.crop_shape)} is the crop of every step: use "
            "data.resolution instead of it"
        )
    if data.latents is not None:
        yield (
            f"{given}, but data.latents is {data.latents!r}, a cache of crops of one size: set it "
            "to null"
        )


def _layout_problems(c: Config) -> Iterator[str]:
    if c.model.pretrained is None and c.start_from is None:
        for name in ("inflate_channels", "more_latent_channels", "scaling_factor", "shift_factor"):
            if value := getattr(c.model, name):
                yield (
                    f"model.{name} ({str(value).lower()}) changes a pretrained first stage, and "
                    "model.pretrained names none: add --model.pretrained, or leave it out"
                )
    if c.model.pretrained is None:
        yield from c.data.reading_problems(c.model.in_channels)
        if not c.model.block_out_channels:
            yield "model.block_out_channels is empty: name the width of each level"
        for width in c.model.block_out_channels:
            if width % c.model.norm_num_groups:
                yield (
                    f"model.norm_num_groups ({c.model.norm_num_groups}) does not divide the width "
                    f"{width} of model.block_out_channels: change one of them"
                )
        yield from factor_problems(c, 2 ** (len(c.model.block_out_channels) - 1))
    micro = c.train.micro_batch_size
    if micro is not None and c.train.batch_size % micro:
        yield (
            f"train.micro_batch_size ({micro}) does not divide train.batch_size "
            f"({c.train.batch_size}): the last micro-batch would be smaller. Choose a divisor"
        )


def factor_problems(c: Config, factor: int) -> Iterator[str]:
    """Resolutions that a downsample factor does not divide."""
    sides = {
        "data.resolution": c.data.resolution,
        "data.late_resolution": c.data.late_resolution or 0,
        "validation.resolution": c.validation_view[0],
    }
    if c.data.crop_shape is not None:
        height, width = c.data.crop_shape
        sides = {"data.crop_shape's height": height, "data.crop_shape's width": width}
    for name, side in sides.items():
        if side % factor:
            yield (
                f"{name} ({side}) is not a multiple of the downsample factor ({factor}): use "
                f"{max(side // factor, 1) * factor} or {(side // factor + 1) * factor}"
            )


def _disturb_problems(c: Config, side: int) -> Iterator[str]:
    equivariance = c.disturb.equivariance
    yield from _still_encoder_problems(c)
    if not equivariance.probability:
        return
    if not equivariance.transforms:
        yield (
            "disturb.equivariance.transforms is empty: name scale, flip or turn, or set "
            "disturb.equivariance.probability to 0"
        )
    if "scale" not in equivariance.transforms:
        return
    least = equivariance.least_scale * side
    needs = {"the critic": c.critic.smallest_image if c.critic.rests_on(c.loss) else 0,
             "VGG16": _VGG_SMALLEST if c.loss.pretrained.in_use else 0}  # fmt: skip
    for name, pixels in needs.items():
        if least < pixels:
            yield (
                f"disturb.equivariance.least_scale ({equivariance.least_scale:g}) makes images of "
                f"{side} pixels as small as {least:g}, and {name} needs {pixels}: raise it to "
                f"{pixels / side:.3g}, or use flip and turn alone"
            )


def _still_encoder_problems(c: Config) -> Iterator[str]:
    """What asks an encoder to learn that does not, or to stay near one that is not there."""
    begins_anew = c.model.pretrained is None and c.start_from is None
    if "original" in latent_term_names(c.loss) and begins_anew:
        yield (
            "loss.original has a weight, but there is no original encoder to hold latents to: give "
            "model.pretrained, or set loss.original.weight to 0"
        )
    if c.trains_encoder:
        return
    still, remedy = "train.encoder_steps is 0", "raise it"
    if c.train.encoder_steps != 0:
        still = f"train.parts {list(c.train.parts)} has nothing of the encoder"
        remedy = "add encoder"
    if c.disturb.in_use:
        yield (
            f"{still}, and latents are disturbed only while the encoder learns: {remedy}, or set "
            "every disturb.*.probability to 0"
        )
    for name in latent_term_names(c.loss):
        yield (
            f"{still}, and loss.{name} has only the encoder to teach: {remedy}, or set "
            f"loss.{name}.weight to 0"
        )


_VGG_SMALLEST = 16
"""Four halvings lie before its last layers."""


def _part_problems(c: Config) -> Iterator[str]:
    parts, steps = c.train.parts, c.train.encoder_steps
    if not parts:
        yield "train.parts is empty: name what learns, such as decoder, or all"
    if "all" in parts and len(parts) > 1:
        yield f"train.parts is {list(parts)}: all is everything already, so name it alone"
    if steps is not None and "all" not in parts:
        yield (
            f"train.encoder_steps is {steps}, but train.parts {list(parts)} says already what "
            "learns: set train.encoder_steps to null, or train.parts to [all]"
        )
    balance = c.loss.balance
    last = {"all", "decoder", "last_block", "conv_out"}
    if balance.kind == "adaptive" and balance.at == "last_layer" and not last & set(parts):
        yield (
            f"loss.balance.at is last_layer, but train.parts {list(parts)} leaves the last layer "
            "as it is: add last_block, or set loss.balance.at to pixels"
        )


def _latents_problems(c: Config) -> Iterator[str]:
    data = c.data
    if data.latents is None:
        return
    given = f"data.latents is {data.latents!r}"
    if c.model.pretrained is None:
        yield f"{given}, but no first stage: name the one that made the cache in model.pretrained"
    elif not c.keeps_latents:
        yield (
            f"{given}, but train.parts {list(c.train.parts)} would change the encoder, and with it "
            "the latents: set train.parts to [decoder]"
        )
    for name in ("jitter_saturation", "jitter_hue"):
        if getattr(data, name):
            yield (
                f"{given}, but data.{name} is {getattr(data, name):g}: a cache holds images in "
                "their own colors; set it to 0"
            )
    if data.crop != "center":
        yield f"{given}, but data.crop is {data.crop}: a cache holds centre crops; set it to center"
    if flip_named(data.flip) not in ("none", "horizontal"):
        yield (
            f"{given}, but data.flip is {data.flip}: a cache has images mirrored left to right at "
            "most, so use horizontal or none"
        )
    if data.streaming:
        yield (
            f"{given}, but data.streaming is true: samples of a stream cannot be looked up in the "
            "cache beforehand; set it to false"
        )


def _schedule_problems(c: Config) -> Iterator[str]:
    steps, start = c.train.max_steps, c.critic.start_step
    if c.needs_critic and start >= steps:
        yield (
            f"critic.start_step ({start}) must be below train.max_steps ({steps}): the critic "
            "would never train. Lower it or train longer"
        )
    terms: dict[str, LearnedConfig | AdversarialConfig] = {
        "loss.learned": c.loss.learned,
        "loss.adversarial": c.loss.adversarial,
    }
    for name, term in terms.items():
        if term.weight == 0:
            continue
        if term.start_step < start:
            yield (
                f"{name}.start_step ({term.start_step}) is before critic.start_step ({start}): an "
                "untrained critic would be asked. Raise the first or lower the second"
            )
        if term.start_step >= steps:
            yield (
                f"{name}.start_step ({term.start_step}) must be below train.max_steps ({steps}): "
                "the term would never enter. Lower it, train longer, or set its weight to 0"
            )
    if c.train.warmup_steps + c.train.decay_steps > steps:
        yield (
            f"train.warmup_steps ({c.train.warmup_steps}) and train.decay_steps "
            f"({c.train.decay_steps}) together exceed train.max_steps ({steps}): shorten one"
        )
    recorded = c.train.profile_steps
    if recorded is not None and recorded[0] >= recorded[1]:
        yield (
            f"train.profile_steps is {list(recorded)}: it is the first step to record and the one "
            "to end before, such as [50, 55]"
        )


def micro_batch_size(config: Config, world: int) -> int:
    """Samples per forward pass of one process.

    Args:
        config: The run's configuration.
        world: Number of processes.

    Returns:
        The size; `batch_size / world` samples are a whole number of such micro-batches.

    Raises:
        ConfigError: When the batch cannot be dealt out evenly.
    """
    batch = config.train.batch_size
    if batch % world:
        raise ConfigError(
            f"train.batch_size ({batch}) cannot be dealt to {world} processes evenly: use "
            f"{max(batch // world, 1) * world} or {(batch // world + 1) * world}, or another "
            "number of processes"
        )
    share = batch // world
    micro = config.train.micro_batch_size or share
    micro = min(micro, share)
    if share % micro:
        raise ConfigError(
            f"train.micro_batch_size ({micro}) does not divide the {share} images that each of "
            f"{world} processes takes of train.batch_size ({batch}): choose a divisor of {share}"
        )
    return micro
