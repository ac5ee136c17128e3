"""The objective: terms and their balance become one gradient for the autoencoder.

Every term is differentiated once, down to the reconstruction's pixels and no further. There their
weighted sum is formed, and one backward pass takes it through the autoencoder. Stopping at the
pixels makes any balance between terms cheap and shows what share of the decoder's gradient each
term has.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from first_stage.config.losses import AdversarialConfig, LearnedConfig, LossConfig
from first_stage.losses import penalties as regularisers
from first_stage.losses.adversarial import BOUNDARIES, PAIRS
from first_stage.losses.balance import Balance, gradient_at, mean_inner_product, mean_square_norm
from first_stage.losses.lagged_means import Average, LaggedMeans
from first_stage.losses.learned import feature_distances, feature_magnitudes
from first_stage.losses.pretrained import PretrainedDistances
from first_stage.metrics import training as diagnostics
from first_stage.metrics.spectrum import low_pass
from first_stage.models.critic import Verdict
from first_stage.models.first_stage import Posterior

_TINY = 1e-12

Autocast = Callable[[], contextlib.AbstractContextManager]


@dataclass(frozen=True)
class Judged:
    """The critic's verdicts on one micro-batch, for both players.

    Attributes:
        reals: On the images; a graph over the critic's parameters.
        fakes: On the leaf; a graph over the leaf and the critic's parameters.
        yardsticks: Feature maps of images and leaf by the critic's moving average, whose parameters
            have no graph; `None` when the critic itself is the yardstick.
    """

    reals: Verdict
    fakes: Verdict
    yardsticks: tuple[list[Tensor], list[Tensor]] | None = None


@dataclass(frozen=True)
class Term:
    """One term of the objective on one micro-batch.

    Attributes:
        value: A scalar with a graph over the leaf.
        weight: Its weight.
        ramp: How far it has been faded in, in [0, 1]; at 0 it is only logged.
    """

    value: Tensor
    weight: float
    ramp: float = 1.0


def pixel_error(
    reconstruction: Tensor,
    images: Tensor,
    kind: str,
    delta: float = 0.1,
    cutoff: float | None = None,
) -> Tensor:
    """Error over batch, channels and pixels: a mean.

    Args:
        reconstruction: `(B, C, H, W)`.
        images: `(B, C, H, W)` in [-1, 1].
        kind: `l1` (absolute), `l2` (squared), or `huber`: e^2 / (2 delta) up to delta and |e| -
            delta / 2 beyond, so that its slope is that of `l1` there.
        delta: Of `huber`.
        cutoff: Only the part of the difference below this many cycles per pixel counts.
    """
    error = reconstruction - images
    if cutoff is not None:
        error = low_pass(error, cutoff)
    if kind == "huber":
        return F.huber_loss(error, torch.zeros_like(error), delta=delta) / delta
    return error.abs().mean() if kind == "l1" else error.square().mean()


def schedule(step: int, start: int, ramp: int) -> float:
    """0 before `start`, then linearly to 1 within `ramp` steps (at once when `ramp` is 0)."""
    if step < start:
        return 0.0
    return 1.0 if ramp <= 0 else min((step - start + 1) / ramp, 1.0)


def channel_kl(posterior: Posterior) -> Tensor:
    """KL(q(z|x) || N(0, I)) of each latent channel in nats per latent value, `(C,)`.

    Mean over batch and places.
    """
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return (0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)).mean((0, 2, 3))


class Objective:
    """Losses of both players, and the balance between the autoencoder's terms.

    Args:
        config: Terms, weights and balance.
        device: Where the parts that it owns live.
        autocast: Makes the context in which a pretrained network runs.

    Attributes:
        parameters: What it trains itself; the autoencoder's optimizer holds them.
        means: What it remembers from step to step; a checkpoint needs it.
    """

    def __init__(
        self,
        config: LossConfig,
        device: torch.device | str = "cpu",
        autocast: Autocast = contextlib.nullcontext,
    ):
        self.config = config
        self.pair = PAIRS[config.adversarial.kind]
        decays = dict.fromkeys(("logit/real", "logit/fake"), config.adversarial.lecam_decay)
        self.means = LaggedMeans(config.balance.smoothing, decays)
        self.balance = Balance(config.balance, self.means)
        self.parameters: dict[str, nn.Parameter] = {}
        if config.learned_logvar:
            self.parameters["logvar"] = nn.Parameter(torch.zeros((), device=device))
        self.pretrained: PretrainedDistances | None = None
        if config.pretrained.in_use:
            self.pretrained = PretrainedDistances.load(config.pretrained).to(device)
        self._autocast = autocast

    # -- the critic's side -------------------------------------------------------------------

    def critic_loss(self, judged: Judged, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss on one micro-batch, without the penalties on its slope.

        Args:
            judged: Its verdicts; the fakes' gradient must not reach the autoencoder, which the
                leaf sees to.
            count: Number of images; see `gradient` for what else is in the leaf.

        Returns:
            The loss and scalars for the log.
        """
        reals, fakes = self._logits(judged, count)
        loss = self.pair.critic(reals, fakes)
        log = {"loss/critic": loss.detach()}
        weight = self.config.adversarial.lecam
        if weight > 0:
            self.means.observe("logit/real", reals.mean())
            self.means.observe("logit/fake", fakes.mean())
            anchors = (self.means.get("logit/real"), self.means.get("logit/fake"))
            if anchors[0] is not None and anchors[1] is not None:
                penalty = regularisers.lecam(reals, fakes, anchors[0], anchors[1])
                log["penalty/lecam"] = penalty.detach()
                loss = loss + weight * penalty
        boundary = BOUNDARIES.get(self.config.adversarial.kind, 0.0)
        return loss, log | diagnostics.critic_log(reals, fakes, boundary)

    def penalises(self, step: int) -> bool:
        """Whether `penalty` has anything to say in a step."""
        c = self.config.adversarial
        return (c.gradient_penalty + c.r1 + c.r2) > 0 and step % c.penalty_every == 0

    def penalty(
        self, judge: regularisers.Judge, images: Tensor, leaf: Tensor, mix: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted penalties on the critic's slope, on one micro-batch.

        Args:
            judge: The critic's logits, in float32.
            images: `(B, C, H, W)`, the reals.
            leaf: What was decoded, `(n, C, H, W)`; its first rows are the fakes.
            mix: `(B,)` uniform in [0, 1], for the interpolates.

        Returns:
            The penalties' weighted sum and scalars for the log.
        """
        c = self.config.adversarial
        fakes = leaf.detach()[: len(images)]
        found = {}
        if c.gradient_penalty > 0:
            found["gradient"] = (
                c.gradient_penalty,
                regularisers.gradient_penalty(judge, images, fakes, mix),
            )
        if c.r1 > 0:
            found["r1"] = (c.r1, regularisers.zero_centred_penalty(judge, images))
        if c.r2 > 0:
            found["r2"] = (c.r2, regularisers.zero_centred_penalty(judge, fakes))
        total = torch.stack([weight * value for weight, value in found.values()]).sum()
        log = {f"penalty/{name}": value.detach() for name, (_, value) in found.items()}
        return c.penalty_every * total, log

    def _logits(self, judged: Judged, count: int) -> tuple[Tensor, Tensor]:
        """Logits of reals and of what counts as fake, equally many."""
        fakes, reals = judged.fakes.logits, judged.reals.logits
        return reals.repeat(len(fakes) // count, 1, 1, 1) if len(fakes) > count else reals, fakes

    # -- the autoencoder's side --------------------------------------------------------------

    def gradient(
        self,
        step: int,
        images: Tensor,
        decoded: Tensor,
        leaf: Tensor,
        judged: Judged | None,
        last_layer: Tensor,
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """The gradient of the weighted terms with respect to what was decoded.

        Args:
            step: The step, for the schedules.
            images: `(B, C, H, W)` in [-1, 1].
            decoded: `(n, C, H, W)`, with the autoencoder's graph: the reconstructions, then, where
                the configuration asks for them, decoded prior samples.
            leaf: The same values, cut off: `decoded.detach().requires_grad_()`.
            judged: The critic's verdicts on `images` and `leaf`, or `None` while it is not run.
            last_layer: Weight of the decoder's last convolution.

        Returns:
            `(n, C, H, W)`, detached: d(terms)/d(decoded), a mean over the batch; the same without
            the adversarial term where that is kept from the encoder, else `None`; and scalars for
            the log. `square_norm/*` are the mean squared norms over samples of each term's weighted
            gradient, `inner/*` their inner products with the pixel term's.
        """
        terms = self._terms(step, images, leaf, judged)
        log = {f"loss/{name}": term.value.detach() for name, term in terms.items()}
        active = {name: term for name, term in terms.items() if term.weight * term.ramp > 0}
        gradients, factors = self.balance.weighted(
            {name: gradient_at(term.value, leaf) for name, term in active.items()},
            {name: term.weight for name, term in active.items()},
            {name: term.ramp for name, term in active.items()},
            decoded,
            last_layer,
        )
        log |= {f"balance/{name}": factor for name, factor in factors.items()}
        for name, gradient in gradients.items():
            # Its root is taken of the average over micro-batches: the mean of roots would depend on
            # how the batch is split.
            log[f"square_norm/{name}"] = mean_square_norm(gradient)
            if "pixel" in gradients and name != "pixel":
                log[f"inner/{name}"] = mean_inner_product(gradient, gradients["pixel"])
        adversarial = gradients.pop("adversarial", torch.zeros_like(leaf))
        others = torch.zeros_like(leaf)
        for gradient in gradients.values():
            others = others + gradient
        return others + adversarial, others if self.cuts_off(step) else None, log

    def cuts_off(self, step: int) -> bool:
        """Whether the adversarial term is at work in a step and kept from the encoder."""
        adversarial = self.config.adversarial
        at_work = adversarial.weight * _ramp(adversarial, step) > 0
        return at_work and not adversarial.reaches_encoder

    def direct_loss(
        self, step: int, images: Tensor, leaf: Tensor, posterior: Posterior
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The terms that do not pass through the pixels: the KL and the learned noise level's own.

        Args:
            step: The step, for the schedule.
            images: `(B, C, H, W)` in [-1, 1].
            leaf: As in `gradient`.
            posterior: Of the images, with the encoder's graph.

        Returns:
            Their weighted sum and scalars for the log: `loss/kl` in nats per image.
        """
        config = self.config
        kl = posterior.kl().mean()
        by_channel = channel_kl(posterior)
        log = {"loss/kl": kl.detach()} | {
            f"kl_channel/{number}": value for number, value in enumerate(by_channel.detach())
        }
        share = config.kl_weight * schedule(step, 0, config.kl_ramp_steps) / images[0].numel()
        if config.free_bits > 0:
            kl = self._beyond_free_bits(by_channel) * posterior.mean[0, 0].numel()
        loss = share * kl
        logvar = self.parameters.get("logvar")
        if logvar is not None:
            error = self._pixel_error(step, leaf.detach()[: len(images)], images)
            loss = loss + config.pixel_weight * (error * (-logvar).exp() + logvar)
            log["noise/logvar"] = logvar.detach().clone()
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

    def _pixel_error(self, step: int, rebuilt: Tensor, images: Tensor) -> Tensor:
        """The pixel term; it leaves fine detail to others only once one of them is at work."""
        config = self.config
        others = (config.learned, config.adversarial)
        relieved = config.pretrained.in_use or any(o.weight * _ramp(o, step) > 0 for o in others)
        cutoff = config.pixel_cutoff if relieved else None
        return pixel_error(rebuilt, images, config.pixel, config.huber_delta, cutoff)

    def _terms(
        self, step: int, images: Tensor, leaf: Tensor, judged: Judged | None
    ) -> dict[str, Term]:
        """Every term that can be measured in this step."""
        config, count = self.config, len(images)
        rebuilt = leaf[:count]
        pixel = self._pixel_error(step, rebuilt, images)
        if (logvar := self.parameters.get("logvar")) is not None:
            pixel = pixel * (-logvar.detach()).exp()
        terms = {"pixel": Term(pixel, config.pixel_weight)}
        if self.pretrained is not None:
            with self._autocast():
                values = self.pretrained(rebuilt, images)
            for name, (weight, value) in values.items():
                terms[name] = Term(value, weight)
        if judged is None:
            return terms
        if config.learned.weight > 0:
            # Without a yardstick yet it is not a term: a gradient of 0 would mislead the balance.
            known = not config.learned.normalise or self.means.get("magnitude") is not None
            ramp = _ramp(config.learned, step) if known else 0.0
            distance = self._learned_distance(judged, count)
            terms["learned"] = Term(distance, config.learned.weight, ramp)
        if config.adversarial.weight > 0:
            reals, fakes = self._logits(judged, count)
            loss = self.pair.generator(reals.detach(), fakes)
            adversarial = config.adversarial
            terms["adversarial"] = Term(loss, adversarial.weight, _ramp(adversarial, step))
        return terms

    def _learned_distance(self, judged: Judged, count: int) -> Tensor:
        """Weighted mean over the layers of distance / magnitude of the reals' features.

        Dividing keeps one layer from drowning the others. The magnitudes are those of the steps
        before this one; in the first step that runs the critic there are none, and the distance is
        0.
        """
        config = self.config.learned
        yardsticks = judged.yardsticks or (judged.reals.features, judged.fakes.features)
        chosen = range(len(yardsticks[0])) if config.layers is None else config.layers
        reals = [yardsticks[0][i] for i in chosen]
        fakes = [yardsticks[1][i][:count] for i in chosen]
        distances = feature_distances(fakes, reals, config.distance)
        if config.normalise:
            self.means.observe("magnitude", feature_magnitudes(reals, config.distance))
            magnitudes = self.means.get("magnitude")
            if magnitudes is None:
                return 0.0 * distances.mean()
            distances = distances / magnitudes.clamp_min(_TINY)
        if config.layer_weights is None:
            return distances.mean()
        weights = distances.new_tensor(config.layer_weights)
        return (distances * weights).sum() / weights.sum()

    def _beyond_free_bits(self, by_channel: Tensor) -> Tensor:
        """Sum over channels of max(free bits, KL), in nats per latent place.

        Kingma et al. 2016, "Improved variational inference with inverse autoregressive flow",
        equation 15. Which channels are below is decided by the mean over earlier steps, so that it
        does not depend on how a batch is split.
        """
        self.means.observe("kl", by_channel)
        earlier = self.means.get("kl")
        if earlier is None:
            return by_channel.sum()
        free = torch.full_like(by_channel, self.config.free_bits)
        return torch.where(earlier > free, by_channel, free).sum()


def _ramp(term: LearnedConfig | AdversarialConfig, step: int) -> float:
    return schedule(step, term.start_step, term.ramp_steps)
