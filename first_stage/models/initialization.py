"""How the weights of a new first stage begin.

As diffusers builds it, a new autoencoder first learns brightness and stays at that for hundreds of
steps before it finds colors: what tells colors apart is little against the noise that is drawn
around its latents (a variance of about 1), and passes through residual branches of random weights.
Begun quietly it is nearly linear, and finds them in fewer steps (measured in
`docs/concepts/how-it-is-trained.md`):

- the last layer of every residual branch is zero, so that each block begins as its shortcut
  (Goyal et al. 2017, section 5.1, for the last norm of a branch);
- the posterior's log-variance begins at -6, a deviation of 0.05.

Neither changes what can be learned, the architecture, or anything that is exported.
"""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

QUIET_LOGVAR = -6.0
"""Log-variance at which a posterior begins quietly."""


@torch.no_grad()
def silence_branches(model: nn.Module) -> int:
    """Set the last layer of every residual branch to zero.

    Args:
        model: A diffusers autoencoder; it is changed.

    Returns:
        How many branches there were: residual blocks and attentions.
    """
    ends = list(filter(None, map(_last_layer, model.modules())))
    for layer in ends:
        nn.init.zeros_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return len(ends)


def _last_layer(module: nn.Module) -> Any:
    if isinstance(module, ResnetBlock2D):
        return module.conv2
    if isinstance(module, Attention) and module.residual_connection:
        return module.to_out[0]
    return None


@torch.no_grad()
def quiet_posterior(to_moments: nn.Conv2d, logvar: float = QUIET_LOGVAR) -> None:
    """Begin with little noise in the latents.

    Args:
        to_moments: The convolution that puts out C means and then C log-variances; its
            log-variances' bias is changed.
        logvar: Where they begin, natural logarithm.
    """
    assert to_moments.bias is not None
    nn.init.constant_(to_moments.bias[to_moments.out_channels // 2 :], logvar)
