"""What every source of images gives."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from first_stage.data.decode import Encoded


@dataclass(frozen=True)
class Sample:
    """One sample of a source.

    Attributes:
        id: Stable and unique in its source: the path relative to the data folder *with* its
            extension, or the shard's name and the key or row in it.
        image: Encoded bytes, a path, a decoded picture, an array, or why there is none.
        columns: Label, caption and the like; read when they are asked for.
    """

    id: str
    image: Encoded
    columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Source(Protocol):
    """A fixed list of samples."""

    name: str
    """What a user would recognise: the path or id."""
    columns: tuple[str, ...]
    """Names of the columns that samples can carry beside the image."""

    def __len__(self) -> int: ...

    def id(self, index: int) -> str:
        """The id of a sample, without reading its image."""
        ...

    def read(self, index: int) -> Sample:
        """Read one sample; what is in the file is not decoded yet."""
        ...
