"""How far latents moved from one first stage to another, on the same images."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from first_stage.errors import UserError
from first_stage.metrics.moments import ChannelMoments
from first_stage.models.bottlenecks import Encoded
from first_stage.models.discrete import Discrete
from first_stage.models.first_stage import FirstStage, pad


class Drift:
    """Sums over images of what `after` makes of them, less what `before` did.

    Args:
        before: The first stage whose latents are the measure, in eval mode.
        after: The other one; on the same device.

    Raises:
        UserError: When their images or latents are of unlike channels or sizes.
    """

    def __init__(self, before: FirstStage, after: FirstStage):
        check_alike(before, after)
        self.before, self.after = before, after
        self._moments = ChannelMoments(before.latent_channels)
        self._squares = np.zeros(before.latent_channels)
        self._largest = 0.0
        self._tokens = self._changed = 0

    @torch.no_grad()
    def update(self, images: Tensor, encoded: Encoded) -> list[float]:
        """Count images.

        Args:
            images: `(B, C_in, H, W)` in [-1, 1].
            encoded: What `after` made of them, padded.

        Returns:
            Root mean square of each image's difference.
        """
        padded = pad(images, self.before.downsample_factor)
        earlier = self.before.encode(padded.to(self.before.device, self.before.dtype))
        self._moments.update(earlier.latents, earlier.logvar)
        difference = (encoded.latents.cpu().double() - earlier.latents.cpu().double()).square()
        self._squares = self._squares + difference.sum((0, 2, 3)).numpy()
        # A cache stores the posterior's variance too.
        both = (encoded.moments, earlier.moments)
        if both[0].shape == both[1].shape:
            self._largest = max(self._largest, float((both[0] - both[1]).abs().max()))
        else:
            self._largest = math.inf
        one, other = self.before.bottleneck, self.after.bottleneck
        if isinstance(one, Discrete) and isinstance(other, Discrete):
            tokens = one.tokens(earlier.latents)
            self._tokens += tokens.numel()
            self._changed += int((tokens != other.tokens(encoded.latents)).sum())
        return difference.mean((1, 2, 3)).sqrt().tolist()

    def sums(self) -> dict[str, Any]:
        """What was counted, for another process."""
        return {
            "moments": self._moments,
            "squares": self._squares,
            "largest": self._largest,
            "tokens": (self._tokens, self._changed),
        }

    def merge(self, other: dict[str, Any]) -> None:
        """Add what another process counted."""
        self._moments.merge(other["moments"])
        self._squares = self._squares + other["squares"]
        self._largest = max(self._largest, other["largest"])
        self._tokens += other["tokens"][0]
        self._changed += other["tokens"][1]

    def summary(self) -> dict[str, Any]:
        """The figures.

        Returns:
            `exact`: whether every latent, and every log-variance, is the same bit for bit;
            `largest`: the greatest difference; `relative`: root mean square of the difference of
            the latents, as a share of their standard deviation over all channels, and `channels`:
            the same of each channel (`None` for one that never varies); `tokens_changed`: share of
            tokens that are others now, `None` without codes.
        """
        mean_square = self._squares / max(self._moments.count, 1)
        std = np.sqrt(self._moments.signal_variance)
        spread = self._moments.overall[1]
        total = math.sqrt(float(mean_square.mean()))
        return {
            "exact": self._largest == 0.0 and self._changed == 0,
            "largest": self._largest if math.isfinite(self._largest) else None,
            "relative": total / spread if spread > 0 else (0.0 if total == 0 else None),
            "channels": [
                math.sqrt(square) / deviation if deviation > 0 else None
                for square, deviation in zip(mean_square.tolist(), std.tolist(), strict=True)
            ],
            "tokens_changed": self._changed / self._tokens if self._tokens else None,
        }


def check_alike(before: FirstStage, after: FirstStage) -> None:
    """Refuse two first stages between which there is no before and after.

    Raises:
        UserError: Naming what differs.
    """
    layouts = [
        (
            f"images of {stage.in_channels} channels",
            f"latents of {stage.latent_channels} channels at 1/{stage.downsample_factor} of the "
            "size",
        )
        for stage in (before, after)
    ]
    for one, other in zip(*layouts, strict=True):
        if one != other:
            raise UserError(
                f"{before.name!r} has {one}, but {after.name!r} {other}: before and after must be "
                "alike in both; to compare others, name both in --first_stage"
            )


def drift_in_words(drift: dict[str, Any]) -> str:
    """What the figures say, in a sentence."""
    if drift["exact"]:
        return (
            "Latents are the same bit for bit: caches, and diffusion models trained on them, go on "
            "working"
        )
    relative, tokens = drift["relative"], drift["tokens_changed"]
    how = "" if relative is None else f" by {relative:.2g} of their standard deviation"
    text = f"Latents moved{how}"
    if tokens is not None:
        text += f", and {tokens:.1%} of the tokens are others"
    return f"{text}: make caches anew, and train diffusion models on the new ones, or further"
