"""Terms of the autoencoder's loss: what each is, and how one is added.

A term is one class, registered under its name:

    @register_term
    class TotalVariation(Term):
        name, section = "total_variation", TotalVariationConfig

        def value(self, inputs: Inputs) -> Tensor:
            return total_variation(inputs.rebuilt)

and one line of a recipe, `loss.total_variation.weight: 0.1`. Its weight, schedule, range checks,
`--help`, share of the gradient, log and report follow: see `docs/extend/loss.md`.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from first_stage.config.losses import LatentTermConfig, LossConfig, TermConfig
from first_stage.config.sections import add_section, section
from first_stage.losses.lagged_means import LaggedMeans
from first_stage.models.bottlenecks import Code
from first_stage.models.critic import CriticOutput
from first_stage.models.original import OriginalEncoder

Network = TypeVar("Network", bound=nn.Module)
Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class CriticOutputs:
    """What the critic makes of one micro-batch, for both players.

    Attributes:
        real: Of the images; a graph over the critic's parameters.
        fake: Of what was decoded; a graph over its pixels and the critic's parameters.
        averaged: Feature maps of images and reconstructions by the critic's moving average, whose
            parameters have no graph; `None` when the critic itself measures the learned distance.
    """

    real: CriticOutput
    fake: CriticOutput
    averaged: tuple[list[Tensor], list[Tensor]] | None = None

    @property
    def logits(self) -> tuple[Tensor, Tensor]:
        """Logits of reals and of fakes, equally many: reals repeat where prior samples follow."""
        real, fake = self.real.logits, self.fake.logits
        times = len(fake) // len(real)
        return real.repeat(times, 1, 1, 1) if times > 1 else real, fake


@dataclass(frozen=True)
class Inputs:
    """What a term may look at, on one micro-batch.

    Attributes:
        step: The step, for schedules.
        images: `(B, C, H, W)` in [-1, 1], what the reconstructions are to be.
        decoded: `(n, C, H, W)`, the pixels at which every loss stops: a leaf. The reconstructions,
            then, where the recipe asks for them, decoded prior samples.
        critic: What the critic says of both; `None` while it is not run.
        given: The images that the encoder got, where `images` were changed since; else `None`.
    """

    step: int
    images: Tensor
    decoded: Tensor
    critic: CriticOutputs | None = None
    given: Tensor | None = None
    _shared: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def rebuilt(self) -> Tensor:
        """The reconstructions `(B, C, H, W)` of the images, in their order."""
        return self.decoded[: len(self.images)]

    @property
    def encoded(self) -> Tensor:
        """The images `(B, C, H, W)` that the encoder got."""
        return self.images if self.given is None else self.given

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """Something that several terms share on a micro-batch; made by the first that asks."""
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]


@dataclass(frozen=True)
class Surroundings:
    """What terms are built with.

    Attributes:
        device: Where what they own lives.
        means: What is remembered from step to step; a checkpoint holds it.
        autocast: Makes the context in which a pretrained network runs.
        original: The encoder that a fine-tuned run began from; `None` for a new first stage, and
            where no term asks for it.
    """

    device: torch.device | str = "cpu"
    means: LaggedMeans = field(default_factory=lambda: LaggedMeans(0.0))
    autocast: Autocast = contextlib.nullcontext
    original: OriginalEncoder | None = None
    _networks: dict[type, nn.Module] = field(default_factory=dict, repr=False)

    @property
    def networks(self) -> list[nn.Module]:
        """The networks that terms have asked for."""
        return list(self._networks.values())

    def network(self, kind: type[Network], make: Callable[[], Network]) -> Network:
        """A network that several terms share, on the device; made by the first that asks."""
        if kind not in self._networks:
            self._networks[kind] = make().to(self.device)
        found = self._networks[kind]
        assert isinstance(found, kind)
        return found


class Term(ABC):
    """One term of the loss; a subclass says its value.

    Args:
        config: The whole objective's configuration.
        surroundings: What it may use.

    Attributes:
        name: In recipe, log and report.
        section: The dataclass of `loss.<name>`, a `TermConfig`; `None` for the built-in terms,
            whose fields `LossConfig` has itself.
        needs_critic: Whether it can only be measured while the critic runs.
        others: The other terms in use; set once all are built.
    """

    name: ClassVar[str]
    section: ClassVar[type[TermConfig] | None] = None
    needs_critic: ClassVar[bool] = False

    def __init__(self, config: LossConfig, surroundings: Surroundings):
        self.weight = config.weight_of(self.name)
        self.others: Sequence[Term] = ()
        if self.section is not None:
            self.config = section(config, self.name, self.section)

    @abstractmethod
    def value(self, inputs: Inputs) -> Tensor:
        """A scalar with a graph over `inputs.decoded`; its docstring says what was averaged."""

    def ramp(self, step: int) -> float:
        """How far it has been faded in, in [0, 1]; at 0 it is only logged."""
        if self.section is None:
            return 1.0
        return schedule(step, self.config.start_step, self.config.ramp_steps)

    @property
    def is_ready(self) -> bool:
        """Whether it can be weighed yet; while it cannot, it is only logged."""
        return True

    def strength(self, step: int) -> float:
        """Its weight in a step; 0 while it is not at work."""
        return self.weight * self.ramp(step)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What it trains itself, by name; the autoencoder's optimizer holds it."""
        return {}

    def own_loss(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]] | None:
        """The loss of its own parameters, with a graph over them alone, and scalars for the log."""
        return None


class LatentTerm(Term):
    """A term of the latents instead of the pixels, such as of their spectrum.

    It says `latent_value`, and its section is a `LatentTermConfig`. Its gradient does not pass
    through the decoder, so it cannot be held against those at the pixels: it weighs what its weight
    says, whatever the balance. `latent_norm/<name>` and `latent_share/<name>` in the log hold it
    against what else acts on the latents directly: the bottleneck's penalties and terms like it.
    """

    section: ClassVar[type[LatentTermConfig]]

    def value(self, inputs: Inputs) -> Tensor:
        """Nothing at the pixels."""
        return inputs.decoded.new_zeros(())

    @abstractmethod
    def latent_value(self, code: Code, images: Tensor) -> Tensor | None:
        """A scalar with a graph over `code`; its docstring says what was averaged.

        Args:
            code: Of the images, with the encoder's graph.
            images: `(B, C, H, W)` in [-1, 1], those that were encoded.

        Returns:
            `None` in a step that only measures what later ones need.
        """


TERMS: dict[str, type[Term]] = {}
"""The terms by name, in the order in which their gradients are added up."""


def register_term(term: type[Term]) -> type[Term]:
    """Make a term known to the objective, and its section to the recipe. A class decorator."""
    TERMS[term.name] = term
    if term.section is not None:
        add_section("loss", term.name, term.section)
    return term


def schedule(step: int, start: int, ramp: int) -> float:
    """0 before `start`, then linearly to 1 within `ramp` steps (at once when `ramp` is 0)."""
    if step < start:
        return 0.0
    return 1.0 if ramp <= 0 else min((step - start + 1) / ramp, 1.0)
