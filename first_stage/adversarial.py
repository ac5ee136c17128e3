"""Matched pairs of critic loss and autoencoder loss.

Both functions of a pair take the logits of reals and of fakes, `(B, 1, h, w)`, and return a scalar:
the mean over images and patches.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class AdversarialPair(NamedTuple):
    """A critic's loss and the loss of its opponent, from the same paper.

    Attributes:
        critic: `(real_logits, fake_logits)` to the loss that the critic minimises.
        generator: `(real_logits, fake_logits)` to the loss that the autoencoder minimises.
    """

    critic: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor, Tensor], Tensor]


def hinge_critic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[max(0, 1 - D(x))] + E[max(0, 1 + D(G(z)))].

    Lim & Ye 2017, "Geometric GAN", equation 17.
    """
    return F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean()


def hinge_generator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-E[D(G(z))]: linear, so that its gradient does not vanish where the critic is sure.

    Lim & Ye 2017, "Geometric GAN", equation 18. The reals' logits play no part.
    """
    return -fake_logits.mean()


PAIRS: dict[str, AdversarialPair] = {
    "hinge": AdversarialPair(hinge_critic, hinge_generator),
}
