import io

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

from first_stage.data import (
    BrokenImage,
    Reading,
    View,
    images_from_pixels,
    open_image,
    pixels_from_images,
    pixels_of,
    size_of,
)


def read(file, channels):
    return pixels_of(open_image(file, channels), channels)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_every_mode_loads_into_every_channel_count():
    colour = picture(0)
    sources = {
        "gray": encoded(picture(0, channels=1)),
        "rgb": encoded(colour),
        "rgba": encoded(colour.convert("RGBA")),
        "palette": encoded(colour.convert("P")),
        "cmyk": encoded(colour.convert("CMYK"), "JPEG"),
        "one bit": encoded(colour.convert("1")),
        "gray alpha": encoded(colour.convert("LA")),
        "16 bit": encoded(Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 100)),
        "lab tiff": encoded(colour.convert("LAB"), "TIFF"),
    }
    for name, file in sources.items():
        for channels in (1, 3, 4):
            pixels = read(file, channels)
            assert pixels.shape == (20, 24, channels), name
            assert pixels.dtype == (np.float32 if name == "16 bit" else np.uint8), name
            assert pixels.min() >= 0, name
            assert pixels.max() <= 255, name
            if channels == 4:
                assert (pixels[..., 3] == 255).all(), name


def test_sixteen_bit_gray_keeps_its_precision():
    values = np.array([[0, 1, 256, 257, 65535]], dtype=np.uint16)
    pixels = read(encoded(Image.fromarray(values)), 1)
    np.testing.assert_allclose(pixels[0, :, 0], values[0] / 257.0, rtol=1e-6)
    # One of 65,536 steps survives into what the network sees.
    seen = images_from_pixels(torch.from_numpy(pixels)[None])
    assert seen[0, 0, 0, 1] > seen[0, 0, 0, 0]


def test_transparency_is_laid_over_white_or_kept():
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (10, 20, 30, 255))
    assert read(encoded(half), 3).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    assert read(encoded(half), 4)[0, :, 3].tolist() == [0, 255]
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([200, 0, 0])
    assert read(encoded(palette, transparency=0), 3).tolist() == [[[255, 255, 255]]]


def test_luma_and_repetition():
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    assert read(encoded(red), 1).item() == 76  # 0.299 * 255
    gray = Image.new("L", (1, 1), 77)
    assert read(encoded(gray), 3).ravel().tolist() == [77, 77, 77]


def test_exif_rotation_is_applied():
    image = Image.new("RGB", (4, 2))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: rotate by 270 degrees
    pixels = read(encoded(image, exif=exif), 3)
    assert pixels.shape == (4, 2, 3)
    assert pixels[0, 1, 0] == 255


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (b"", "not an image"),
        (b"no picture at all", "not an image"),
        (encoded(picture(0, 200, 200), "JPEG")[:-900], "truncated"),
        (encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "no stated range"),
    ],
)
def test_broken_files_say_why(file, reason):
    with pytest.raises(BrokenImage, match=reason):
        open_image(file, 3)


def test_a_decompression_bomb_is_broken_and_not_a_crash(monkeypatch):
    with pytest.raises(BrokenImage, match=r"24 x 20 pixels are more than data.max_pixels \(479\)"):
        open_image(encoded(picture(0)), Reading(3, max_pixels=479))
    assert size_of(open_image(encoded(picture(0)), Reading(3, max_pixels=480))) == (20, 24)
    # What data.max_pixels allows, Pillow's own limit does not refuse.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert size_of(open_image(encoded(picture(0)), Reading(3, max_pixels=480))) == (20, 24)


def test_pixels_and_images_are_inverse_and_round():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1)
    images = images_from_pixels(pixels)
    assert images.min() == -1
    assert images.max() == 1
    assert torch.equal(pixels_from_images(images), pixels)
    almost = torch.full((1, 1, 1, 1), 9.6 / 127.5 - 1)
    assert pixels_from_images(almost).item() == 10  # truncation would give 9
    beyond = torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2)
    assert pixels_from_images(beyond).ravel().tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["L", "RGB", "F"])
def test_a_view_equals_resizing_the_whole_and_cropping(mode):
    image = picture(1, 61, 47).convert(mode)
    view = View(resolution=16, resize=24)
    resized = image.resize((31, 24), Image.Resampling.BICUBIC)
    for u, v, left, top in [(None, None, 7, 4), (0.0, 0.0, 0, 0), (0.999, 0.999, 15, 8)]:
        seen, place = view.apply(image, u, v)
        assert place == (top, left)
        whole = np.asarray(resized.crop((left, top, left + 16, top + 16)), np.float32)
        np.testing.assert_allclose(np.asarray(seen, np.float32), whole.clip(0, 255), atol=1.01)


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255
    seen, _ = View(16, 16).apply(Image.fromarray(stripes))
    inner = np.asarray(seen)[4:12, 4:12].astype(int)
    assert abs(inner - 127).max() <= 2  # one pixel in four would be all black or all white


def test_small_images_are_enlarged_and_sizes_kept_on_request():
    small = picture(0, 10, 8)
    assert View(16, None).apply(small)[0].size == (16, 16)
    large = picture(0, 40, 30)
    seen, place = View(16, None).apply(large, 0.0, 0.0)
    assert place == (0, 0)
    assert np.array_equal(np.asarray(seen), np.asarray(large)[:16, :16])


def test_a_flip_mirrors_the_same_crop():
    image = picture(2)
    plain, _ = View(16, 16).apply(image, 0.3, 0.6)
    flipped, _ = View(16, 16).apply(image, 0.3, 0.6, flip=True)
    assert np.array_equal(np.asarray(flipped), np.asarray(plain)[:, ::-1])
