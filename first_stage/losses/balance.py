"""The balance between the terms: by what each gradient at the reconstruction is multiplied.

Factors that depend on the data follow from the gradients' norms in *earlier* steps, averaged over
micro-batches and processes: the same number for every process and every split of the batch.
"""

import math
from collections.abc import Callable

import torch
from einops import reduce
from torch import Tensor

from first_stage.config.losses import BalanceConfig
from first_stage.losses.lagged_means import LaggedMeans

_TINY = 1e-12


class Balance:
    """Weights the terms' gradients.

    Args:
        config: How.
        means: Holds the norms of earlier steps.
    """

    def __init__(self, config: BalanceConfig, means: LaggedMeans):
        self.config, self.means = config, means

    def weighted(
        self,
        gradients: dict[str, Tensor],
        weights: dict[str, float],
        ramps: dict[str, float],
        reconstruction: Tensor,
        last_layer: Tensor,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Multiply each term's gradient with its weight and its factor.

        Args:
            gradients: At the reconstruction, `(B, C, H, W)`, by term.
            weights: Of the terms.
            ramps: How far each term has been faded in, in (0, 1].
            reconstruction: `(B, C, H, W)`, with the autoencoder's graph.
            last_layer: Weight of the decoder's last convolution.

        Returns:
            The weighted gradients, and the factors that depend on the data, for the log.
        """
        if self.config.kind == "shares":
            return self._by_shares(gradients, weights, ramps)
        result = {
            name: (weights[name] * ramps[name]) * gradient
            for name, gradient in gradients.items()
            if name != "adversarial"
        }
        if "adversarial" not in gradients:
            return result, {}
        raw = gradients["adversarial"]
        others = torch.zeros_like(raw)
        for gradient in result.values():
            others = others + gradient
        factor = self._adaptive(others, raw, reconstruction, last_layer)
        scale = (weights["adversarial"] * ramps["adversarial"]) * factor
        return result | {"adversarial": scale * raw}, {"adversarial": factor}

    def _adaptive(
        self, others: Tensor, adversarial: Tensor, reconstruction: Tensor, last_layer: Tensor
    ) -> Tensor:
        """What the adversarial term's weight is multiplied with: a scalar on the device.

        Esser et al. 2021, "Taming transformers", equation 7: the ratio of the norms of the other
        terms' gradient and of the adversarial one. In the first step that measures them it is 0.
        """
        config = self.config
        if config.kind == "fixed":
            return others.new_ones(())
        for name, gradient in {"others": others, "adversarial": adversarial}.items():
            if config.at == "last_layer":
                # This gradient sums over the batch, so its norm waits for the average over all.
                measured = last_layer_gradient(gradient, reconstruction, last_layer)
            else:
                measured = mean_square_norm(gradient)
            self.means.observe(f"{config.at}/{name}", measured)
        target = self.means.get(f"{config.at}/others")
        current = self.means.get(f"{config.at}/adversarial")
        if target is None or current is None:
            return others.new_zeros(())
        return (target / current.clamp_min(_TINY)).sqrt().clamp_max(config.max_weight)

    def _by_shares(
        self, gradients: dict[str, Tensor], weights: dict[str, float], ramps: dict[str, float]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Each term's norm relative to the pixel term's is that of their shares."""
        shares = self.config.shares
        result, factors = {}, {}
        for name, gradient in gradients.items():
            self.means.observe(f"shares/{name}", mean_square_norm(gradient))
        pixel = self.means.get("shares/pixel")
        for name, gradient in gradients.items():
            if name == "pixel":
                result[name] = weights[name] * gradient
                continue
            current = self.means.get(f"shares/{name}")
            if pixel is None or current is None:
                factor = gradient.new_zeros(())
            else:
                ratio = (pixel / current.clamp_min(_TINY)).sqrt() * weights["pixel"]
                factor = (ratio * (shares[name] / shares["pixel"])).clamp_max(
                    self.config.max_weight
                )
            factors[name] = factor
            result[name] = (ramps[name] * factor) * gradient
        return result, factors

    def finishers(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What to make of measured values once they were averaged, by name."""
        return {"last_layer/others": _square_norm, "last_layer/adversarial": _square_norm}


def gradient_at(value: Tensor, leaf: Tensor) -> Tensor:
    """d(value)/d(leaf), `(B, C, H, W)`.

    The gradient of a mean is tiny per pixel; a power of two, exact in every format, lifts it over
    the underflow of a critic that runs in float16.
    """
    scale = 2.0 ** round(math.log2(leaf.numel()))
    (gradient,) = torch.autograd.grad(value * scale, leaf, retain_graph=True)
    return gradient / scale


def mean_square_norm(gradient: Tensor) -> Tensor:
    """Mean over the samples of the squared norm of each sample's own gradient.

    The gradient of a batch's mean is 1/B of each sample's own; undoing that makes the number the
    same for every micro-batch size.
    """
    own = gradient * gradient.shape[0]
    return reduce(own.square(), "b c h w -> b", "sum").mean()


def mean_inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the samples of the inner product of each sample's own two gradients."""
    own = a.shape[0] ** 2 * a * b
    return reduce(own, "b c h w -> b", "sum").mean()


def _square_norm(gradient: Tensor) -> Tensor:
    return gradient.square().sum()


def last_layer_gradient(gradient: Tensor, reconstruction: Tensor, weight: Tensor) -> Tensor:
    """What a gradient at the reconstruction gives at the last convolution: one weight gradient."""
    scale = 2.0 ** round(math.log2(gradient.numel()))
    (result,) = torch.autograd.grad(reconstruction, weight, gradient * scale, retain_graph=True)
    return result / scale
