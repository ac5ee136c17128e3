"""JPEGs decoded at a part of their size: the same picture in the same place."""

import io

import numpy as np
import pytest
from cache_helpers import NumberReader, cache, options
from PIL import Image

from first_stage.data import Reading, View, open_image, open_source, pixels_of, size_of
from first_stage.errors import UserError
from latent_tools import LatentDataset, precompute

WHOLE, REDUCED = Reading(3), Reading(3, reduced=True)


def photo(size=(531, 379), seed=0) -> Image.Image:
    """Smooth, and different everywhere; sides that 8 does not divide."""
    coarse = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def jpeg(picture: Image.Image, orientation: int | None = None) -> bytes:
    exif = Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=95, exif=exif)
    return content.getvalue()


def seen(content: bytes, reading: Reading, view: View, **where) -> np.ndarray:
    picture = open_image(content, reading, view.scale)
    return pixels_of(view.apply(picture, **where)[0], reading).astype(float)


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / ((one - other) ** 2).mean())


@pytest.mark.parametrize("orientation", [None, *range(1, 9)])
@pytest.mark.parametrize("view", [View(40, 45), View(90, 90), View(0, None, (32, 64))])
def test_what_is_seen_lies_where_it_lay(orientation, view):
    content = jpeg(photo(), orientation)
    whole = open_image(content, WHOLE, view.scale)
    reduced = open_image(content, REDUCED, view.scale)
    assert reduced.width <= whole.width / 2 + 1  # it was decoded smaller
    assert size_of(reduced) == size_of(whole) == (whole.height, whole.width)
    for u, v in ((None, None), (0.0, 0.999), (0.999, 0.0)):
        assert view.apply(reduced, u, v)[1] == view.apply(whole, u, v)[1]
        pair = [seen(content, reading, view, u=u, v=v) for reading in (REDUCED, WHOLE)]
        assert decibels(*pair) > 44
    small, _ = view.apply(reduced)
    assert size_of(small) == view.size


def test_nothing_else_is_decoded_smaller():
    view = View(64, 64)
    for content in (jpeg(photo((250, 250))), png(photo())):
        assert np.array_equal(seen(content, REDUCED, view), seen(content, WHOLE, view))
    large = jpeg(photo())
    assert np.array_equal(
        seen(large, REDUCED, View(64, None)), seen(large, WHOLE, View(64, None))
    )  # not resized
    assert open_image(large, REDUCED).size == (531, 379)  # nobody says how large it is wanted


def png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def test_a_cache_is_of_one_way_of_decoding_and_earlier_ones_of_the_whole(tmp_path):
    (tmp_path / "data").mkdir()
    for number in range(3):
        (tmp_path / "data" / f"{number}.jpg").write_bytes(jpeg(photo(seed=number)))
    assert "decode" not in WHOLE.describe()  # as caches from before the option say it
    cache(tmp_path / "data", tmp_path / "c", NumberReader(), reading=REDUCED)
    with pytest.raises(UserError, match=r"preprocessing\.decode: cache 'reduced', now None"):
        cache(tmp_path / "data", tmp_path / "c", NumberReader(), reading=WHOLE)
    again = precompute(
        NumberReader(), "test", open_source(str(tmp_path / "data")), tmp_path / "c",
        options(reading=REDUCED),
    )  # fmt: skip
    assert again.images == 0
    assert LatentDataset(tmp_path / "c")[0]["original_size"].tolist() == [379, 531]
