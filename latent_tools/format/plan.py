"""The plan: which unit encodes which sample, fixed before the first encode.

A *unit* is a fixed slice of the data set with one pixel shape; it becomes one shard and one commit.
The plan depends on the data set, the shapes and the unit's size alone, never on the number of
processes. When the data set grows, units are added behind the planned ones, which never change.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from first_stage.files import patiently
from latent_tools.format.files import CacheError, write_bytes

Shape = tuple[int, int]
"""(height, width) of the encoded pixels."""

FILE = "plan.parquet"
_BLOCK = 1 << 16
_KOHYA_STEP, _KOHYA_SMALLEST, _KOHYA_LARGEST = 64, 256, 1024


@dataclass(frozen=True)
class Unit:
    """One unit of the plan.

    Attributes:
        number: Its number, from 0.
        shape: (height, width) of its samples' pixels.
        start: First row of the plan's table.
        stop: Row behind the last.
    """

    number: int
    shape: Shape
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Plan:
    """All samples by unit.

    Attributes:
        table: Columns `id`, `height`, `width`, `unit`, `row`; sorted by unit and row.
    """

    table: pa.Table

    def __len__(self) -> int:
        return self.table.num_rows

    @property
    def units(self) -> list[Unit]:
        """The units in order."""
        if not len(self):
            return []
        numbers = self.table["unit"].to_numpy()
        starts = np.flatnonzero(np.diff(numbers, prepend=-1))
        stops = [*starts[1:].tolist(), len(self)]
        heights = self.table["height"].to_numpy()[starts].tolist()
        widths = self.table["width"].to_numpy()[starts].tolist()
        return [
            Unit(number, (height, width), start, stop)
            for number, height, width, start, stop in zip(
                numbers[starts].tolist(), heights, widths, starts.tolist(), stops, strict=True
            )
        ]

    def ids(self, unit: Unit) -> list[str]:
        """The ids of a unit's samples in order."""
        return self.table["id"].slice(unit.start, len(unit)).to_pylist()

    def places_in(self, ids: pa.Array) -> np.ndarray:
        """Where each planned sample stands in a list of ids; -1 for those not in it."""
        found = pc.index_in(self.table["id"], value_set=_as_ids(ids))
        return found.fill_null(-1).to_numpy()

    def new_ids(self, ids: pa.Array) -> np.ndarray:
        """Positions in a list of ids of those that are not planned yet, in order."""
        planned = pc.is_in(_as_ids(ids), value_set=self.table["id"].combine_chunks())
        return np.flatnonzero(~planned.to_numpy(zero_copy_only=False))

    def without(self, ids: Sequence[str]) -> "Plan":
        """The plan without some samples; the others keep their units."""
        dropped = pc.is_in(self.table["id"], value_set=_as_ids(ids))
        table = self.table.filter(pc.invert(dropped))
        units = table["unit"].to_numpy()
        starts = np.flatnonzero(np.diff(units, prepend=-1))
        sizes = np.diff([*starts.tolist(), len(units)])
        rows = np.arange(len(units)) - np.repeat(starts, sizes)
        place = table.column_names.index("row")
        return Plan(table.set_column(place, "row", pa.array(rows, pa.int32())))

    def extend(
        self,
        ids: Sequence[str] | pa.Array,
        shapes: np.ndarray,
        unit_size: int,
        first: int | None = None,
    ) -> "Plan":
        """The plan with more samples in new units; the units that are there stay as they are.

        Args:
            ids: Ids of the new samples.
            shapes: `(len(ids), 2)`, their heights and widths.
            unit_size: Samples per unit; the last unit of each shape has what is left over.
            first: Number of the first new unit; `None`: behind the last one.

        Returns:
            The longer plan.
        """
        number = first
        if number is None:
            number = int(self.table["unit"][-1].as_py()) + 1 if len(self) else 0
        parts: list[tuple[np.ndarray, Shape, np.ndarray]] = []
        for shape in map(tuple, np.unique(shapes, axis=0).tolist() if len(shapes) else []):
            rows = np.flatnonzero((shapes == shape).all(1))
            parts.append((rows, shape, number + np.arange(len(rows)) // unit_size))
            number += math.ceil(len(rows) / unit_size)
        if not parts:
            return self
        names = _as_ids(ids)
        added = [
            pa.table(
                {
                    "id": names.take(pa.array(rows)),
                    "height": pa.array(np.full(len(rows), shape[0]), pa.int32()),
                    "width": pa.array(np.full(len(rows), shape[1]), pa.int32()),
                    "unit": pa.array(units, pa.int32()),
                    "row": pa.array(np.arange(len(rows)) % unit_size, pa.int32()),
                }
            )
            for rows, shape, units in parts
        ]
        return Plan(pa.concat_tables([self.table, *added]))

    @staticmethod
    def empty() -> "Plan":
        """No samples."""
        return Plan(_SCHEMA.empty_table())

    @staticmethod
    def of_units(units: Iterable[tuple[int, Shape, Sequence[str]]]) -> "Plan":
        """A plan made anew from what its units hold.

        Args:
            units: Number, shape and ids of each, in the order of their numbers.
        """
        parts = [
            pa.table(
                {
                    "id": _as_ids(ids),
                    "height": pa.array([height] * len(ids), pa.int32()),
                    "width": pa.array([width] * len(ids), pa.int32()),
                    "unit": pa.array([number] * len(ids), pa.int32()),
                    "row": pa.array(range(len(ids)), pa.int32()),
                }
            )
            for number, (height, width), ids in units
        ]
        return Plan(pa.concat_tables([_SCHEMA.empty_table(), *parts]))

    def save(self, folder: Path) -> None:
        """Write `plan.parquet` atomically."""
        sink = pa.BufferOutputStream()
        pq.write_table(self.table, sink, compression="zstd")
        write_bytes(folder / FILE, sink.getvalue().to_pybytes())

    @staticmethod
    def load(folder: Path) -> "Plan":
        """Read `plan.parquet`; an empty plan where there is none yet.

        Raises:
            CacheError: When the file is damaged.
        """
        path = folder / FILE
        if not path.exists():
            return Plan.empty()
        try:
            read = patiently(lambda: pq.read_table(path, columns=_SCHEMA.names), repr(str(path)))
            return Plan(read.cast(_SCHEMA))
        except (OSError, pa.ArrowException) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CacheError(
                f"the plan {str(path)!r} cannot be read ({reason}): delete that file and start the "
                "command that makes the cache again; it plans anew from the commits, and nothing "
                "is encoded twice"
            ) from error


IDS = pa.large_string()
"""The type of ids: with 32 bits, those of 80 million samples would be too long for one array."""
_SCHEMA = pa.schema(
    {
        "id": IDS,
        "height": pa.int32(),
        "width": pa.int32(),
        "unit": pa.int32(),
        "row": pa.int32(),
    }
)


def _as_ids(ids: Sequence[str] | pa.Array) -> pa.Array:
    return ids.cast(IDS) if isinstance(ids, pa.Array) else pa.array(ids, IDS)


def duplicate_id(ids: pa.Array) -> str | None:
    """An id that stands more than once in a list, or `None`."""
    if pc.count_distinct(ids).as_py() == len(ids):
        return None
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    return str(repeated[0]["values"])


def bucket_shapes(resolution: int, step: int, max_aspect: float = 2.0) -> list[Shape]:
    """Pixel shapes of about the same area, from tall to wide.

    For every height that is a multiple of `step`, the largest width that is one and keeps the area
    within `resolution` squared; as in NovelAI's aspect-ratio bucketing (2022).

    Args:
        resolution: Side of the square with the largest area.
        step: Both sides are multiples of it.
        max_aspect: The longer side is at most this many times the shorter one.

    Returns:
        (height, width), sorted; the square is among them.

    Raises:
        CacheError: When `resolution` is no multiple of `step`.
    """
    if resolution % step:
        raise CacheError(
            f"data.resolution {resolution} is no multiple of {step}, the step of the buckets: the "
            f"nearest are {resolution // step * step or step} and {(resolution // step + 1) * step}"
        )
    shapes = {(resolution, resolution)}
    for long in range(resolution, int(resolution * math.sqrt(max_aspect)) + step, step):
        short = resolution**2 // long // step * step
        if short and long <= max_aspect * short:
            shapes |= {(long, short), (short, long)}
    return sorted(shapes)


def parse_buckets(text: str, resolution: int, step: int) -> list[Shape]:
    """Read `--buckets`.

    Args:
        text: `auto`, `kohya`, or heights and widths as in `256x256,320x192`.
        resolution: Side of the square whose area `auto` and `kohya` keep.
        step: What every side must be a multiple of: the downsample factor; `auto` takes coarser
            steps of about an eighth of the resolution.

    Returns:
        The shapes (height, width), sorted.

    Raises:
        CacheError: When a shape is not one, or no multiple of `step`.
    """
    if text == "kohya":
        return kohya_buckets(resolution, step)
    if text == "auto":
        return bucket_shapes(resolution, step * max(1, resolution // 8 // step))
    shapes = set()
    for part in text.split(","):
        sides = part.strip().lower().split("x")
        if len(sides) != 2 or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise CacheError(
                f"buckets has {part.strip()!r}: give auto, or heights and widths as in "
                "256x256,320x192"
            )
        height, width = int(sides[0]), int(sides[1])
        if height % step or width % step:
            raise CacheError(
                f"buckets has {height}x{width}, but both sides must be multiples of the first "
                f"stage's downsample factor {step}"
            )
        shapes.add((height, width))
    return sorted(shapes)


def kohya_buckets(resolution: int, step: int) -> list[Shape]:
    """The shapes that kohya's scripts make: their `make_bucket_resolutions` with its defaults.

    For every width from 256 to 1024 pixels (or the resolution, when it is larger) in steps of 64
    the largest height that keeps the area, in the scripts' order: by width, then height.

    Args:
        resolution: Side of the square with the largest area.
        step: Both sides must be multiples of it: the downsample factor.

    Raises:
        CacheError: When 64 is no multiple of `step`.
    """
    if _KOHYA_STEP % step:
        raise CacheError(
            f"buckets kohya makes sides in steps of {_KOHYA_STEP}, which the first stage's "
            f"downsample factor {step} does not divide"
        )
    largest = max(_KOHYA_LARGEST, resolution)
    square = resolution // _KOHYA_STEP * _KOHYA_STEP
    if square < 1:
        raise CacheError(f"data.resolution {resolution} is below 64, the step of kohya's buckets")
    found = {(square, square)}
    for width in range(_KOHYA_SMALLEST, largest + 1, _KOHYA_STEP):
        height = min(largest, resolution**2 // width // _KOHYA_STEP * _KOHYA_STEP)
        if height >= _KOHYA_SMALLEST:
            found |= {(width, height), (height, width)}
    return [(height, width) for width, height in sorted(found)]


def kohya_bucket(sizes: np.ndarray, buckets: Sequence[Shape]) -> np.ndarray:
    """The bucket that kohya's scripts choose: the nearest width-to-height ratio.

    Args:
        sizes: `(N, 2)`, heights and widths of images; 0 where unknown.
        buckets: From `kohya_buckets`; an image of just that shape takes it.

    Returns:
        `(N, 2)`, heights and widths.
    """
    shapes = np.array(buckets)
    chosen = np.empty((len(sizes), 2), np.int32)
    # A block at a time: a row of distances for each image would not be small.
    for start in range(0, len(sizes), _BLOCK):
        block = sizes[start : start + _BLOCK]
        known = (block > 0).all(1)
        ratio = np.where(known, block[:, 1], 1) / np.where(known, block[:, 0], 1)
        order = np.abs((shapes[:, 1] / shapes[:, 0])[None] - ratio[:, None]).argmin(1)
        exact = (block[:, None] == shapes[None]).all(2)
        chosen[start : start + _BLOCK] = shapes[np.where(exact.any(1), exact.argmax(1), order)]
    return chosen


def nearest_bucket(sizes: np.ndarray, buckets: Sequence[Shape]) -> np.ndarray:
    """The bucket with the nearest aspect ratio for each image.

    Args:
        sizes: `(N, 2)`, heights and widths of images; 0 where unknown.
        buckets: The shapes; where two are equally near, the first wins.

    Returns:
        `(N, 2)`, heights and widths. Images of unknown size get the squarest bucket.
    """
    shapes = np.array(buckets)
    targets = np.log(shapes[:, 0] / shapes[:, 1])
    chosen = np.empty((len(sizes), 2), np.int32)
    # A block at a time: a row of distances for each image would not be small.
    for start in range(0, len(sizes), _BLOCK):
        block = sizes[start : start + _BLOCK]
        known = (block > 0).all(1)
        aspect = np.log(np.where(known, block[:, 0], 1) / np.where(known, block[:, 1], 1))
        order = np.argmin(np.abs(aspect[:, None] - targets[None]), axis=1)
        chosen[start : start + _BLOCK] = shapes[order]
    return chosen


def committed_of(units: Iterable[Unit], folder: Path) -> set[int]:
    """Numbers of those planned units whose commit is there."""
    return {unit.number for unit in units} & set(committed_units(folder))


def committed_units(folder: Path) -> Iterator[int]:
    """Numbers of the units whose commit is there."""
    commits = folder / "commits"
    if commits.is_dir():
        for path in patiently(lambda: list(commits.iterdir()), repr(str(commits))):
            name = path.stem
            if path.suffix == ".json" and name[:1] == "u" and name[1:].isdecimal():
                yield int(name[1:])
