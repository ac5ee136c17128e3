"""Photos out of Debian packages and Qt resource files."""

import struct
import zlib

import pytest

from experiments.debian_photos import unpack as debian
from experiments.debian_photos.qt_resources import read_resources
from first_stage.errors import DataError, UserError


def resource_file(version: int) -> bytes:
    """pictures/a.webp as it is, pictures/b.webp compressed, pictures/c.txt by zstd, and d.webp."""
    names, offsets = b"", {}
    for name in ("pictures", "a.webp", "b.webp", "c.txt", "d.webp"):
        offsets[name] = len(names)
        names += struct.pack(">HI", len(name), 12345) + name.encode("utf-16-be")
    data, starts = b"", {}
    packed = struct.pack(">I", 5) + zlib.compress(b"B" * 5)
    for name, content in [("a", b"AAA"), ("b", packed), ("c", b"zstd"), ("d", b"D")]:
        starts[name] = len(data)
        data += struct.pack(">I", len(content)) + content
    time = b"" if version < 2 else bytes(8)

    def folder(name: int, count: int, first: int) -> bytes:
        return struct.pack(">IHII", name, 2, count, first) + time

    def file(name: str, flags: int) -> bytes:
        start = starts[name.split(".")[0]]
        return struct.pack(">IHHHI", offsets[name], flags, 0, 0, start) + time

    tree = (
        folder(0, 2, 1)
        + folder(offsets["pictures"], 3, 3)
        + file("d.webp", 0)
        + file("a.webp", 0)
        + file("b.webp", 1)
        + file("c.txt", 4)
    )
    head = 20 if version < 3 else 24
    places = (head, head + len(tree), head + len(tree) + len(data))
    start = b"qres" + struct.pack(">IIII", version, *places)
    return start + bytes(head - len(start)) + tree + data + names


@pytest.mark.parametrize("version", [1, 2, 3])
def test_files_are_read_out_of_a_resource_file(tmp_path, version):
    file = tmp_path / "some.rcc"
    file.write_bytes(resource_file(version))
    assert dict(read_resources(file)) == {
        "pictures/a.webp": b"AAA",
        "pictures/b.webp": b"BBBBB",
        "d.webp": b"D",
    }


def test_what_is_no_resource_file_or_damaged_is_named(tmp_path):
    (tmp_path / "no.rcc").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"no\.rcc' is not a Qt resource file"):
        list(read_resources(tmp_path / "no.rcc"))
    whole = resource_file(2)
    for content in (whole[:18], whole[:30], whole.replace(zlib.compress(b"B" * 5), bytes(11))):
        (tmp_path / "cut.rcc").write_bytes(content)
        with pytest.raises(DataError, match=r"cut\.rcc' is damaged"):
            list(read_resources(tmp_path / "cut.rcc"))
    # A folder that is its own child.
    looped = bytearray(whole)
    looped[20 + 6 : 20 + 14] = struct.pack(">II", 1, 0)
    (tmp_path / "loop.rcc").write_bytes(looped)
    with pytest.raises(DataError, match=r"loop\.rcc' is damaged"):
        list(read_resources(tmp_path / "loop.rcc"))


def test_only_what_is_asked_for_is_taken(tmp_path):
    (tmp_path / "usr").mkdir()
    (tmp_path / "usr/some.rcc").write_bytes(resource_file(2))
    for name in ("b.jpg", "c.png", "Eglise_1.jpg"):
        (tmp_path / "usr" / name).write_bytes(name.encode())
    (tmp_path / "usr/link.jpg").symlink_to("/etc/hostname")
    found = dict(debian.photos_below(tmp_path, ["pictures/*.webp", "usr/*.jpg"]))
    assert found == {
        "pictures/a.webp": b"AAA",
        "pictures/b.webp": b"BBBBB",
        "usr/b.jpg": b"b.jpg",  # Eglise_1 is a painting
    }


def test_photos_come_with_their_copyright_under_plain_names(tmp_path, monkeypatch):
    def run(command, folder):
        if command[0] == "apt-get":
            for package in command[2:]:
                (folder / f"{package}_1.0_all.deb").touch()
            return
        package = folder / command[-1]
        doc = package / "usr/share/doc" / command[-1]
        doc.mkdir(parents=True)
        (doc / "copyright").write_text(f"of {command[-1]}")
        photos = package / "usr/share/tuxpaint/templates"
        photos.mkdir(parents=True)
        (photos / "rocks.jpg").write_bytes(b"rocks")

    monkeypatch.setattr(debian, "_run", run)
    output = tmp_path / "photos"
    assert debian.unpack_photos(output) == [
        output / "tuxpaint-data-usr-share-tuxpaint-templates-rocks.jpg"
    ]
    assert (output / "copyright/gcompris-qt-data.txt").read_text() == "of gcompris-qt-data"
    with pytest.raises(UserError, match="is there already"):
        debian.unpack_photos(output)


def test_elsewhere_than_on_debian_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="apt-get is not here") as caught:
        debian.unpack_photos(tmp_path / "photos")
    assert "\n" not in str(caught.value)
    (tmp_path / "apt-get").write_text(
        "#!/bin/sh\necho one >&2; echo E: no such package >&2; exit 100"
    )
    (tmp_path / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(UserError, match=r"E: no such package\. Try: sudo apt-get update"):
        debian.unpack_photos(tmp_path / "photos")
    assert not (tmp_path / "photos").exists()
