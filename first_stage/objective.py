"""The objective: terms and their balance become one gradient for the autoencoder.

Every term is differentiated once, down to the reconstruction's pixels and no further. There their
weighted sum is formed, and one backward pass takes it through the autoencoder. Stopping at the
pixels makes any balance between terms cheap and shows what share of the decoder's gradient each
term has.
"""

import math
from dataclasses import dataclass

import torch
from einops import reduce
from torch import Tensor

from first_stage.adversarial import PAIRS
from first_stage.config import AdversarialConfig, LearnedConfig, LossConfig
from first_stage.critic import Verdict
from first_stage.perceptual import feature_distances, feature_magnitudes
from first_stage.statistics import Average, LaggedMeans

_TINY = 1e-12


@dataclass(frozen=True)
class Judged:
    """The critic's verdicts on one micro-batch, for both players.

    Attributes:
        reals: On the images; a graph over the critic's parameters.
        fakes: On the reconstruction's leaf; a graph over the leaf and the critic's parameters.
    """

    reals: Verdict
    fakes: Verdict


def pixel_error(reconstruction: Tensor, images: Tensor, kind: str) -> Tensor:
    """Mean absolute (`l1`) or mean squared (`l2`) error over batch, channels and pixels.

    Args:
        reconstruction: `(B, C, H, W)`.
        images: `(B, C, H, W)` in [-1, 1].
        kind: `l1` or `l2`.
    """
    difference = reconstruction - images
    return difference.abs().mean() if kind == "l1" else difference.square().mean()


def schedule(step: int, start: int, ramp: int) -> float:
    """0 before `start`, then linearly to 1 within `ramp` steps (at once when `ramp` is 0)."""
    if step < start:
        return 0.0
    return 1.0 if ramp <= 0 else min((step - start + 1) / ramp, 1.0)


class Objective:
    """Losses of both players, and the balance between the autoencoder's terms.

    Args:
        config: Terms, weights and balance.
    """

    def __init__(self, config: LossConfig):
        self.config = config
        self.pair = PAIRS[config.adversarial.kind]
        self.means = LaggedMeans(config.balance.smoothing)

    def critic_loss(self, judged: Judged) -> tuple[Tensor, dict[str, Tensor]]:
        """The critic's loss on one micro-batch.

        Args:
            judged: Its verdicts; the fakes' gradient must not reach the autoencoder, which the
                leaf sees to.

        Returns:
            The loss and scalars for the log.
        """
        reals, fakes = judged.reals.logits, judged.fakes.logits
        loss = self.pair.critic(reals, fakes)
        with torch.no_grad():
            log = {
                "loss/critic": loss.detach(),
                "critic/real_logit": reals.mean(),
                "critic/fake_logit": fakes.mean(),
                "critic/real_accuracy": (reals > 0).float().mean(),
                "critic/fake_accuracy": (fakes < 0).float().mean(),
            }
        return loss, log

    def gradient(
        self,
        step: int,
        images: Tensor,
        reconstruction: Tensor,
        leaf: Tensor,
        judged: Judged | None,
        last_layer: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient of the weighted terms with respect to the reconstruction.

        Args:
            step: The step, for the schedules.
            images: `(B, C, H, W)` in [-1, 1].
            reconstruction: `(B, C, H, W)`, with the autoencoder's graph.
            leaf: The same values, cut off: `reconstruction.detach().requires_grad_()`.
            judged: The critic's verdicts on `images` and `leaf`, or `None` while it is not run.
            last_layer: Weight of the decoder's last convolution.

        Returns:
            `(B, C, H, W)`, detached: d(terms)/d(reconstruction), a mean over the batch; and scalars
            for the log. `square_norm/*` are the mean squared norms over samples of each term's
            weighted gradient.
        """
        terms, log = self._terms(step, images, leaf, judged)
        adversarial = terms.pop("adversarial", None)
        gradients = {
            name: weight * _gradient_at(value, leaf) for name, (weight, value) in terms.items()
        }
        total = torch.stack(list(gradients.values())).sum(0)
        if adversarial is not None:
            weight, value = adversarial
            raw = _gradient_at(value, leaf)
            factor = self._factor(total, raw, reconstruction, last_layer)
            log["balance/adversarial"] = factor
            gradients["adversarial"] = (weight * factor) * raw
            total = total + gradients["adversarial"]
        for name, gradient in gradients.items():
            # Its root is taken of the average over micro-batches: the mean of roots would depend on
            # how the batch is split.
            log[f"square_norm/{name}"] = _mean_square_norm(gradient)
        return total, log

    def finish_step(self, average: Average) -> None:
        """Take in what this step measured, once all its micro-batches ran.

        Args:
            average: Averages a tensor over processes.
        """
        norms = {"last_layer/others": _square_norm, "last_layer/adversarial": _square_norm}
        self.means.finish_step(average, norms)

    def _terms(
        self, step: int, images: Tensor, leaf: Tensor, judged: Judged | None
    ) -> tuple[dict[str, tuple[float, Tensor]], dict[str, Tensor]]:
        """Weight and value of each term that is active, and the values for the log."""
        config = self.config
        pixel = pixel_error(leaf, images, config.pixel)
        terms = {"pixel": (config.pixel_weight, pixel)}
        log = {"loss/pixel": pixel.detach()}
        if judged is None:
            return terms, log
        if config.learned.weight > 0:
            distance = self._learned_distance(judged)
            log["loss/learned"] = distance.detach()
            if weight := _weight(config.learned, step):
                terms["learned"] = (weight, distance)
        if config.adversarial.weight > 0:
            loss = self.pair.generator(judged.reals.logits.detach(), judged.fakes.logits)
            log["loss/adversarial"] = loss.detach()
            if weight := _weight(config.adversarial, step):
                terms["adversarial"] = (weight, loss)
        return terms, log

    def _learned_distance(self, judged: Judged) -> Tensor:
        """Mean over the layers of distance / magnitude of the reals' features.

        Dividing keeps one layer from drowning the others. The magnitudes are those of the steps
        before this one; in the first step that runs the critic there are none, and the distance is
        0.
        """
        config = self.config.learned
        chosen = range(len(judged.reals.features)) if config.layers is None else config.layers
        reals = [judged.reals.features[i] for i in chosen]
        fakes = [judged.fakes.features[i] for i in chosen]
        distances = feature_distances(fakes, reals, config.distance)
        self.means.observe("magnitude", feature_magnitudes(reals, config.distance))
        magnitudes = self.means.get("magnitude")
        if magnitudes is None:
            return 0.0 * distances.mean()
        return (distances / magnitudes.clamp_min(_TINY)).mean()

    def _factor(
        self, others: Tensor, adversarial: Tensor, reconstruction: Tensor, last_layer: Tensor
    ) -> Tensor:
        """What the adversarial term's weight is multiplied with: a scalar on the device.

        Esser et al. 2021, "Taming transformers", equation 7: the ratio of the norms of the other
        terms' gradient and of the adversarial one. In the first step that measures them it is 0.
        """
        balance = self.config.balance
        if balance.kind == "fixed":
            return others.new_ones(())
        for name, gradient in {"others": others, "adversarial": adversarial}.items():
            if balance.at == "last_layer":
                # This gradient sums over the batch, so its norm waits for the average over all.
                measured = _last_layer_gradient(gradient, reconstruction, last_layer)
            else:
                measured = _mean_square_norm(gradient)
            self.means.observe(f"{balance.at}/{name}", measured)
        target = self.means.get(f"{balance.at}/others")
        current = self.means.get(f"{balance.at}/adversarial")
        if target is None or current is None:
            return others.new_zeros(())
        return (target / current.clamp_min(_TINY)).sqrt().clamp_max(balance.max_weight)


def _weight(term: LearnedConfig | AdversarialConfig, step: int) -> float:
    return term.weight * schedule(step, term.start_step, term.ramp_steps)


def _gradient_at(value: Tensor, leaf: Tensor) -> Tensor:
    """d(value)/d(leaf), `(B, C, H, W)`.

    The gradient of a mean is tiny per pixel; a power of two, exact in every format, lifts it over
    the underflow of a critic that runs in float16.
    """
    scale = 2.0 ** round(math.log2(leaf.numel()))
    (gradient,) = torch.autograd.grad(value * scale, leaf, retain_graph=True)
    return gradient / scale


def _mean_square_norm(gradient: Tensor) -> Tensor:
    """Mean over the samples of the squared norm of each sample's own gradient.

    The gradient of a batch's mean is 1/B of each sample's own; undoing that makes the number the
    same for every micro-batch size.
    """
    own = gradient * gradient.shape[0]
    return reduce(own.square(), "b c h w -> b", "sum").mean()


def _square_norm(gradient: Tensor) -> Tensor:
    return gradient.square().sum()


def _last_layer_gradient(gradient: Tensor, reconstruction: Tensor, weight: Tensor) -> Tensor:
    """What a gradient at the reconstruction gives at the last convolution: one weight gradient."""
    scale = 2.0 ** round(math.log2(gradient.numel()))
    (result,) = torch.autograd.grad(reconstruction, weight, gradient * scale, retain_graph=True)
    return result / scale
