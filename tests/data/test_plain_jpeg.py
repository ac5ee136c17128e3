"""Plain JPEGs past Pillow: the same pixels for every kind of file, and its word on the rest."""

import io
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from first_stage.data import BrokenImage, Reading, View, open_image, pixels_of, plain_jpeg
from first_stage.data.images import Mirror

MANY = 10**8


def picture(side=(37, 53), mode="RGB"):
    height, width = side
    coarse = np.random.default_rng(height).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def jpeg(image, **options):
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


def by_pillow(content, channels=3):
    with mock.patch.object(plain_jpeg, "_turbo", [None]):
        return pixels_of(open_image(content, channels), channels)


@pytest.mark.parametrize("quality", [20, 75, 98])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("side", [(32, 32), (37, 53), (1, 1), (3, 200)])
def test_pixels_are_those_of_pillow(quality, subsampling, progressive, side):
    options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
    content = jpeg(picture(side), restart_marker_blocks=3, comment=b"a word", **options)
    assert plain_jpeg.decode(content, MANY) is not None
    for channels in (1, 3, 4):
        found = pixels_of(open_image(content, channels), channels)
        np.testing.assert_array_equal(found, by_pillow(content, channels))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_gray_too(channels):
    content = jpeg(picture(mode="L"))
    assert plain_jpeg.decode(content, MANY).shape == (37, 53, 1)
    found = pixels_of(open_image(content, channels), channels)
    np.testing.assert_array_equal(found, by_pillow(content, channels))


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("view", [View(24, 24), View(48, 80), View(16, None), View(8, 9, (31, 40))])
def test_views_of_the_array_are_those_of_pillows_picture(mode, view):
    content = jpeg(picture(mode=mode))
    channels = 3 if mode == "RGB" else 1
    for flip in (False, Mirror(True, True, transposed=view.shape is None)):
        seen, place = view.apply(open_image(content, channels), 0.3, 0.8, flip)
        with mock.patch.object(plain_jpeg, "_turbo", [None]):
            other = open_image(content, channels)
        assert isinstance(other, Image.Image)
        expected, other_place = view.apply(other, 0.3, 0.8, flip)
        assert place == other_place
        np.testing.assert_array_equal(pixels_of(seen, channels), pixels_of(expected, channels))


def exif():
    tags = Image.Exif()
    tags[0x0112] = 6
    return jpeg(picture(), exif=tags)


@pytest.mark.parametrize(
    "content",
    [
        exif(),
        jpeg(picture(), icc_profile=b"a profile"),
        jpeg(picture(mode="CMYK")),
        jpeg(picture())[:-40],
        jpeg(picture())[:300],
        jpeg(picture())[:21],
        b"\xff\xd8\xff",
        b"\x89PNG" + jpeg(picture()),
    ],
    ids=["turned", "profile", "CMYK", "cut off", "no scan", "no header", "nothing", "another"],
)
def test_the_rest_is_left_to_pillow(content):
    assert plain_jpeg.decode(content, MANY) is None


def test_too_many_pixels_are_told_as_always():
    with pytest.raises(BrokenImage, match="max_pixels"):
        open_image(jpeg(picture()), Reading(3, max_pixels=100))


def test_without_the_package_pillow_decodes():
    with (
        mock.patch.object(plain_jpeg, "_turbo", []),
        mock.patch.dict("sys.modules", simplejpeg=None),
    ):
        assert plain_jpeg.decode(jpeg(picture()), MANY) is None
