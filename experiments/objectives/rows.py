"""The objectives that are compared, and what they share."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from first_stage.config import (
    AdversarialConfig,
    Config,
    CriticConfig,
    DataConfig,
    LearnedConfig,
    LossConfig,
    ModelConfig,
    PretrainedConfig,
    TrainConfig,
    check,
)

START = "start"
"""The row of the first stage after the shared warm-up."""
VGG = "l1+vgg"
"""The row that needs pretrained weights."""

Size = Literal["quick", "small", "full"]


@dataclass(frozen=True)
class Budget:
    """What every objective gets.

    Attributes:
        warmup_steps: Steps of mean squared error that all share.
        steps: Steps of each objective after them.
        decay_steps: Steps at the end over which the learning rates fall.
        batch_size: Images per step.
        crop: Side of the training crops in pixels.
        widths: Widths of the first stage's levels.
        critic_width: Width of the critic's first layer.
        learning_rate: Of both players.
        critic_learning_rate: Of the critic, where it has another.
        first_stage: Family, latent channels and what else is the family's own.
    """

    warmup_steps: int = 10_000
    steps: int = 20_000
    decay_steps: int = 5_000
    batch_size: int = 32
    crop: int = 64
    widths: tuple[int, ...] = (64, 128, 128)
    critic_width: int = 64
    learning_rate: float = 5e-4
    critic_learning_rate: float | None = None
    first_stage: ModelConfig = field(default_factory=lambda: ModelConfig(latent_channels=3))


BUDGETS: dict[Size, Budget] = {
    "quick": Budget(400, 1200, 400, 8, 32, (32, 64, 64), 32, 1e-3),
    "small": Budget(6000, 6000, 2000, 8, 32, (32, 64, 64), 64, 1e-3),
    "full": Budget(),
}


def row_names(pretrained: bool) -> list[str]:
    """The rows of the table, in order.

    Args:
        pretrained: Whether there are weights for the pretrained perceptual distance.
    """
    return [START, *(row for row in _ROWS if row != VGG or pretrained)]


def warmup_config(budget: Budget, seed: int) -> Config:
    """The run that all objectives start from."""
    loss = LossConfig(pixel="l2", learned=_NO_LEARNED, adversarial=_NO_ADVERSARIAL)
    return _config(budget, seed, _Setting(loss), budget.warmup_steps)


def row_config(row: str, budget: Budget, seed: int, vgg: str | None = None) -> Config:
    """The run of one objective: the warm-up's steps are done when it begins.

    Args:
        row: Its name.
        budget: What it gets.
        seed: The run's seed.
        vgg: Weights of VGG16, for the row that needs them.
    """
    if row == START:
        return warmup_config(budget, seed)
    setting = _ROWS[row](_Parts(budget, vgg))
    config = _config(budget, seed, setting, budget.warmup_steps + budget.steps, budget.decay_steps)
    check(config)
    return config


_NO_LEARNED = LearnedConfig(weight=0.0)
_NO_ADVERSARIAL = AdversarialConfig(weight=0.0)
_NO_CRITIC = CriticConfig()


@dataclass(frozen=True)
class _Parts:
    """What the rows are put together from."""

    budget: Budget
    vgg: str | None

    @property
    def ramp(self) -> int:
        """Steps over which a term's weight grows."""
        return max(self.budget.steps // 15, 1)

    @property
    def learned(self) -> LearnedConfig:
        """The learned distance."""
        # The critic trains alone for a moment: untrained features are no yardstick.
        start = self.budget.warmup_steps + self.ramp // 2
        return LearnedConfig(weight=0.5, start_step=start, ramp_steps=self.ramp)

    @property
    def hinge(self) -> AdversarialConfig:
        """The hinge pair, after the learned distance."""
        start = self.budget.warmup_steps + self.ramp
        return AdversarialConfig(weight=0.2, start_step=start, ramp_steps=self.ramp)

    @property
    def wasserstein(self) -> AdversarialConfig:
        """The Wasserstein pair with gradient penalty, at the hinge's weight and steps."""
        return replace(self.hinge, kind="wasserstein", gradient_penalty=10.0)

    @property
    def critic(self) -> CriticConfig:
        """A critic that starts where the objectives part."""
        budget = self.budget
        return CriticConfig(
            width=budget.critic_width,
            layers=2,
            start_step=budget.warmup_steps,
            learning_rate=budget.critic_learning_rate,
        )


@dataclass(frozen=True)
class _Setting:
    """What is a row's own; the rest is shared by all."""

    loss: LossConfig
    critic: CriticConfig = _NO_CRITIC
    encoder_steps: int | None = None


def _separated(p: _Parts, adversarial: AdversarialConfig) -> _Setting:
    """The learned distance and an adversarial term as in the recipes.

    Squared error holds to colours and shapes alone; what is finer is the critic's. In the second
    half the decoder learns by itself.
    """
    loss = LossConfig(
        pixel="l2",
        pixel_weight=20.0,
        pixel_cutoff=0.2,
        learned=p.learned,
        adversarial=adversarial,
    )
    return _Setting(loss, p.critic, p.budget.warmup_steps + p.budget.steps // 2)


_Row = Callable[[_Parts], _Setting]

_ROWS: dict[str, _Row] = {
    "mse": lambda p: _Setting(
        LossConfig(pixel="l2", learned=_NO_LEARNED, adversarial=_NO_ADVERSARIAL)
    ),
    "l1": lambda p: _Setting(LossConfig(learned=_NO_LEARNED, adversarial=_NO_ADVERSARIAL)),
    "l1+hinge": lambda p: _Setting(LossConfig(learned=_NO_LEARNED, adversarial=p.hinge), p.critic),
    # As it is usually done: absolute error at all frequencies, and an encoder that learns.
    "l1+learned+hinge": lambda p: _Setting(
        LossConfig(learned=p.learned, adversarial=p.hinge), p.critic
    ),
    "learned": lambda p: _separated(p, replace(p.hinge, weight=0.0)),
    "learned+hinge": lambda p: _separated(p, p.hinge),
    "learned+hinge+antialias": lambda p: replace(
        _separated(p, p.hinge), critic=replace(p.critic, antialias=True)
    ),
    "learned+wasserstein": lambda p: _separated(p, p.wasserstein),
    VGG: lambda p: _Setting(
        LossConfig(
            learned=_NO_LEARNED,
            adversarial=_NO_ADVERSARIAL,
            pretrained=PretrainedConfig(weights=p.vgg, vgg_weight=0.1),
        )
    ),
}


def _config(budget: Budget, seed: int, setting: _Setting, steps: int, decay: int = 0) -> Config:
    return Config(
        seed=seed,
        data=DataConfig(path="compared", resolution=budget.crop, resize=0),
        model=replace(
            budget.first_stage,
            block_out_channels=budget.widths,
            layers_per_block=1,
            norm_num_groups=16,
            mid_block_attention=False,
        ),
        critic=setting.critic,
        loss=setting.loss,
        train=TrainConfig(
            max_steps=steps,
            encoder_steps=setting.encoder_steps,
            batch_size=budget.batch_size,
            learning_rate=budget.learning_rate,
            warmup_steps=20,
            decay_steps=decay,
            ema_decay=0.995,
            log_every=100,
        ),
    )
