"""Which content of a sample was encoded: a hash that tells a file that changed."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from first_stage.data import BrokenImage, Encoded, read_bytes


def file_of(image: Encoded) -> Encoded:
    """A sample's encoded bytes, or its picture or values when it is decoded already.

    Raises:
        BrokenImage: When the file cannot be read.
        MachineFault: When the machine fails to read it, several times over.
    """
    if isinstance(image, BrokenImage):
        raise image
    return read_bytes(image) if isinstance(image, Path) else image


def content_hash(file: Encoded) -> str:
    """A hash of a sample's content: of its encoded bytes, or of a decoded picture's pixels."""
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(file, bytes):
        digest.update(file)
    elif isinstance(file, np.ndarray):
        digest.update(f"{file.dtype} {file.shape} ".encode())
        digest.update(np.ascontiguousarray(file).tobytes())
    elif isinstance(file, Image.Image):
        digest.update(f"{file.mode} {file.size} ".encode())
        digest.update(file.tobytes())
    return digest.hexdigest()
