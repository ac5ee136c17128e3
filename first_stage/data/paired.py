"""Latents that were made before, beside the images they are of: what a decoder can learn from.

The cache that holds them is no part of this package; whoever knows one gives a `LatentStore`.
"""

from typing import Any, Protocol

from torch import Tensor

from first_stage.data.decode import Encoded, Reading
from first_stage.data.images import View
from first_stage.data.sample import Source


class PairedLatents(Protocol):
    """Latents of a source's samples; pickled into the decode workers."""

    def of(self, index: int, image: Encoded, flipped: bool) -> Tensor:
        """What the encoder gave for a sample.

        Args:
            index: Its place in the source.
            image: The sample as it is read now, its file as bytes.
            flipped: Of the picture mirrored left to right.

        Returns:
            `(2C, h, w)` moments, or latents `(C, h, w)`, float32; or tokens `(h, w)` int64.

        Raises:
            BrokenImage: When there are none, or the sample is another than they were made of.
        """
        ...


class LatentStore(Protocol):
    """Latents that are not paired with samples yet."""

    def pair(
        self,
        model: Any,
        source: Source,
        *,
        reading: Reading,
        view: View,
        flips: bool,
        missing: float,
    ) -> PairedLatents:
        """Find the latents of a source's samples.

        Args:
            model: The diffusers autoencoder whose encoder must have made them.
            source: The samples.
            reading: How files are read.
            view: How pictures are cropped, in their centre.
            flips: Whether mirrored pictures are asked for, too.
            missing: Largest share of the samples that may have no latents.

        Raises:
            UserError: When they are of another encoder, other crops, or other samples.
        """
        ...
