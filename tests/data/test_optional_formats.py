"""HEIC, JPEG XL and DICOM, where the packages are installed that read them."""

import io

import numpy as np
import pytest
from conftest import picture
from PIL import Image

from first_stage.data import BrokenImage, Reading, open_image, open_source, picture_size, pixels_of
from first_stage.data.decode import known_formats


def encoded(kind: str, image: Image.Image, **options) -> bytes:
    known_formats()  # which registers the plugins
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def heic(image, **options) -> bytes:
    pytest.importorskip("pillow_heif")
    return encoded("HEIF", image, quality=-1, **options)


def jxl(image, **options) -> bytes:
    pytest.importorskip("pillow_jxl")
    return encoded("JXL", image, lossless=True, **options)


@pytest.mark.parametrize("write", [heic, jxl])
class TestPhotos:
    def test_a_photo_is_read_and_found(self, write, tmp_path):
        image = picture(0, 64, 48)
        file = write(image)
        found = pixels_of(open_image(file, 3), 3).astype(int)
        assert np.abs(found - np.asarray(image)).mean() < 10  # chroma has half the pixels
        assert picture_size(file) == (48, 64)
        name = "photo.heic" if write is heic else "photo.jxl"
        (tmp_path / name).write_bytes(file)
        assert open_source(str(tmp_path)).id(0) == name

    def test_a_turned_photo_stands_upright(self, write):
        exif = Image.Exif()
        exif[0x0112] = 6
        file = write(picture(0, 64, 48), exif=exif.tobytes())
        assert picture_size(file) == (64, 48)
        assert pixels_of(open_image(file, 3), 3).shape == (64, 48, 3)

    def test_damage_is_a_listed_reason(self, write):
        file = write(picture(0, 64, 48))
        with pytest.raises(BrokenImage):
            open_image(file[: len(file) // 2], 3)
        with pytest.raises(BrokenImage):
            open_image(file[:16] + bytes(200), 3)

    def test_pixels_are_bounded(self, write):
        with pytest.raises(BrokenImage, match="max_pixels"):
            open_image(write(picture(0, 64, 48)), Reading(3, max_pixels=1000))


def dicom(values: np.ndarray, **changes) -> bytes:
    """A file of 12 bits in 16, as scanners write it."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    file = Dataset()
    file.file_meta = FileMetaDataset()
    file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    file.SOPClassUID, file.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    file.Rows, file.Columns = values.shape[:2]
    bits = 8 * values.dtype.itemsize
    facts = {
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "BitsAllocated": bits,
        "BitsStored": min(bits, 12), "HighBit": min(bits, 12) - 1, "PixelRepresentation": 0,
    }  # fmt: skip
    for name, value in (facts | changes).items():
        setattr(file, name, value)
    file.PixelData = values.tobytes()
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, file, enforce_file_format=True)
    return stream.getvalue()


class TestDicom:
    VALUES = np.random.default_rng(0).integers(0, 4096, (24, 20), dtype=np.uint16)

    def read(self, file, low=0, high=4095, channels=1):
        seen = open_image(file, Reading(channels, value_range=(low, high)))
        return seen / 255.0 * (high - low) + low

    def test_stored_values_and_hounsfield_units(self):
        plain = self.read(dicom(self.VALUES))[:, :, 0]
        np.testing.assert_allclose(plain, self.VALUES, atol=1e-3)
        scaled = dicom(self.VALUES, RescaleSlope="2", RescaleIntercept="-1024")
        found = self.read(scaled, -1024, 7166)[:, :, 0]
        np.testing.assert_allclose(found, 2.0 * self.VALUES - 1024, atol=2e-3)
        assert picture_size(scaled) == (24, 20)

    def test_the_kind_whose_lowest_value_is_white_is_turned_around(self):
        file = dicom(4095 - self.VALUES, PhotometricInterpretation="MONOCHROME1")
        np.testing.assert_allclose(self.read(file)[:, :, 0], self.VALUES, atol=1e-3)

    def test_color(self):
        values = np.random.default_rng(1).integers(0, 256, (24, 20, 3), dtype=np.uint8)
        file = dicom(values, SamplesPerPixel=3, PhotometricInterpretation="RGB",
                     PlanarConfiguration=0, BitsStored=8, HighBit=7)  # fmt: skip
        np.testing.assert_array_equal(open_image(file, 3), values)

    def test_several_frames_are_no_channels(self):
        file = dicom(np.stack([self.VALUES] * 3)[0], NumberOfFrames="3")
        with pytest.raises(BrokenImage, match="3 frames"):
            open_image(file, Reading(3, value_range=(0, 4095)))

    def test_pixels_are_bounded_before_they_are_unpacked(self):
        file = bytearray(dicom(self.VALUES))
        place = file.index(b"\x28\x00\x10\x00US\x02\x00") + 8  # Rows
        file[place : place + 2] = b"\xff\xff"
        with pytest.raises(BrokenImage, match="max_pixels"):
            open_image(bytes(file), Reading(1, value_range=(0, 4095), max_pixels=100_000))

    def test_deflated_files_are_refused(self):
        file = dicom(self.VALUES).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99\0")
        with pytest.raises(BrokenImage, match="deflated"):
            open_image(file, 1)

    def test_a_scan_is_found_in_a_folder(self, tmp_path):
        (tmp_path / "a.dcm").write_bytes(dicom(self.VALUES))
        source = open_source(str(tmp_path))
        seen = open_image(source.read(0).image, Reading(1, value_range=(0, 4095)))
        assert seen.shape == (24, 20, 1)
