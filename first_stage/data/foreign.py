"""Files that are not read: what they are, and what would read them."""

from collections.abc import Callable
from importlib.util import find_spec

_HEIC = (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1")
_OPTIONAL: tuple[tuple[str, str, str, Callable[[bytes], bool]], ...] = (
    ("HEIC", "pillow_heif", "pillow-heif", lambda head: head[4:12] in _HEIC),
    ("JPEG XL", "pillow_jxl", "pillow-jxl-plugin",
     lambda head: head[:2] == b"\xff\x0a" or head[4:12] == b"JXL \r\n\x87\n"),
    ("DICOM", "pydicom", "pydicom", lambda head: head[128:132] == b"DICM"),
)  # fmt: skip
_NEVER: tuple[tuple[str, Callable[[bytes], bool]], ...] = (
    ("PostScript, which is never run", lambda head: head.startswith(b"%!PS")),
    ("an SVG or HTML text", lambda head: head.lstrip()[:1] == b"<"),
)


def told_apart(head: bytes) -> str:
    """What a file that cannot be read is, where that is known, in brackets; empty otherwise.

    Args:
        head: Its first 512 bytes.
    """
    if not head:
        return " (it is empty)"
    for kind, module, package, is_it in _OPTIONAL:
        if is_it(head):
            if find_spec(module) is None:
                return f" (a {kind} file: pip install {package})"
            return f" (a damaged {kind} file)"
    return next((f" ({what})" for what, is_it in _NEVER if is_it(head)), "")
