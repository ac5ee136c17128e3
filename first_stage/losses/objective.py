"""The objective: terms and their balance become one gradient for the autoencoder.

Every term is differentiated once, down to the reconstruction's pixels and no further. There their
weighted sum is formed, and one backward pass takes it through the autoencoder. Stopping at the
pixels makes any balance between terms cheap and shows what share of the decoder's gradient each
term has.
"""

import contextlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from first_stage.config.losses import LossConfig
from first_stage.losses.adversarial import Adversarial
from first_stage.losses.balance import Balance, gradient_at, mean_inner_product, mean_square_norm
from first_stage.losses.critic_loss import CriticLoss
from first_stage.losses.lagged_means import Average, LaggedMeans
from first_stage.losses.latent import LatentLoss
from first_stage.losses.latent_terms import Spectrum, Variance
from first_stage.losses.learned import Learned
from first_stage.losses.original import Original
from first_stage.losses.pixel import Pixel
from first_stage.losses.pretrained import LPIPS, VGG, Gram
from first_stage.losses.terms import (
    TERMS,
    Autocast,
    Inputs,
    LatentTerm,
    Surroundings,
    Term,
    register_term,
)
from first_stage.models.bottlenecks import Code
from first_stage.models.original import OriginalEncoder
from first_stage.spans import span

for _term in (Pixel, VGG, LPIPS, Gram, Learned, Adversarial, Variance, Spectrum, Original):
    register_term(_term)


class Gradient(NamedTuple):
    """What the terms ask of the pixels that were decoded.

    Attributes:
        decoder: `(n, C, H, W)`, d(terms)/d(decoded), a mean over the batch.
        encoder: The same without the adversarial term, where that is kept from the encoder; else
            `None`.
        log: Scalars.
    """

    decoder: Tensor
    encoder: Tensor | None
    log: dict[str, Tensor]


class Objective:
    """The autoencoder's loss and the balance between its terms; the critic's loss.

    Args:
        config: Terms, weights and balance.
        device: Where the parts that it owns live.
        autocast: Makes the context in which a pretrained network runs.
        penalties: The weights that the bottleneck gives its own penalties.
        original: The encoder that a fine-tuned run began from, for the term that holds latents to
            it.

    Attributes:
        surroundings: What the terms were built with.
        terms: Those in use that see the pixels, by name.
        latent_terms: Those in use that see the latents, by name.
        critic: The critic's side.
        means: What it remembers from step to step; a checkpoint needs it.
    """

    def __init__(
        self,
        config: LossConfig,
        device: torch.device | str = "cpu",
        autocast: Autocast = contextlib.nullcontext,
        penalties: Mapping[str, float] | None = None,
        original: OriginalEncoder | None = None,
    ):
        self.config = config
        decays = dict.fromkeys(("logit/real", "logit/fake"), config.adversarial.lecam_decay)
        self.means = LaggedMeans(config.balance.smoothing, decays)
        self.balance = Balance(config.balance, self.means)
        self.surroundings = Surroundings(device, self.means, autocast, original)
        # The pixel term is always measured: the log and the progress bar show it.
        used = {
            name: term(config, self.surroundings)
            for name, term in TERMS.items()
            if name == "pixel" or config.weight_of(name) > 0
        }
        self.latent_terms = {n: term for n, term in used.items() if isinstance(term, LatentTerm)}
        self.terms: dict[str, Term] = {
            n: term for n, term in used.items() if n not in self.latent_terms
        }
        for term in self.terms.values():
            term.others = [other for other in self.terms.values() if other is not term]
        self.critic = CriticLoss(config.adversarial, self.means)
        self.latent = LatentLoss(config, self.means, penalties or {})

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What the terms train themselves; the autoencoder's optimizer holds them."""
        return {n: p for term in self.terms.values() for n, p in term.parameters.items()}

    def gradient(self, inputs: Inputs, decoded: Tensor, last_layer: Tensor) -> Gradient:
        """The gradient of the weighted terms with respect to what was decoded.

        Args:
            inputs: What the terms look at.
            decoded: `(n, C, H, W)`, the values of `inputs.decoded` with the autoencoder's graph.
            last_layer: Weight of the decoder's last convolution.

        Returns:
            See `Gradient`. In the log `square_norm/*` are the mean squared norms over samples of
            each term's weighted gradient, `inner/*` their inner products with the pixel term's.
        """
        step, pixels = inputs.step, inputs.decoded
        log, raw, weights, ramps = {}, {}, {}, {}
        for name, term in self.terms.items():
            if term.needs_critic and inputs.critic is None:
                continue
            ready = term.is_ready
            value = term.value(inputs)
            log[f"loss/{name}"] = value.detach()
            if ready and term.strength(step) > 0:
                raw[name] = gradient_at(value, pixels)
                weights[name], ramps[name] = term.weight, term.ramp(step)
        with span("balance"):
            gradients, factors = self.balance.weighted(raw, weights, ramps, decoded, last_layer)
        log |= {f"balance/{name}": factor for name, factor in factors.items()}
        for name, gradient in gradients.items():
            # Its root is taken of the average over micro-batches: the mean of roots would depend on
            # how the batch is split.
            log[f"square_norm/{name}"] = mean_square_norm(gradient)
            if "pixel" in gradients and name != "pixel":
                log[f"inner/{name}"] = mean_inner_product(gradient, gradients["pixel"])
        adversarial = gradients.pop("adversarial", torch.zeros_like(pixels))
        others = torch.zeros_like(pixels)
        for gradient in gradients.values():
            others = others + gradient
        for_encoder = others if self.cuts_off(step) else None
        return Gradient(others + adversarial, for_encoder, log)

    def cuts_off(self, step: int) -> bool:
        """Whether the adversarial term is at work in a step and kept from the encoder."""
        term = self.terms.get("adversarial")
        if term is None or self.config.adversarial.reaches_encoder:
            return False
        return term.strength(step) > 0

    def latent_loss(self, inputs: Inputs, code: Code) -> tuple[Tensor, dict[str, Tensor]]:
        """The losses that do not pass through the pixels: of the latents, and of terms' own parts.

        Args:
            inputs: What the terms look at.
            code: Of the images, with the encoder's graph.

        Returns:
            Their weighted sum and scalars for the log.
        """
        loss, log = self.latent.loss(inputs.step, inputs.encoded, code)
        pulls = {"penalties": loss}
        for name, latent_term in self.latent_terms.items():
            if (value := latent_term.latent_value(code, inputs.encoded)) is None:
                continue
            log[f"loss/{name}"] = value.detach()
            pulls[name] = latent_term.strength(inputs.step) * value
            loss = loss + pulls[name]
        if self.latent_terms and code.signal.requires_grad:
            for name, pull in pulls.items():
                log[f"latent_square_norm/{name}"] = _square_norm_at(pull, code.signal)
        for term in self.terms.values():
            if (own := term.own_loss(inputs)) is not None:
                loss, log = loss + own[0], log | own[1]
        return loss, log

    def finish_step(self, average: Average) -> None:
        """Take in what this step measured, once all its micro-batches ran.

        Args:
            average: Averages a tensor over processes.
        """
        self.means.finish_step(average, self.balance.finishers())

    def state_dict(self) -> dict[str, Tensor]:
        """Means and own parameters, for a checkpoint between two steps."""
        own = {f"parameter.{name}": p.detach() for name, p in self.parameters.items()}
        return self.means.state_dict() | own

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        rest = dict(state)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(rest.pop(f"parameter.{name}"))
        self.means.load_state_dict(rest)


def _square_norm_at(value: Tensor, latents: Tensor) -> Tensor:
    """Mean over samples of the squared norm of a value's gradient at the latents."""
    if not value.requires_grad:
        return value.detach() * 0
    (found,) = torch.autograd.grad(value, latents, retain_graph=True, allow_unused=True)
    return value.detach() * 0 if found is None else mean_square_norm(found)
