"""Which images a command takes, and how it sees them: the part that all commands share."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from first_stage.config.types import NonNegativeInt, PositiveInt, may_change
from first_stage.data import Inventory, Reading, Source, View, open_inventory, take_inventory
from first_stage.data.checks import large_enough, only_large
from first_stage.data.sources import Split
from first_stage.errors import ConfigError

Once = Callable[[Callable[[], Any]], Any]
"""Has something made by one process of a job, and gives it to all."""


def here(make: Callable[[], Any]) -> Any:
    """Make it in this process: there is no other."""
    return make()


def quiet(line: str) -> None:
    """Say nothing."""


def shorter_side(resize: int | None, resolution: int) -> int | None:
    """What `resize` means beside a resolution.

    Args:
        resize: Pixels; `None`: the resolution; 0: images keep their size.
        resolution: Side of the square crop, in pixels.

    Returns:
        As in `View.resize`: shorter side after resizing, or `None` to keep sizes.
    """
    return resolution if resize is None else (resize or None)


@dataclass(frozen=True)
class ImagesConfig:
    """The images of a command."""

    path: str | None = None
    """A folder (searched to its bottom) of images, or of parquet or WebDataset (.tar) shards; one
    such file; a pattern (dir/*.tar, {a,b}, {000..123}.tar); several as [one, other]; a text file
    that lists images; a folder written by datasets' save_to_disk; a built-in set (photos,
    digits); or a data set id on the hub."""
    resolution: PositiveInt | None = None
    """Side of the square centre crop, in pixels; null: the first stage's training resolution."""
    resize: NonNegativeInt | None = None
    """Shorter side after resizing, in pixels (bicubic, antialiased); null: the resolution; 0:
    images keep their size. An image smaller than the crop is always enlarged to fit."""
    crop_shape: tuple[PositiveInt, PositiveInt] | None = None
    """Height and width of the crop, in pixels, instead of a square: images are resized until they
    just cover it, and resolution and resize do not matter."""
    image_column: str | None = None
    """Column with the images, for data sets that have columns; null: found by its type."""
    split: str | None = "train"
    """Which split, where names of files or folders or the data set itself say splits; all: every
    one."""
    min_side: NonNegativeInt = 0
    """Images with a shorter side below this many pixels are skipped and counted, instead of
    enlarged; their headers are read first. 0: none are."""
    channels: tuple[int, ...] | None = None
    """Which of the stored channels are used, counted from 0, as in [3,2,1]; null: all of them, and
    colors become the channels asked for by the usual rules (gray, RGB, alpha)."""
    value_range: tuple[float, float] | None = None
    """Stored values that become -1 and 1, as in [0,4095] for 12 bits or [-1024,3071] for Hounsfield
    units; values outside are clipped. null: the range of 8-bit and unsigned 16-bit integers."""
    color: Literal["srgb", "keep"] = "srgb"
    """Embedded color profiles: srgb converts to sRGB, keep takes the numbers as they are."""
    decode: Literal["full", "reduced"] = "full"
    """How JPEGs are decoded: full; reduced: at 1/2, 1/4 or 1/8 of their size where that leaves each
    side twice the pixels wanted, several times faster for photos of many megapixels, and not quite
    the same pixels."""
    display: tuple[int, ...] | None = may_change(None)
    """Which channels pictures show and networks for colors see, one or three, counted from 0 among
    those that are used; null: the colors, or the first three."""
    max_pixels: PositiveInt = may_change(100_000_000)
    """Images of more pixels are not decoded, and listed: a small file can unpack to gigabytes."""

    def view(self, resolution: int) -> View:
        """How images are seen at a resolution, in pixels, or as `crop_shape` says."""
        return View(resolution, shorter_side(self.resize, resolution), self.crop_shape)

    def reading(self, channels: int) -> Reading:
        """How files are read into so many channels.

        Raises:
            ConfigError: When that cannot work.
        """
        for problem in self.reading_problems(channels):
            raise ConfigError(problem)
        return Reading(
            channels, self.channels, self.value_range, self.color, self.max_pixels, self.display,
            reduced=self.decode == "reduced",
        )  # fmt: skip

    def reading_problems(self, channels: int) -> Iterator[str]:
        """What cannot work in reading files into so many channels."""
        if self.channels is not None:
            given = list(self.channels)
            if not given or min(given) < 0:
                yield f"data.channels is {given}; channels are counted from 0"
            elif len(given) != channels:
                yield (
                    f"data.channels {given} chooses {len(given)}, but model.in_channels is "
                    f"{channels}: make them equal"
                )
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            given_range = list(self.value_range)
            yield f"data.value_range is {given_range}; give [low, high] with low < high"
        if self.display is not None and (
            len(self.display) not in (1, 3) or not all(0 <= c < channels for c in self.display)
        ):
            yield (
                f"data.display is {list(self.display)}; give one or three channels, each from 0 to "
                f"{channels - 1}"
            )

    def open(
        self,
        part: Split,
        *,
        say: Callable[[str], None] = quiet,
        once: Once = here,
        keep: Callable[[Inventory], None] | None = None,
    ) -> Source:
        """Open the images.

        Args:
            part: Which part of a built-in set; of other sets, `split` says it.
            say: Called with lines for the user: what was found, and what was left out.
            once: Lists files and reads headers, on one process for all.
            keep: Called on one process with everything that was found and left out.

        Raises:
            ConfigError: When no path is given.
            DataError: When there are no images.
        """
        if not self.path:
            raise ConfigError("data.path is missing: give a folder of images, a hub id, or a set")
        return self.open_at(self.path, part, self.split, say=say, once=once, keep=keep)

    def open_at(
        self,
        path: str,
        part: Split,
        split: str | None,
        *,
        say: Callable[[str], None] = quiet,
        once: Once = here,
        keep: Callable[[Inventory], None] | None = None,
    ) -> Source:
        """Open other images in the same way; see `open`."""
        inventory = once(lambda: take_inventory(path, split))
        source = open_inventory(inventory, self.image_column, part, split, say)
        if keep is not None and inventory.kind in ("images", "parquet", "tar"):
            once(lambda: keep(inventory))
        if self.min_side:
            chosen = once(lambda: large_enough(source, self.min_side))
            return only_large(source, chosen, self.min_side, say)
        return source
