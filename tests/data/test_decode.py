"""Decoding: nothing escapes, nothing foreign gets in, and values keep their precision."""

import io
import os
import struct
import subprocess
import sys
import textwrap
import time
import zlib

import numpy as np
import pytest
import tifffile
from conftest import picture
from PIL import Image, ImageCms

from first_stage.data import (
    BrokenImage,
    Mirror,
    Reading,
    View,
    decode,
    deep_color,
    foreign,
    open_image,
    picture_size,
    pixels_of,
)

BANDS = {"planarconfig": "contig", "photometric": "minisblack"}
DRAW = np.random.default_rng(0)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def npy(values, **options) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values, **options)
    return stream.getvalue()


def npz(**arrays) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def tiff(values, **options) -> bytes:
    stream = io.BytesIO()
    tifffile.imwrite(stream, values, **options)
    return stream.getvalue()


def png16(values: np.ndarray, extra: bytes = b"") -> bytes:
    """A 16-bit PNG of 1 to 4 channels, which Pillow cannot write."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + values[y].astype(">u2").tobytes() for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def read(file, reading):
    return pixels_of(open_image(file, reading), reading)


def reason(file, reading=3) -> str:
    with pytest.raises(BrokenImage) as caught:
        open_image(file, reading)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestFuzz:
    """Mutated small files of every kind: whatever happens is a picture or a listed reason."""

    SECONDS = 12

    def test_nothing_escapes(self):
        seeds = self.files()
        draw = np.random.default_rng(int(time.time()) // 86_400)
        readings = [Reading(3), Reading(1), Reading(4), Reading(5, (4, 3, 2, 1, 0), (0, 4095))]
        deadline, tried, decoded = time.monotonic() + self.SECONDS, 0, 0
        while time.monotonic() < deadline:
            content = self.mutated(seeds[tried % len(seeds)], draw)
            reading = readings[int(draw.integers(len(readings)))]
            try:
                seen, _ = View(8, None).apply(open_image(content, reading))
                assert pixels_of(seen, reading).shape == (8, 8, reading.channels)
                decoded += 1
            except BrokenImage:
                pass
            picture_size(content, reading)
            tried += 1
        assert tried > 500
        assert 0 < decoded < tried

    def files(self) -> list[bytes]:
        small = picture(0, 16, 12)
        exif = Image.Exif()
        exif[0x0112] = 6
        exif[0x010F] = "maker"
        values = DRAW.integers(0, 4096, (12, 16, 5), dtype=np.uint16)
        return [
            encoded(small, exif=exif),
            encoded(small, "JPEG", exif=exif),
            encoded(small, "JPEG", progressive=True),
            encoded(small.convert("CMYK"), "JPEG"),
            *(encoded(small, kind) for kind in ("WEBP", "AVIF", "GIF", "BMP", "TGA", "PPM")),
            *(encoded(small, kind) for kind in ("JPEG2000", "TIFF")),
            encoded(small, "TIFF", compression="tiff_lzw", exif=exif),
            encoded(small.convert("P"), "PNG", transparency=0),
            encoded(small, "PNG", icc_profile=P3),
            png16(values[:, :, :3], PROFILE),
            png16(values[:, :, :3]),
            npy(values),
            npz(image=values),
            tiff(values, compression="zlib", **BANDS),
            tiff(values.astype(np.float32), planarconfig="separate"),
        ]

    def mutated(self, content: bytes, draw) -> bytes:
        data = bytearray(content)
        for _ in range(int(draw.integers(1, 6))):
            # Headers, where structures are, are hit as often as the rest.
            end = len(data) if draw.random() < 0.5 else min(len(data), 128)
            data[int(draw.integers(end))] = int(draw.integers(256))
        if draw.random() < 0.2:
            del data[int(draw.integers(1, len(data))) :]
        return bytes(data)


class TestNothingForeign:
    def test_postscript_named_jpg_is_never_run(self, tmp_path):
        file = tmp_path / "photo.jpg"
        file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
        assert "PostScript, which is never run" in reason(file)

    @pytest.mark.parametrize(
        ("head", "words"),
        [
            (b"\0\0\0\x18ftypheic" + b"\0" * 64, "pip install pillow-heif"),
            (b"\xff\x0a" + b"\0" * 64, "pip install pillow-jxl-plugin"),
            (b"\0" * 128 + b"DICM", "pip install pydicom"),
            (b"<svg xmlns='x'/>", "SVG or HTML"),
            (b"", "empty"),
        ],
    )
    def test_formats_of_other_programs_are_told_apart(self, head, words, monkeypatch):
        monkeypatch.setattr(foreign, "find_spec", lambda module: None)
        without = [name for name in decode.known_formats() if name not in ("HEIF", "JXL")]
        monkeypatch.setattr(decode, "_known", without)
        monkeypatch.setitem(sys.modules, "pydicom", None)
        assert words in reason(head)

    def test_devices_pipes_and_folders_are_no_images(self, tmp_path):
        os.mkfifo(tmp_path / "pipe.png")
        (tmp_path / "zero.png").symlink_to("/dev/zero")
        for name in ("pipe.png", "zero.png"):
            assert reason(tmp_path / name) == "no regular file"
            assert picture_size(tmp_path / name) == (0, 0)
        assert "cannot be read" in reason(tmp_path)
        assert "cannot be read: No such file" in reason(tmp_path / "nowhere.png")

    def test_a_huge_file_is_not_read(self, tmp_path):
        with (tmp_path / "sparse.png").open("wb") as stream:
            stream.truncate(2**31)
        assert "2,147,483,648 bytes is no image" in reason(tmp_path / "sparse.png")

    def test_bombs_take_no_memory(self):
        """A small file that would unpack to gigabytes costs its worker next to nothing."""
        program = """
            import io, resource, zlib, numpy as np
            from test_decode import chunk, npy, npz, reason, struct
            rows = zlib.compress(b"\\0" * (20_000 * (1 + 20_000 // 8)), 9)
            header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
            png = b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)
            png += chunk(b"IEND", b"")
            lies = npy(np.zeros((4, 4), np.uint8))
            lies = lies.replace(b"(4, 4), }" + b" " * 11, b"(999999, 9999999), }")
            packed = npz(image=np.zeros((20_001, 20_000), np.uint8))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for content in (png, lies, packed):
                assert "data.max_pixels" in reason(content), reason(content)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert grown < 50_000, f"{grown} KiB"
            """
        here = os.path.dirname(__file__)
        path = os.pathsep.join([here, os.path.dirname(here), os.environ.get("PYTHONPATH", "")])
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)],
            check=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def test_pickled_arrays_are_refused(self):
        assert "type object" in reason(npy(np.array([[{}]], dtype=object), allow_pickle=True))


def test_readable_pixels_with_damaged_exif_are_used():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(picture(0), "JPEG", exif=exif, quality=95)
    place = content.index(b"Exif\0\0") + 6
    damaged = content[:place] + b"MM\0\x2a\xff\xff\xff\xff" + content[place + 8 :]
    plain = Image.open(io.BytesIO(damaged))
    assert read(damaged, 3).shape == (*plain.size[::-1], 3)
    assert picture_size(damaged) == plain.size[::-1]


class TestPrecision:
    def test_sixteen_bit_color_is_not_cut_to_eight(self):
        values = DRAW.integers(0, 65536, (6, 7, 4), dtype=np.uint16)
        for file in (png16(values[:, :, :3]), tiff(values[:, :, :3]),
                     tiff(values[:, :, :3], compression="zlib")):  # fmt: skip
            np.testing.assert_allclose(read(file, 3), values[:, :, :3] / 257.0, rtol=1e-6)
        np.testing.assert_allclose(read(png16(values), 4), values / 257.0, rtol=1e-6)
        luma = values[:, :, :3] @ np.array([0.299, 0.587, 0.114]) / 257.0
        np.testing.assert_allclose(read(png16(values[:, :, :3]), 1)[:, :, 0], luma, rtol=1e-5)
        alpha = values[:, :, 3:] / 65535.0
        over = values[:, :, :3] / 257.0 * alpha + 255.0 * (1 - alpha)
        np.testing.assert_allclose(read(png16(values), 3), over, rtol=1e-5)
        opaque = read(png16(values[:, :, :3]), 4)
        assert (opaque[:, :, 3] == 255).all()

    def test_sixteen_bit_color_is_turned_upright(self):
        values = DRAW.integers(0, 65536, (4, 6, 3), dtype=np.uint16)
        exif = Image.Exif()
        exif[0x0112] = 6
        turned = png16(values, chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")))
        np.testing.assert_allclose(read(turned, 3), np.rot90(values, -1) / 257.0, rtol=1e-6)

    @pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32, np.int32])
    @pytest.mark.parametrize("kind", ["tiff", "npy", "npz"])
    def test_a_stated_range_is_mapped_at_full_precision(self, dtype, kind):
        values = DRAW.integers(0, 4065, (9, 8)).astype(dtype)
        file = {"tiff": tiff, "npy": npy, "npz": lambda v: npz(image=v)}[kind](values)
        seen = read(file, Reading(1, value_range=(0, 4095)))[:, :, 0]
        assert seen.dtype == np.float32
        back = seen.astype(np.float64) / 255 * 4095
        np.testing.assert_allclose(back, values, atol=2e-3)  # steps of 1 are far apart

    def test_hounsfield_units_keep_their_sign_and_are_clipped(self):
        values = np.array([[-2000, -1024, 0, 3071, 9000]], np.int16)
        for file in (tiff(values), npy(values)):
            seen = read(file, Reading(1, value_range=(-1024, 3071)))[0, :, 0]
            np.testing.assert_allclose(seen, [0, 0, 1024 / 4095 * 255, 255, 255], rtol=1e-6)
            assert "-2000 to 9000, have no stated range: set data.value_range" in reason(file, 1)

    def test_a_range_holds_for_eight_bits_too_and_gray_is_repeated(self):
        file = encoded(Image.fromarray(np.array([[0, 50, 100, 200]], np.uint8)))
        seen = read(file, Reading(3, value_range=(0, 100)))
        assert seen.shape == (1, 4, 3)
        np.testing.assert_allclose(seen[0, :, 1], [0, 127.5, 255, 255])

    def test_float_tiff_and_nan(self):
        values = DRAW.random((5, 6, 3)).astype(np.float32)
        seen = read(tiff(values), Reading(3, value_range=(0, 1)))
        np.testing.assert_allclose(seen, values * 255, rtol=1e-6)
        assert "float pixels" in reason(tiff(values))
        values[0, 0, 0] = np.nan
        assert "not numbers (NaN)" in reason(tiff(values), Reading(3, value_range=(0, 1)))


class TestWhatPillowDrops:
    """Signs, directions and bits that its reader of a format loses."""

    RAMP = np.arange(64).reshape(8, 8)

    def test_signed_bytes(self):
        file = tiff((self.RAMP - 32).astype(np.int8))
        seen = read(file, Reading(1, value_range=(-32, 31)))[:, :, 0]
        np.testing.assert_allclose(seen / 255 * 63, self.RAMP, atol=1e-4)
        assert "int8 pixels, -32 to 31, have no stated range" in reason(file, 1)

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_files_whose_zero_is_white(self, dtype):
        top = np.iinfo(dtype).max
        values = (self.RAMP / 63 * top).astype(dtype)
        white = read(tiff(values, photometric="miniswhite"), 1)
        black = read(tiff(top - values, photometric="minisblack"), 1)
        np.testing.assert_allclose(white, black, atol=1e-3)

    def test_a_range_holds_for_files_whose_zero_is_white(self):
        values = (self.RAMP * 65).astype(np.uint16)
        file = tiff(values, photometric="miniswhite")
        seen = read(file, Reading(1, value_range=(0, 4095)))[:, :, 0]
        np.testing.assert_allclose(seen, 255 - values / 4095 * 255, atol=1e-3)

    @pytest.mark.parametrize("largest", [1023, 65535])
    def test_deep_ppm(self, largest):
        values = np.random.default_rng(2).integers(0, largest + 1, (5, 7, 3))
        head = f"P6 # a note\n7 5\n{largest}\n".encode()
        file = head + values.astype(">u2").tobytes()
        seen = read(file, 3)
        np.testing.assert_allclose(seen, values / largest * 255, atol=0.003)
        with pytest.raises(BrokenImage):
            open_image(file[:-20], 3)


class TestDeepColor:
    """Profiles of files of 16 bits, at 16 bits."""

    VALUES = np.random.default_rng(1).integers(0, 65536, (40, 50, 3), dtype=np.uint16)

    def test_a_matrix_profile_keeps_its_precision(self):
        deep = read(png16(self.VALUES, PROFILE), 3)
        assert deep.dtype == np.float32
        # By the formulas of the profile's primaries and gamma, in double precision.
        linear = (self.VALUES / 65535.0) ** 2.19921875
        to_xyz = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666],
                           [-0.0011, 0.0419, 0.7841]])  # fmt: skip
        to_xyz = np.round(to_xyz * 65536) / 65536  # as profiles hold them
        srgb = np.array([[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169],
                         [0.0139322, 0.0971045, 0.7141733]])  # fmt: skip
        linear = np.clip(linear @ to_xyz.T @ np.linalg.inv(srgb).T, 0, 1)
        wanted = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        assert np.abs(deep - 255 * wanted).max() < 0.01
        assert np.abs(deep - deep.round()).mean() > 0.15  # 8 bits would be whole numbers

    def test_it_is_what_the_eight_bit_way_gives_but_for_rounding(self):
        eight = (self.VALUES >> 8).astype(np.uint8)
        plain = read(encoded(Image.fromarray(eight), icc_profile=P3), 3)
        deep = read(png16(eight.astype(np.uint16) * 257, PROFILE), 3)
        assert np.abs(deep - plain).max() < 1.1
        assert np.abs(deep - eight).mean() > 3

    @pytest.mark.parametrize("name", ["sRGB", "damaged", "gray"])
    def test_other_profiles_leave_every_bit(self, name):
        profile = {
            "sRGB": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
            "damaged": P3[:200],
            "gray": P3.replace(b"mntrRGB ", b"mntrGRAY"),
        }[name]
        file = png16(self.VALUES, chunk(b"iCCP", b"x\0\0" + zlib.compress(profile)))
        np.testing.assert_array_equal(read(file, 3), self.VALUES / np.float32(257))

    def test_kept_and_measured_values_are_untouched(self):
        file = png16(self.VALUES, PROFILE)
        kept = read(file, Reading(3, color="keep"))
        np.testing.assert_array_equal(kept, self.VALUES / np.float32(257))
        measured = read(file, Reading(3, value_range=(0, 65535)))
        np.testing.assert_allclose(measured, self.VALUES / 257, atol=1e-4)

    def test_a_profile_of_tables_goes_through_eight_bits(self):
        lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
        tables = bytearray(P3)
        place = tables.index(b"desc")
        tables[place : place + 4] = b"A2B0"
        assert deep_color.conversion(bytes(tables), 3) is None
        assert deep_color.conversion(lab, 3)(self.VALUES).dtype == np.float32  # another space

    @pytest.mark.parametrize("kind", [0, 1, 2, 3, 4])
    def test_parametric_curves(self, kind):
        given = [2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045, 0.0, 0.0]
        count = (1, 3, 4, 5, 7)[kind]
        if kind == 2:
            given[3] = 0.1
        tag = b"para\0\0\0\0" + struct.pack(">HH", kind, 0)
        tag += struct.pack(f">{count}i", *(round(v * 65536) for v in given[:count]))
        x = np.linspace(0, 1, 65536)
        g, a, b, c, d = given[:5]
        wanted = {
            0: x**g,
            1: np.where(x >= -b / a, (a * x + b) ** g, 0),
            2: np.where(x >= -b / a, (a * x + b) ** g, 0) + c,
            3: np.where(x >= d, (a * x + b) ** g, c * x),
            4: np.where(x >= d, (a * x + b) ** g, c * x),
        }[kind]
        assert np.abs(deep_color._curve(tag) - np.clip(wanted, 0, 1)).max() < 1e-4

    def test_gray_and_alpha(self):
        gray = P3.replace(b"mntrRGB ", b"mntrGRAY").replace(b"rTRC", b"kTRC")
        values = self.VALUES[:, :, :1]
        deep = read(png16(values, chunk(b"iCCP", b"x\0\0" + zlib.compress(gray))), 1)
        linear = (values / 65535.0) ** 2.19921875
        wanted = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
        assert np.abs(deep - 255 * wanted).max() < 0.01
        alpha = np.concatenate([self.VALUES, values], axis=2)
        seen = read(png16(alpha, PROFILE), 4)
        np.testing.assert_array_equal(seen[:, :, 3:], values / np.float32(257))
        np.testing.assert_array_equal(seen[:, :, :3], read(png16(self.VALUES, PROFILE), 3))


class TestChannels:
    VALUES = DRAW.integers(0, 65536, (7, 9, 5), dtype=np.uint16)

    @pytest.mark.parametrize(
        "file",
        [
            npy(VALUES),
            npy(np.asfortranarray(VALUES)),
            npy(np.moveaxis(VALUES, 2, 0)),
            npz(other=VALUES[0], image=VALUES),
            tiff(VALUES, **BANDS),
            tiff(np.moveaxis(VALUES, 2, 0), planarconfig="separate", photometric="minisblack"),
            tiff(np.moveaxis(VALUES, 2, 0), photometric="minisblack"),  # pages
            VALUES,
        ],
    )
    def test_any_number_from_any_file(self, file):
        np.testing.assert_allclose(read(file, 5), self.VALUES / 257.0, rtol=1e-6)
        chosen = read(file, Reading(3, select=(3, 2, 1)))
        np.testing.assert_allclose(chosen, self.VALUES[:, :, [3, 2, 1]] / 257.0, rtol=1e-6)
        if not isinstance(file, np.ndarray):
            assert picture_size(file, 5) == (7, 9)

    def test_the_wrong_number_says_what_to_set(self):
        assert reason(npy(self.VALUES), 3) == (
            "5 channels, but 3 are asked for: say which with data.channels, or change "
            "model.in_channels"
        )
        assert "5 channels, 0 to 4, but data.channels asks for 7" in reason(
            npy(self.VALUES), Reading(2, select=(0, 7))
        )
        assert "the arrays a, b: name one 'image'" in reason(npz(a=self.VALUES, b=self.VALUES))
        assert "shape (3,) is no image" in reason(npy(np.zeros(3)))

    def test_four_bands_that_are_no_alpha(self):
        values = DRAW.integers(0, 256, (6, 5, 4), dtype=np.uint8)
        file = tiff(values, photometric="rgb", extrasamples=["unspecified"])
        assert np.array_equal(read(file, 4), values)
        assert "4 channels, but 3" in reason(file, 3)

    def test_channels_of_ordinary_files(self):
        photo = picture(0)
        assert np.array_equal(read(encoded(photo), Reading(2, select=(2, 0))),
                              np.asarray(photo)[:, :, [2, 0]])  # fmt: skip
        assert "3 channels, but 2 are asked for" in reason(encoded(photo), 2)

    def test_arrays_are_resized_as_pictures_are(self):
        photo = picture(0, 61, 47)
        view = View(16, 24)
        for flip in (False, True, Mirror(True, True, True), Mirror(vertical=True)):
            seen, place = view.apply(photo, 0.3, 0.8, flip)
            array, same = view.apply(np.asarray(photo), 0.3, 0.8, flip)
            assert place == same
            assert np.array_equal(np.asarray(seen), array)


def _p3() -> bytes:
    """A matrix profile with Display P3's primaries and gamma 2.2, written tag by tag."""

    def fixed(*values):
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    def text(value):
        raw = value.encode() + b"\0"
        return b"desc\0\0\0\0" + struct.pack(">I", len(raw)) + raw + b"\0" * 78

    tags = {
        b"desc": text("Wide"),
        b"wtpt": b"XYZ \0\0\0\0" + fixed(0.9642, 1.0, 0.8249),
        b"rXYZ": b"XYZ \0\0\0\0" + fixed(0.5151, 0.2412, -0.0011),
        b"gXYZ": b"XYZ \0\0\0\0" + fixed(0.2920, 0.6922, 0.0419),
        b"bXYZ": b"XYZ \0\0\0\0" + fixed(0.1571, 0.0666, 0.7841),
        **{name: b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
           for name in (b"rTRC", b"gTRC", b"bTRC")},
    }  # fmt: skip
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, value in tags.items():
        value += b"\0" * (-len(value) % 4)
        table += name + struct.pack(">II", offset + len(body), len(value))
        body += value
    size = offset + len(body)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += b"\0" * 12 + b"acsp" + b"\0" * 28 + fixed(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


P3 = _p3()
PROFILE = chunk(b"iCCP", b"x\0\0" + zlib.compress(P3))


class TestColor:
    def test_a_profile_is_converted_and_can_be_kept(self):
        red = Image.new("RGB", (4, 4), (200, 60, 60))
        for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
            options = {"lossless": True} if kind == "WEBP" else {}
            file = encoded(red, kind, icc_profile=P3, **options)
            kept = read(file, Reading(3, color="keep"))[0, 0].astype(int)
            seen = read(file, 3)[0, 0].astype(int)
            np.testing.assert_allclose(kept, [200, 60, 60], atol=2)
            # Display P3's linear mixture in sRGB's primaries: redder than the numbers say.
            linear = (np.array([200, 60, 60]) / 255) ** 2.2
            matrix = [[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]]
            mixed = np.array(matrix) @ linear
            expected = np.where(
                mixed > 0.0031308, 1.055 * mixed.clip(0) ** (1 / 2.4) - 0.055, 12.92 * mixed
            )
            np.testing.assert_allclose(seen, expected.clip(0, 1) * 255, atol=3)

    def test_alpha_stays_and_srgb_is_left_alone(self):
        half = Image.new("RGBA", (2, 2), (200, 60, 60, 128))
        assert (read(encoded(half, icc_profile=P3), 4)[:, :, 3] == 128).all()
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        photo = picture(0)
        assert np.array_equal(read(encoded(photo, icc_profile=srgb), 3), np.asarray(photo))

    def test_damaged_and_foreign_profiles_change_nothing(self):
        photo, gray = picture(0), picture(0, channels=1)
        for bad in (b"rubbish", P3[:200]):
            assert np.array_equal(read(encoded(photo, icc_profile=bad), 3), np.asarray(photo))
        assert np.array_equal(read(encoded(gray, icc_profile=P3), 1)[:, :, 0], np.asarray(gray))

    def test_measurements_are_no_colors(self):
        file = encoded(Image.new("RGB", (2, 2), (200, 60, 60)), icc_profile=P3)
        seen = read(file, Reading(3, select=(0, 1, 2)))
        assert seen[0, 0].tolist() == [200, 60, 60]
