"""The configuration: frozen dataclasses, read from YAML and the command line, checked together.

Every field's docstring is its `--help` text. Checks that involve several fields name the field,
the value, what would happen, and the remedy.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from first_stage.config.losses import (
    AdversarialConfig,
    BalanceConfig,
    CriticConfig,
    LearnedConfig,
    LossConfig,
    PretrainedConfig,
    loss_problems,
)
from first_stage.config.parsing import read_options
from first_stage.data.decode import Reading
from first_stage.data.images import View
from first_stage.data.sources import is_builtin
from first_stage.errors import ConfigError

__all__ = [
    "AdversarialConfig",
    "BalanceConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "ExportConfig",
    "LearnedConfig",
    "LossConfig",
    "ModelConfig",
    "PretrainedConfig",
    "TrainConfig",
    "ValidationConfig",
    "check",
    "factor_problems",
    "micro_batch_size",
    "parse_config",
    "to_dict",
]


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they are seen."""

    path: str = ""
    """A folder of images (nested or not), a folder written by datasets' save_to_disk, parquet or
    WebDataset (.tar) shards or a folder of them, a built-in set (photos, digits), or a data set id
    on the hub."""
    resolution: int = 256
    """Side of the square training crop, in pixels; a multiple of the downsample factor."""
    resize: int | None = None
    """Shorter side after resizing, in pixels (bicubic, antialiased); null: the resolution; 0:
    images keep their size. An image smaller than the crop is always enlarged to fit."""
    crop_shape: tuple[int, int] | None = None
    """Height and width of the crop, in pixels, instead of a square, in training and validation:
    images are resized until they just cover it, and resolution and resize do not matter."""
    min_side: int = 0
    """Images with a shorter side below this many pixels are skipped and counted, instead of
    enlarged; their headers are read first. 0: none are."""
    crop: Literal["random", "center"] = "random"
    """Where the crop is taken in training; validation always takes the centre."""
    flip: bool | Literal["none", "horizontal", "both", "dihedral"] = True
    """Mirror images in training, all equally often: none; horizontal (or true), left to right;
    both, top to bottom too; dihedral, the eight of a square, quarter turns among them."""
    image_column: str | None = None
    """Column with the images, for data sets that have columns; null: found by its type."""
    split: str = "train"
    """Which split of a hub or saved data set to train on."""
    validation_path: str | None = None
    """Held-out images, as for path; null: a share of the training data, or the built-in set's."""
    validation_split: str | None = None
    """Held-out images: this split of validation_path, or of path; null: as validation_path says."""
    validation_share: float = 0.05
    """Share of the samples held out when validation_path and validation_split are null, in
    [0, 1)."""
    max_broken: float = 0.05
    """Share of samples that may be undecodable before the run stops; they are skipped and listed
    in broken_files.jsonl."""
    streaming: bool = False
    """Read parquet or WebDataset shards, or a data set on the hub that is stored as such, row by
    row instead of copying them to disk first; path may also be a URL (s3://...) of shards."""
    shuffle_buffer: int = 8192
    """Samples that a stream shuffles at a time, over all processes; they are held in memory, still
    encoded."""
    channels: tuple[int, ...] | None = None
    """Which of the stored channels are used, counted from 0, as in [3,2,1]; null: all of them, and
    colors become model.in_channels channels by the usual rules (gray, RGB, alpha)."""
    value_range: tuple[float, float] | None = None
    """Stored values that become -1 and 1, as in [0,4095] for 12 bits or [-1024,3071] for Hounsfield
    units; values outside are clipped. null: the range of 8-bit and unsigned 16-bit integers."""
    color: Literal["srgb", "keep"] = "srgb"
    """Embedded color profiles: srgb converts to sRGB, keep takes the numbers as they are."""
    display: tuple[int, ...] | None = None
    """Which channels pictures show and networks for colors see, one or three, counted from 0 among
    those that are used; null: the colors, or the first three."""
    max_pixels: int = 100_000_000
    """Images of more pixels are not decoded, and listed: a small file can unpack to gigabytes."""
    workers: int | None = None
    """Decoding processes per training process; null: one per core left over, at most 8; 0: none."""

    def reading(self, channels: int) -> Reading:
        """How files are read into so many channels."""
        return Reading(
            channels, self.channels, self.value_range, self.color, self.max_pixels, self.display
        )


@dataclass(frozen=True)
class ModelConfig:
    """The autoencoder: a diffusers AutoencoderKL."""

    pretrained: str | None = None
    """Fine-tune this first stage (a diffusers folder, a pipeline's folder, or a hub id); the fields
    of the layout below are then taken from it. null: train a new one."""
    in_channels: int = 3
    """Channels of the images: 1 (gray), 3 (RGB), 4 (RGBA), or as many as the files have."""
    latent_channels: int = 4
    """Channels of the latents."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each level; n levels downsample by f = 2^(n-1)."""
    layers_per_block: int = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    norm_num_groups: int = 32
    """Groups of every group norm; must divide every width."""
    mid_block_attention: bool = True
    """Self-attention at the lowest resolution."""
    quant_conv: bool = True
    """1x1 convolutions around the latents: true as in Stable Diffusion 1.x and XL, false as in SD3
    and Flux."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    max_steps: int = 100_000
    """Updates of the autoencoder."""
    encoder_steps: int | None = None
    """Steps in which the encoder learns; from then on it stays as its moving average, and the
    decoder learns alone, at less cost: what latents mean no longer changes, while textures still
    improve (as the last phase of DC-AE, Chen et al. 2024). 0 trains the decoder only, null both to
    the end."""
    batch_size: int = 32
    """Images per update over all processes and micro-batches."""
    micro_batch_size: int | None = None
    """Images per forward pass of one process; gradients accumulate to batch_size. null: no
    accumulation."""
    learning_rate: float = 1e-4
    """Peak learning rate of the autoencoder (AdamW). It is used as it stands here: nothing scales
    it by processes, batch or accumulation."""
    betas: tuple[float, float] = (0.5, 0.9)
    """AdamW's betas, of both players."""
    weight_decay: float = 0.0
    """AdamW's weight decay, of both players."""
    warmup_steps: int = 0
    """Steps over which both learning rates grow linearly from 0."""
    decay_steps: int = 0
    """Steps at the end over which both learning rates fall (cosine) to final_rate of the peak."""
    final_rate: float = 0.1
    """Learning rate at the end of the decay, as a share of the peak."""
    clip_norm: float | None = 1.0
    """Largest norm of a player's gradient; null: no clipping."""
    precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast; parameters, optimizer states and the EMA are float32 in any case."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which is what is exported; it warms
    up as (1 + step) / (10 + step). 0 exports the weights themselves."""
    checkpoint_every: int = 5000
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    log_every: int = 50
    """Steps between log lines; values are averages over these steps."""
    tracker: str = "tensorboard"
    """Any tracker that accelerate knows by name (tensorboard, wandb, mlflow...), or none."""
    process_timeout: float = 120.0
    """Seconds without a sign of life after which a process on another machine counts as lost; the
    others then end and name it. One on the same machine is missed within seconds."""


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out images: metrics, grid and GIF."""

    every: int = 1000
    """Steps between validations, and between frames of training.gif."""
    images: int = 64
    """Held-out images to measure at most."""
    resolution: int | None = None
    """Side of their centre crop, in pixels; null: data.resolution."""
    resize: int | None = None
    """Shorter side after resizing; null: as data.resize, or the resolution above; 0: as they
    are."""
    pictures: int = 6
    """Images in the grid and the GIF."""


@dataclass(frozen=True)
class ExportConfig:
    """What is measured for the export."""

    images: int = 1000
    """Training images on which scaling, shift and per-channel statistics are measured at most."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    output_dir: str = "runs/first-stage"
    """Folder for checkpoints, logs, pictures and the export."""
    overwrite: bool = False
    """Replace a run that is already in output_dir; otherwise it is refused."""
    resume: str | None = None
    """Go on from a checkpoint: latest, or a checkpoint's folder."""
    seed: int = 0
    """Seed of weights, order, crops, flips and posterior noise; >= 0."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    @property
    def needs_critic(self) -> bool:
        """Whether any term of the objective uses the critic."""
        return self.loss.learned.weight > 0 or self.loss.adversarial.weight > 0

    @property
    def view(self) -> View:
        """What training sees of an image."""
        return View(self.data.resolution, self.view_resize, self.data.crop_shape)

    @property
    def held_out_view(self) -> View:
        """What validation sees of an image."""
        return View(*self.validation_view, self.data.crop_shape)

    @property
    def view_resize(self) -> int | None:
        """Shorter side for training images, `None` to keep sizes (see `View.resize`)."""
        return _resize(self.data.resize, self.data.resolution)

    @property
    def validation_view(self) -> tuple[int, int | None]:
        """Resolution and shorter side of validation images."""
        resolution = self.validation.resolution or self.data.resolution
        wanted = self.validation.resize
        if wanted is None and self.data.resize is not None:
            wanted = self.data.resize
        return resolution, _resize(wanted, resolution)


def _resize(resize: int | None, resolution: int) -> int | None:
    return resolution if resize is None else (resize or None)


def parse_config(arguments: Sequence[str] | None = None) -> Config:
    """Read a run's configuration from `--config FILE` and `--field.name value`.

    Args:
        arguments: Command line without the program's name; `None` reads `sys.argv`.

    Returns:
        The checked configuration.

    Raises:
        ConfigError: In one line for anything that cannot work.
    """
    config = read_options(
        Config,
        arguments,
        description="Train the first stage of a latent diffusion model on your own images.",
    )
    check(config)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain nested dictionaries, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def check(config: Config) -> None:
    """Check fields that depend on each other or on their range.

    Raises:
        ConfigError: With the first problem: field, value, consequence, remedy.
    """
    for problem in _problems(config):
        raise ConfigError(problem)


def _problems(c: Config) -> Iterator[str]:
    yield from _range_problems(c)
    yield from _layout_problems(c)
    side = min(c.data.crop_shape or (c.data.resolution,))
    yield from loss_problems(c.loss, c.critic, c.model.in_channels, side)
    yield from _schedule_problems(c)


def _range_problems(c: Config) -> Iterator[str]:
    if not c.data.path:
        yield "data.path is empty: give a folder of images, a hub id, photos or digits"
    if c.data.crop_shape is not None:
        height, width = c.data.crop_shape
        if min(height, width) < 1:
            yield f"data.crop_shape is {[height, width]}; both sides must be above 0"
        if c.data.flip == "dihedral" and height != width:
            yield (
                f"data.flip is dihedral, which turns crops, but data.crop_shape {[height, width]} "
                "is no square: use both"
            )
    if c.data.streaming and c.data.min_side:
        yield (
            f"data.min_side is {c.data.min_side}, but a stream would have to be read whole to know "
            "sizes: set it to 0, or data.streaming to false"
        )
    if c.data.streaming and is_builtin(c.data.path):
        yield (
            f"data.streaming is true, but data.path {c.data.path!r} is a built-in set, which is in "
            "memory anyway: set it to false"
        )
    positive: dict[str, float] = {
        "data.resolution": c.data.resolution,
        "data.shuffle_buffer": c.data.shuffle_buffer,
        "train.max_steps": c.train.max_steps,
        "train.batch_size": c.train.batch_size,
        "train.learning_rate": c.train.learning_rate,
        "train.checkpoint_every": c.train.checkpoint_every,
        "train.keep_checkpoints": c.train.keep_checkpoints,
        "train.log_every": c.train.log_every,
        "train.process_timeout": c.train.process_timeout,
        "validation.every": c.validation.every,
        "validation.images": c.validation.images,
        "validation.pictures": c.validation.pictures,
        "export.images": c.export.images,
        "model.in_channels": c.model.in_channels,
        "model.latent_channels": c.model.latent_channels,
        "model.layers_per_block": c.model.layers_per_block,
    }
    for name, value in positive.items():
        if not value > 0:
            yield f"{name} is {value}; it must be above 0"
    weights: dict[str, float] = {
        "seed": c.seed,
        "data.resize": c.data.resize or 0,
        "data.min_side": c.data.min_side,
        "data.workers": c.data.workers or 0,
        "train.weight_decay": c.train.weight_decay,
        "train.warmup_steps": c.train.warmup_steps,
        "train.decay_steps": c.train.decay_steps,
        "train.final_rate": c.train.final_rate,
        "train.encoder_steps": c.train.encoder_steps or 0,
    }
    for name, value in weights.items():
        if not value >= 0:
            yield f"{name} is {value}; it must be 0 or above"
    for name, share in {
        "data.validation_share": c.data.validation_share,
        "train.ema_decay": c.train.ema_decay,
    }.items():
        if not 0 <= share < 1:
            yield f"{name} is {share}; it must be at least 0 and below 1"
    if not 0 <= c.data.max_broken <= 1:
        yield f"data.max_broken is {c.data.max_broken}; it is a share, from 0 to 1"


def reading_problems(reading: Reading, name: str = "data") -> Iterator[str]:
    """What cannot work in how files are read.

    Args:
        reading: How.
        name: The section's name in the configuration.
    """
    if reading.select is not None:
        given = list(reading.select)
        if not given or min(given) < 0:
            yield f"{name}.channels is {given}; channels are counted from 0"
        elif len(given) != reading.channels:
            yield (
                f"{name}.channels {given} chooses {len(given)}, but model.in_channels is "
                f"{reading.channels}: make them equal"
            )
    if reading.value_range is not None and not reading.value_range[0] < reading.value_range[1]:
        yield f"{name}.value_range is {list(reading.value_range)}; give [low, high] with low < high"
    if reading.display is not None and (
        len(reading.display) not in (1, 3)
        or not all(0 <= channel < reading.channels for channel in reading.display)
    ):
        yield (
            f"{name}.display is {list(reading.display)}; give one or three channels, each from 0 "
            f"to {reading.channels - 1}"
        )
    if reading.max_pixels < 1:
        yield f"{name}.max_pixels is {reading.max_pixels}; it must be above 0"


def _layout_problems(c: Config) -> Iterator[str]:
    if c.model.pretrained is None:
        yield from reading_problems(c.data.reading(c.model.in_channels))
    if c.model.pretrained is None:
        for width in c.model.block_out_channels:
            if width % c.model.norm_num_groups:
                yield (
                    f"model.norm_num_groups ({c.model.norm_num_groups}) does not divide the width "
                    f"{width} of model.block_out_channels: change one of them"
                )
        yield from factor_problems(c, 2 ** (len(c.model.block_out_channels) - 1))
    micro = c.train.micro_batch_size
    if micro is not None and (micro < 1 or c.train.batch_size % micro):
        yield (
            f"train.micro_batch_size ({micro}) does not divide train.batch_size "
            f"({c.train.batch_size}): the last micro-batch would be smaller. Choose a divisor"
        )


def factor_problems(c: Config, factor: int) -> Iterator[str]:
    """Resolutions that a downsample factor does not divide."""
    sides = {
        "data.resolution": c.data.resolution,
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
