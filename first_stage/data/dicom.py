"""Medical images: one frame of a DICOM file as an array, in the units that it states.

Rescaled by the file's slope and intercept (to Hounsfield units, for one). Of `MONOCHROME1`, whose
lowest stored value is white, values are turned around within the bits they are stored in, so that
files of both kinds look alike. Palettes become colors.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from first_stage.data.broken import BrokenImage

_DEFLATED = b"1.2.840.10008.1.2.1.99"


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins so is one."""
    return head[128:132] == b"DICM"


def read(content: bytes, check: Callable[[tuple[int, ...], "np.dtype[Any]"], None]) -> np.ndarray:
    """The values `(H, W)` or `(H, W, bands)` of a file.

    Args:
        content: The file's bytes.
        check: Called with shape and type before anything is unpacked; raises for too many pixels.

    Raises:
        BrokenImage: When it cannot be read, or is no single image.
    """
    try:
        import pydicom
        from pydicom.pixels.processing import apply_color_lut
    except ImportError:
        raise BrokenImage("a DICOM file: pip install pydicom") from None
    if _DEFLATED in content[132:4096]:  # the whole file, to any size, before a header can be seen
        raise BrokenImage("a deflated DICOM file, which is not read: save it in another syntax")
    file: Any = pydicom.dcmread(io.BytesIO(content))
    if (frames := int(getattr(file, "NumberOfFrames", None) or 1)) > 1:
        raise BrokenImage(f"a DICOM file of {frames} frames: save each as a file of its own")
    bits, bands = int(file.BitsAllocated), int(file.SamplesPerPixel)
    shape = (int(file.Rows), int(file.Columns), bands)
    check(shape[:2] if bands == 1 else shape, np.dtype(f"u{max(bits // 8, 1)}"))
    values = np.asarray(file.pixel_array)
    kind = str(getattr(file, "PhotometricInterpretation", ""))
    if kind == "PALETTE COLOR":
        return np.asarray(apply_color_lut(values, file))
    if kind == "MONOCHROME1" and values.dtype.kind in "ui":
        is_signed = int(file.PixelRepresentation) == 1
        turned = (-1 if is_signed else 2 ** int(file.BitsStored) - 1) - values.astype(np.int64)
        values = turned.astype(values.dtype)
    slope = float(getattr(file, "RescaleSlope", None) or 1)
    intercept = float(getattr(file, "RescaleIntercept", None) or 0)
    return values if (slope, intercept) == (1, 0) else values * np.float32(slope) + intercept
