"""Which images a command takes, and how it sees them: the part that all commands share."""

from dataclasses import dataclass

from first_stage.config.types import NonNegativeInt, PositiveInt
from first_stage.data import Source, View, open_source
from first_stage.data.sources import Split
from first_stage.errors import ConfigError


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
    """A folder of images (nested or not), a folder written by datasets' save_to_disk, parquet or
    WebDataset (.tar) shards or a folder of them, a built-in set (photos, digits), or a data set id
    on the hub."""
    resolution: PositiveInt | None = None
    """Side of the square centre crop, in pixels; null: the first stage's training resolution."""
    resize: NonNegativeInt | None = None
    """Shorter side after resizing, in pixels (bicubic, antialiased); null: the resolution; 0:
    images keep their size. An image smaller than the crop is always enlarged to fit."""
    image_column: str | None = None
    """Column with the images, for data sets that have columns; null: found by its type."""
    split: str | None = "train"
    """Which split of a hub or saved data set."""

    def view(self, resolution: int) -> View:
        """How images are seen at a resolution, in pixels."""
        return View(resolution, shorter_side(self.resize, resolution))

    def open(self, part: Split) -> Source:
        """Open the images.

        Args:
            part: Which part of a built-in set; of other sets, `split` says it.

        Raises:
            ConfigError: When no path is given.
            DataError: When there are no images.
        """
        if not self.path:
            raise ConfigError("data.path is missing: give a folder of images, a hub id, or a set")
        return open_source(self.path, self.image_column, part, self.split or "train")
