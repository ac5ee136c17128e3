"""What keeps a critic in bounds: penalties on its slope, on its logits, and on its weights.

For the penalties on the slope a critic's value of an image is the mean of its patch logits, the
number whose expectation the adversarial losses contain; norms are taken over all channels and
pixels of an image in [-1, 1], and averaged over the batch.
"""

from collections.abc import Callable, Iterable

import torch
from einops import reduce
from torch import Tensor, nn

ToLogits = Callable[[Tensor], Tensor]
"""Images `(B, C, H, W)` to patch logits `(B, S, h, w)`."""


def slopes(to_logits: ToLogits, images: Tensor) -> Tensor:
    """Gradient of each image's value with respect to its pixels, `(B, C, H, W)`.

    It carries a graph over the critic's parameters, so that a penalty on it can be minimised.
    """
    images = images.detach().requires_grad_()
    values = to_logits(images).flatten(1).mean(1)
    (gradient,) = torch.autograd.grad(values.sum(), images, create_graph=True)
    return gradient


def gradient_penalty(to_logits: ToLogits, reals: Tensor, fakes: Tensor, mix: Tensor) -> Tensor:
    """E[(|grad D(x^)| - 1)^2] on straight lines between reals and fakes.

    Gulrajani et al. 2017, "Improved training of Wasserstein GANs", equation 3, without the factor
    lambda.

    Args:
        to_logits: The critic's logits.
        reals: `(B, C, H, W)`.
        fakes: `(B, C, H, W)`.
        mix: `(B,)` uniform in [0, 1]: the share of the real in x^.
    """
    mix = mix.view(-1, 1, 1, 1)
    between = mix * reals.detach() + (1.0 - mix) * fakes.detach()
    norms = slopes(to_logits, between).flatten(1).norm(dim=1)
    return (norms - 1.0).square().mean()


def zero_centered_penalty(to_logits: ToLogits, images: Tensor) -> Tensor:
    """E[|grad D(x)|^2] / 2: R1 on reals, R2 on fakes, without the factor gamma.

    Mescheder et al. 2018, "Which training methods for GANs do actually converge?", equation 9.
    """
    return 0.5 * reduce(slopes(to_logits, images).square(), "b c h w -> b", "sum").mean()


def lecam(
    real_logits: Tensor, fake_logits: Tensor, real_anchor: Tensor, fake_anchor: Tensor
) -> Tensor:
    """E[(D(x) - a_F)^2] + E[(D(G(z)) - a_R)^2].

    Tseng et al. 2021, "Regularizing generative adversarial networks under limited data",
    equation 3.

    Args:
        real_logits: Of reals.
        fake_logits: Of fakes.
        real_anchor: a_R, a moving average of the mean logit of reals.
        fake_anchor: a_F, the same of fakes.
    """
    return (real_logits - fake_anchor).square().mean() + (fake_logits - real_anchor).square().mean()


@torch.no_grad()
def clip_weights(parameters: Iterable[nn.Parameter], limit: float) -> None:
    """Clamp every weight to [-limit, limit]: Arjovsky et al. 2017, algorithm 1, line 7."""
    for parameter in parameters:
        parameter.clamp_(-limit, limit)
