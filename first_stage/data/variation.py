"""What differs each time that training sees a sample: place, size, mirror image, colors.

Everything is a function of numbers drawn for the epoch and the sample, so that neither processes
nor workers nor an interruption change it.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from first_stage.data.images import Mirror, View

Flip = Literal["none", "horizontal", "both", "dihedral"]
"""Which mirror images are drawn: left to right; top to bottom too; the eight of a square."""

_FROM_RGB = np.array(
    [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32
)
"""YIQ of the NTSC: luma, and two axes of color that are zero for gray."""
_TO_RGB = np.linalg.inv(_FROM_RGB)


@dataclass(frozen=True)
class Variation:
    """How views of a sample vary.

    Attributes:
        random_crop: Random crops; centre crops otherwise.
        flip: Which mirror images are drawn, all equally often; true: horizontal.
        least_scale: The view is shrunk by a factor drawn from here to 1, evenly on a log scale.
        jitter_saturation: Of half of the crops colors are multiplied by a factor from 1 - this to
            1 + this; luma stays.
        jitter_hue: Of the same ones hues turn by up to this share of half a circle, either way.
    """

    random_crop: bool = True
    flip: Flip | bool = "horizontal"
    least_scale: float = 1.0
    jitter_saturation: float = 0.0
    jitter_hue: float = 0.0

    NUMBERS: ClassVar[int] = 9
    """How many uniform numbers a sample takes, whatever varies: `draw` below."""

    def view(self, view: View, draw: np.ndarray) -> View:
        """A view, shrunk."""
        if self.least_scale == 1:
            return view
        return replace(view, shrink=self.least_scale ** float(draw[5]))

    def place(self, draw: np.ndarray) -> tuple[float | None, float | None]:
        """Where its crop lies, as in `View.apply`."""
        return (float(draw[0]), float(draw[1])) if self.random_crop else (None, None)

    def mirror(self, draw: np.ndarray) -> Mirror:
        """How its crop is laid."""
        flip = flip_named(self.flip)
        heads = [bool(number < 0.5) for number in draw[2:5]]
        return Mirror(
            horizontal=flip != "none" and heads[0],
            vertical=flip in ("both", "dihedral") and heads[1],
            transposed=flip == "dihedral" and heads[2],
        )

    def colors(self, pixels: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """A crop with other colors.

        Args:
            pixels: `(H, W, C)` in 0..255, uint8 or float32; alpha after the third channel stays.
            draw: The sample's numbers.
        """
        if not (self.jitter_saturation or self.jitter_hue) or draw[8] >= 0.5:
            return pixels
        turn = math.pi * self.jitter_hue * (2 * float(draw[6]) - 1)
        factor = 1 + self.jitter_saturation * (2 * float(draw[7]) - 1)
        along, across = factor * math.cos(turn), factor * math.sin(turn)
        change = np.array([[1, 0, 0], [0, along, -across], [0, across, along]], np.float32)
        colors = pixels[:, :, :3] @ (_TO_RGB @ change @ _FROM_RGB).T
        colors = colors.clip(0, 255)
        changed = pixels.copy()
        changed[:, :, :3] = colors.round() if pixels.dtype == np.uint8 else colors
        return changed


def flip_named(flip: Flip | bool) -> Flip:
    """The name of a choice of mirror images; true and false are `horizontal` and `none`."""
    if isinstance(flip, bool):
        return "horizontal" if flip else "none"
    return flip
