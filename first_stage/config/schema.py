"""The configuration: frozen dataclasses, read from YAML and the command line.

Every field's docstring is its `--help` text, its type says its range, and `may_change` that a run
may go on with another value of it. What several fields must fulfil together stands in `checks`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from first_stage.config.disturb import DisturbConfig
from first_stage.config.images import ImagesConfig, shorter_side
from first_stage.config.losses import (
    AdversarialConfig,
    BalanceConfig,
    CriticConfig,
    LearnedConfig,
    LossConfig,
    PretrainedConfig,
)
from first_stage.config.types import (
    Decay,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveShare,
    Precision,
    Share,
    may_change,
    section_may_change,
)
from first_stage.data import Variation, View
from first_stage.data.variation import Flip

__all__ = [
    "AdversarialConfig",
    "BalanceConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "DisturbConfig",
    "ExportConfig",
    "LearnedConfig",
    "LossConfig",
    "ModelConfig",
    "PretrainedConfig",
    "TrainConfig",
    "ValidationConfig",
]

Crop = Literal["random", "center"]
Optimizer = Literal["adamw", "adamw_8bit"]
Initialization = Literal["diffusers", "quiet"]
Padding = Literal["zeros", "reflect"]
Part = Literal["all", "encoder", "decoder", "mid", "last_block", "conv_in", "conv_out"]
_OF_ENCODER = ("all", "encoder", "conv_in")


@dataclass(frozen=True)
class DataConfig(ImagesConfig):
    """Where images come from and how they are seen."""

    # The samples are compared by their fingerprint, wherever they lie.
    path: str = may_change("")
    resolution: PositiveInt = 256
    """Side of the square training crop, in pixels; a multiple of the downsample factor."""
    late_resolution: PositiveInt | None = None
    """Side of the crops of the last late_steps steps, larger than resolution: what is learned on
    small crops at little cost gets used to what large ones are like. null: as before."""
    late_steps: NonNegativeInt = 0
    """How many steps at the end take crops of late_resolution; each costs as many times more as
    they have more pixels."""
    split: str = "train"
    """Which split to train on, where names of files or folders or the data set itself say splits;
    all: every one."""
    crop_shape: tuple[PositiveInt, PositiveInt] | None = None
    """Height and width of the crop, in pixels, instead of a square, in training and validation:
    images are resized until they just cover it, and resolution and resize do not matter."""
    crop: Crop = "random"
    """Where the crop is taken in training; validation always takes the centre."""
    least_scale: PositiveShare = 1.0
    """Draw the size at which a random crop sees its image too, from this share of its size after
    resizing up to the whole, all factors alike, but never below the crop: small crops then see what
    whole images are like, which norms depend on, and more different ones. 1: the one size."""
    flip: bool | Flip = True
    """Mirror images in training, all equally often: none; horizontal (or true), left to right;
    both, top to bottom too; dihedral, the eight of a square, quarter turns among them."""
    jitter_saturation: Share = 0.0
    """Of half of the training crops multiply colors by a factor drawn from 1 - this to 1 + this (in
    YIQ: luma stays): colors that few images show. For RGB and RGBA."""
    jitter_hue: Share = 0.0
    """Of the same crops turn hues by up to this share of half a circle, either way."""
    validation_path: str | None = may_change(None)
    """Held-out images, as for path; null: a share of the training data, or the built-in set's."""
    validation_split: str | None = may_change(None)
    """Held-out images: this split of validation_path, or of path; null: as validation_path says."""
    validation_share: Decay = 0.05
    """Share of the samples held out when validation_path and validation_split are null."""
    max_broken: Share = may_change(0.05)
    """Share of samples that may be undecodable before the run stops; they are skipped and listed
    in broken_files.jsonl."""
    streaming: bool = False
    """Read parquet or WebDataset shards, or a data set on the hub that is stored as such, row by
    row instead of copying them to disk first; path may also be a URL (s3://...) of shards."""
    shuffle_buffer: PositiveInt = 8192
    """Samples that a stream shuffles at a time, over all processes; they are held in memory, still
    encoded."""
    latents: str | None = may_change(None)
    """A cache of these images' latents (first-stage cache), made by model.pretrained: the decoder
    learns from them, and the encoder is not run. It holds centre crops, so data.crop is center, and
    mirrored images where it was made with --flip. null: images are encoded in every step."""
    workers: NonNegativeInt | None = may_change(None)
    """Decoding processes per training process; null: one per core left over; 0: none."""

    def variation(self) -> Variation:
        """What differs each time that a sample is seen."""
        return Variation(
            self.crop == "random",
            self.flip,
            self.least_scale,
            self.jitter_saturation,
            self.jitter_hue,
        )

    def reading_problems(self, channels: int) -> Iterator[str]:
        """What cannot work in reading files into so many channels, and in changing their colors."""
        yield from super().reading_problems(channels)
        for name in ("jitter_saturation", "jitter_hue"):
            given = f"data.{name} is {getattr(self, name):g}"
            if getattr(self, name) and channels not in (3, 4):
                yield f"{given}, but images of {channels} channels are not colors: set it to 0"
            elif getattr(self, name) and (self.channels or self.value_range):
                yield (
                    f"{given}, but with data.channels or data.value_range images are measurements, "
                    "not colors: set it to 0"
                )


@dataclass(frozen=True)
class ModelConfig:
    """The autoencoder: a diffusers class, said by its family."""

    family: str = "kl"
    """Which autoencoder: kl (AutoencoderKL), or another registered family; a pretrained one's is
    found by its class."""
    pretrained: str | None = None
    """Fine-tune this first stage (a diffusers folder, a pipeline's folder, a single file or whole
    checkpoint, or a hub id, owner/name@revision for one of its revisions); the fields of the layout
    below are then taken from it. null: train a new one."""
    scaling_factor: PositiveFloat | None = None
    """What pipelines multiply a pretrained first stage's latents by, where its file does not say
    (0.18215 in Stable Diffusion 1.x, 0.13025 in XL); null: as it says."""
    shift_factor: float | None = None
    """What they subtract before; null: as it says."""
    inflate_channels: bool = False
    """Give a pretrained first stage in_channels image channels where it has others: 3 become 1, 4
    (RGBA) or more. At step 0 it does to the channels it had what it did before."""
    more_latent_channels: NonNegativeInt = 0
    """Add latent channels to a pretrained AutoencoderKL; at step 0 the others and the images are
    as they were."""
    in_channels: PositiveInt = 3
    """Channels of the images: 1 (gray), 3 (RGB), 4 (RGBA), or as many as the files have."""
    latent_channels: PositiveInt = 4
    """Channels of the latents."""
    block_out_channels: tuple[PositiveInt, ...] = (128, 256, 512, 512)
    """Width of each level; n levels downsample by f = 2^(n-1)."""
    layers_per_block: PositiveInt = 2
    """Residual blocks per level of the encoder; the decoder has one more."""
    norm_num_groups: PositiveInt = 32
    """Groups of every group norm; must divide every width."""
    mid_block_attention: bool = True
    """Self-attention at the lowest resolution."""
    quant_conv: bool = True
    """1x1 convolutions around the latents: true as in Stable Diffusion 1.x and XL, false as in SD3
    and Flux."""
    initialization: Initialization = "diffusers"
    """How a new one begins: diffusers, as its classes do; quiet, with residual branches that add
    nothing yet and little noise in the latents, which finds colors in fewer steps."""
    decoder_padding: Padding | None = None
    """What the decoder's convolutions see beyond the border: zeros, or the image reflected. Stock
    diffusers and other programs decode with zeros, unless two lines of Python that the export's
    card shows are run. null: as the pretrained one says, else zeros."""
    gradient_checkpointing: bool = may_change(False)
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    max_steps: PositiveInt = may_change(100_000)
    """Updates of the autoencoder."""
    encoder_steps: NonNegativeInt | None = None
    """Steps in which the encoder learns; from then on it stays as its moving average, and the
    decoder learns alone, at less cost: what latents mean no longer changes, while textures still
    improve (as the last phase of DC-AE, Chen et al. 2024). 0 trains the decoder only, null both to
    the end."""
    parts: tuple[Part, ...] = ("all",)
    """What learns: all; encoder or decoder, with its 1x1 convolution; of the decoder mid (its
    middle), last_block (with the last convolution) or conv_out (that alone); conv_in, the encoder's
    first convolution. Several add up. Without a part of the encoder latents stay as they are."""
    batch_size: PositiveInt = 32
    """Images per update over all processes and micro-batches."""
    micro_batch_size: PositiveInt | None = may_change(None)
    """Images per forward pass of one process; gradients accumulate to batch_size. null: no
    accumulation."""
    learning_rate: PositiveFloat = may_change(1e-4)
    """Peak learning rate of the autoencoder (AdamW). It is used as it stands here: nothing scales
    it by processes, batch or accumulation."""
    betas: tuple[Decay, Decay] = (0.5, 0.9)
    """AdamW's betas, of both players."""
    weight_decay: NonNegativeFloat = may_change(0.0)
    """AdamW's weight decay, of both players."""
    warmup_steps: NonNegativeInt = may_change(0)
    """Steps over which both learning rates grow linearly from 0."""
    decay_steps: NonNegativeInt = may_change(0)
    """Steps at the end over which both learning rates fall (cosine) to final_rate of the peak."""
    final_rate: NonNegativeFloat = may_change(0.1)
    """Learning rate at the end of the decay, as a share of the peak."""
    clip_norm: PositiveFloat | None = may_change(1.0)
    """Largest norm of a player's gradient; null: no clipping."""
    precision: Precision = may_change("no")
    """Autocast; parameters, optimizer states and the EMA are float32 in any case."""
    tf32: bool = may_change(True)
    """On NVIDIA GPUs, float32 convolutions and matrix products of the networks in TensorFloat-32:
    several times as fast, with 10 bits of mantissa. Nearest codes, losses' filters and everything
    that is measured are computed in full float32 in any case."""
    compile: bool = may_change(False)
    """Compile the blocks of both networks (torch.compile): faster steps after minutes of compiling;
    needs a C++ compiler. Without the critic's where its slope is penalized."""
    optimizer: Optimizer = "adamw"
    """adamw; or adamw_8bit, whose states take a quarter of the memory: bitsandbytes, on GPUs."""
    ema_decay: Decay = may_change(0.999)
    """Decay of the exponential moving average of the weights, which is what is exported; it warms
    up as (1 + step) / (10 + step). 0 exports the weights themselves."""
    checkpoint_every: PositiveInt = may_change(5000)
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: PositiveInt = may_change(2)
    """How many of the newest checkpoints to keep."""
    log_every: PositiveInt = may_change(50)
    """Steps between log lines; values are averages over these steps."""
    tracker: str = may_change("tensorboard")
    """Any tracker that accelerate knows by name (tensorboard, wandb, mlflow...), or none."""
    profile_steps: tuple[NonNegativeInt, PositiveInt] | None = may_change(None)
    """First step to record and the one to end before: a trace with named spans in profile/ says
    where a step's time goes. null: none."""
    process_timeout: PositiveFloat = may_change(120.0)
    """Seconds without a sign of life after which a process on another machine counts as lost; the
    others then end and name it. One on the same machine is missed within seconds."""


@dataclass(frozen=True)
class ValidationConfig:
    """Held-out images: metrics, grid and GIF."""

    every: PositiveInt = 1000
    """Steps between validations, and between frames of training.gif."""
    images: PositiveInt = 64
    """Held-out images to measure at most."""
    resolution: PositiveInt | None = None
    """Side of their centre crop, in pixels; null: data.resolution."""
    resize: NonNegativeInt | None = None
    """Shorter side after resizing; null: as data.resize, or the resolution above; 0: as they
    are."""
    pictures: PositiveInt = 6
    """Images in the grid and the GIF."""


@dataclass(frozen=True)
class ExportConfig:
    """What is measured for the export."""

    images: PositiveInt = 1000
    """Training images on which scaling, shift and per-channel statistics are measured at most."""


@dataclass(frozen=True)
class Config:
    """A training run."""

    output_dir: str = may_change("runs/first-stage")
    """Folder for checkpoints, logs, pictures and the export."""
    overwrite: bool = may_change(False)
    """Replace a run that is already in output_dir; otherwise it is refused."""
    plan: bool = may_change(False)
    """Only say what the run would do, and what a few timed steps say it would cost."""
    resume: str | None = may_change(None)
    """Go on from a checkpoint: latest, or a checkpoint's folder."""
    start_from: str | None = None
    """Begin a new run from this checkpoint's folder of another: weights, average, critic and the
    optimizers go over; steps, schedules and the order of the data begin at 0. Data and recipe may
    be others, model and critic may not. null: from model.pretrained, or from random weights."""
    seed: NonNegativeInt = 0
    """Seed of weights, order, crops, flips and posterior noise."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    disturb: DisturbConfig = field(default_factory=DisturbConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = section_may_change(ValidationConfig)
    export: ExportConfig = section_may_change(ExportConfig)

    @property
    def needs_critic(self) -> bool:
        """Whether any term of the objective uses the critic."""
        return self.loss.learned.weight > 0 or self.loss.adversarial.weight > 0

    @property
    def late_start(self) -> int | None:
        """The first step whose crops are of `data.late_resolution`; `None`: there is none."""
        if self.data.late_resolution is None:
            return None
        return self.train.max_steps - self.data.late_steps

    @property
    def trains_encoder(self) -> bool:
        """Whether anything that decides what latents mean learns, at least at first."""
        return self.train.encoder_steps != 0 and bool(set(self.train.parts) & set(_OF_ENCODER))

    @property
    def keeps_latents(self) -> bool:
        """Whether latents stay those of `model.pretrained`: nothing of its encoder learns."""
        same = not self.trains_encoder and not self.model.more_latent_channels
        return self.model.pretrained is not None and same

    @property
    def held_out_view(self) -> View:
        """What validation sees of an image."""
        return View(*self.validation_view, self.data.crop_shape)

    @property
    def validation_view(self) -> tuple[int, int | None]:
        """Resolution and shorter side of validation images."""
        resolution = self.validation.resolution or self.data.resolution
        wanted = self.validation.resize
        if wanted is None and self.data.resize is not None:
            wanted = self.data.resize
        return resolution, shorter_side(wanted, resolution)
