"""Parts of a step written down anew, plainly: what `test_step.py` and others compare with."""

import torch
from torch import Tensor, nn


def kl_to_prior(mean: Tensor, logvar: Tensor, images: Tensor) -> Tensor:
    """KL divergence to N(0, I), summed over an image's latents, for each value of its pixels."""
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    return kl.sum((1, 2, 3)).mean() / images[0].numel()


def critic_gradient(critic: nn.Module, targets: Tensor, decoded: Tensor) -> list[Tensor]:
    """Gradient of the hinge loss of the critic's parameters; fakes are those of `decoded`."""
    reals, fakes = critic(targets).logits, critic(decoded.detach()).logits
    loss = torch.relu(1 - reals).mean() + torch.relu(1 + fakes).mean()
    return list(torch.autograd.grad(loss, list(critic.parameters())))
