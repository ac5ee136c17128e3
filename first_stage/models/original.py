"""The encoder that a fine-tuned run began from, kept beside the one that learns."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from first_stage.models.bottlenecks import Encoded
from first_stage.models.first_stage import FirstStage


class OriginalEncoder(nn.Module):
    """A frozen copy of a first stage's encoder: what its latents meant before they were trained on.

    It is no part of the export. A checkpoint holds it, so that a run goes on without the files it
    began from.

    Args:
        stage: The first stage, before anything of it learns; inflated, if it is to be.
        more: How many of its latent channels, the last ones, were added to the original's.

    Attributes:
        channels: How many of the first latent channels the original had, a tensor `()`.
        held: The same as a number, so that no step waits for it.
    """

    channels: Tensor

    def __init__(self, stage: FirstStage, more: int = 0):
        super().__init__()
        self.model = _encoder_alone(stage).requires_grad_(False).eval()
        self.held = stage.latent_channels - more
        self.register_buffer("channels", torch.tensor(self.held))
        self.register_load_state_dict_post_hook(_read_channels)  # type: ignore[no-untyped-call]
        self._family, self._bottleneck = stage.family, stage.family.bottleneck(stage.model)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Encoded:
        """The latents, of all channels, that images `(B, C_in, H, W)` in [-1, 1] once had."""
        dtype = next(self.model.parameters()).dtype
        code = self._family.to_code(self.model, images.to(dtype))
        return self._bottleneck.encode(code if dtype == torch.float64 else code.float())


def _read_channels(original: OriginalEncoder, _: Any) -> None:
    original.held = int(original.channels)


def _encoder_alone(stage: FirstStage) -> Any:
    """A copy of the diffusers model without what encoding does not need."""
    encoder = {id(m) for part in stage.family.encoder_parts(stage.model) for m in part.modules()}
    alone = copy.deepcopy(stage.model)
    for name, child in stage.model.named_children():
        if id(child) not in encoder:
            setattr(alone, name, None)
    return alone
