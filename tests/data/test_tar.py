"""WebDataset shards: one tolerant reader, by offset, with whatever is wrong named."""

import io
import multiprocessing
import tarfile
from pathlib import Path

import pytest
from conftest import picture

from first_stage.data import BrokenImage, open_image, open_source, size_of, tar
from first_stage.data.decode import Reading
from first_stage.data.find_shards import find_shards
from first_stage.data.retry import WAITS, with_retries
from first_stage.data.shards import ShardedRows, count_rows
from first_stage.errors import DataError


def encoded(seed: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    picture(seed).save(stream, kind)
    return stream.getvalue()


def write(path, *members) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def samples(path, column=None):
    source = open_source(str(path), column)
    return [source.read(index) for index in range(len(source))]


def reason(sample) -> str:
    with pytest.raises(BrokenImage) as caught:
        open_image(sample.image, 3)
    return str(caught.value)


def test_each_sample_has_its_own_ending_and_columns_are_decoded_when_wanted(tmp_path):
    write(
        tmp_path / "a.tar",
        ("d/0.jpg", encoded(0, "JPEG")), ("d/0.txt", b"caf\xc3\xa9"), ("d/0.cls", b"7"),
        ("d/1.png", encoded(1)), ("d/1.txt", b"\xff not text"), ("d/1.json", b"{broken"),
        ("d/2.txt", b"no picture"),
        ("d/3.webp", encoded(3, "WEBP")), ("d/3.json", b'{"a": [1]}'), ("._3.png", b"junk"),
        ("d/0.png", encoded(4)),  # a key that comes again
    )  # fmt: skip
    found = samples(tmp_path / "a.tar")
    assert [s.id for s in found] == [f"a.tar#{k}" for k in ("d/0", "d/1", "d/2", "d/3", "d/0#2")]
    for index in (0, 1, 3, 4):
        assert size_of(open_image(found[index].image, 3)) == (20, 24)
    assert "has no image (it has txt)" in reason(found[2])
    assert (found[0].columns["txt"], found[0].columns["cls"]) == ("café", 7)
    assert found[3].columns["json"] == {"a": [1]}
    for name in ("txt", "json"):
        with pytest.raises(BrokenImage, match=f"its {name} cannot be read"):
            found[1].columns[name]


def test_an_ending_that_is_asked_for(tmp_path):
    members = [(f"{n}.{e}", encoded(n)) for n in range(3) for e in ("input.png", "target.png")]
    write(tmp_path / "a.tar", *members[:-1])
    with pytest.raises(DataError, match=r"samples of several images .*data\.image_column"):
        samples(tmp_path / "a.tar")
    found = samples(tmp_path / "a.tar", "target.png")
    assert found[0].image == encoded(0)
    assert "has no target.png (it has input.png)" in reason(found[2])
    with pytest.raises(DataError, match=r"has the columns: input\.png, target\.png"):
        samples(tmp_path / "a.tar", "jpg")


def test_arrays_are_images_where_there_are_no_others(tmp_path):
    import numpy as np

    stream = io.BytesIO()
    np.save(stream, np.ones((4, 5, 6), np.uint8))
    write(tmp_path / "a.tar", ("0.npy", stream.getvalue()), ("0.json", b"{}"))
    assert open_image(samples(tmp_path / "a.tar")[0].image, Reading(6)).shape == (4, 5, 6)


def test_a_sparse_member_is_not_unpacked(tmp_path):
    header = tarfile.TarInfo("0.png")
    header.size = 512
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[156:157] = tarfile.GNUTYPE_SPARSE
    block[386:398] = b"%011o\0" % 0  # one stored piece of 512 bytes at 0 ...
    block[398:410] = b"%011o\0" % 512
    block[483:495] = b"%011o\0" % 2**31  # ... of a file of 2 GiB
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    good = io.BytesIO()
    with tarfile.open(fileobj=good, mode="w") as archive:
        info = tarfile.TarInfo("1.png")
        info.size = len(encoded(1))
        archive.addfile(info, io.BytesIO(encoded(1)))
    (tmp_path / "a.tar").write_bytes(bytes(block) + b"\0" * 512 + good.getvalue())
    found = samples(tmp_path / "a.tar")
    assert "its png is sparse" in reason(found[0])
    assert size_of(open_image(found[1].image, 3)) == (20, 24)


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_damaged_shard_says_how_much_of_it_is_used(tmp_path, damage):
    write(tmp_path / "a.tar", *[(f"{n}.png", encoded(n)) for n in range(6)])
    content = bytearray((tmp_path / "a.tar").read_bytes())
    place = content.index(b"4.png\0")
    if damage == "cut":
        del content[place + 600 :]
    else:
        content[place + 148 : place + 156] = b"rubbish!"
    (tmp_path / "a.tar").write_bytes(content)
    lines: list[str] = []
    assert len(open_source(str(tmp_path / "a.tar"), say=lines.append)) == 4
    assert any("a.tar: it is cut off" in line and "first 4 samples" in line for line in lines)


def test_what_is_no_tar_file_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"rubbish" * 1000)
    with pytest.raises(DataError, match=r"a\.tar' is no tar file"):
        samples(tmp_path / "a.tar")


def test_reading_is_by_offset_and_neighbours_are_read_together(tmp_path, monkeypatch):
    write(tmp_path / "a.tar", *[(f"{n:03d}.png", encoded(n)) for n in range(40)])
    rows = ShardedRows("a", count_rows(find_shards(str(tmp_path))), None)
    read: list[int] = []
    original = tar._content

    def content(url, begin, end):
        read.append(end - begin)
        return original(url, begin, end)

    monkeypatch.setattr(tar, "_content", content)
    assert [s.image for s in rows.read(3, 23)] == [encoded(n) for n in range(3, 23)]
    assert len(read) == 1
    read.clear()
    rows.read(30, 31)
    assert sum(read) == len(encoded(30))  # and nothing of what lies before it


def test_failed_attempts_are_repeated_a_few_times(monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    attempts = iter([ConnectionResetError("reset")] * 3)

    def read():
        for error in attempts:
            raise error
        return "content"

    assert with_retries(read, "s3://bucket/a.tar") == "content"
    assert waited == list(WAITS[:3])
    with pytest.raises(ConnectionError):
        with_retries(lambda: (_ for _ in ()).throw(ConnectionError("down")), "s3://x")
    assert len(waited) == 3 + len(WAITS)
    with pytest.raises(FileNotFoundError):
        with_retries(Path("/nowhere").read_bytes, "s3://x")
    assert len(waited) == 3 + len(WAITS)


def _read_in_a_worker(rows, results) -> None:
    results.put([sample.id for sample in rows.read(0, len(rows))])


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_rows_go_to_spawned_workers(tmp_path, kind):
    from shards import TOTAL, write_shards

    folder = write_shards(tmp_path / "s", kind)
    rows = ShardedRows("s", count_rows(find_shards(str(folder)), tmp_path / "memory"), None)
    rows.read(0, 3, cursor=0)  # an open file stays here
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    worker = context.Process(target=_read_in_a_worker, args=(rows, results))
    worker.start()
    found = results.get(timeout=120)
    worker.join()
    assert len(found) == TOTAL


def test_archives_behind_each_other_are_told(tmp_path):
    write(tmp_path / "a.tar", ("a.png", encoded(0)), ("b.png", encoded(1)))
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes() * 2)
    lines: list[str] = []
    assert len(open_source(str(tmp_path), say=lines.append)) == 4
    (told,) = [line for line in lines if "another archive follows its end mark" in line]
    assert told.strip().startswith("b.tar: ")


def test_endings_in_capitals_and_a_shard_that_is_named_twice(tmp_path):
    write(tmp_path / "A.TAR", ("a.png", encoded(0)), ("b.png", encoded(1)))
    assert len(open_source(str(tmp_path))) == 2
    assert len(open_source(f"[{tmp_path}/A.TAR, {tmp_path}/*.TAR]")) == 2


def test_files_that_do_not_lie_side_by_side_say_so(tmp_path):
    write(tmp_path / "a.tar", ("a.png", encoded(0)), ("b.png", encoded(1)), ("a.txt", b"a"))
    assert "must lie side by side" in reason(samples(tmp_path)[2])


def test_captions_are_stripped_as_those_beside_images_are(tmp_path):
    write(tmp_path / "a.tar", ("a.png", encoded(0)), ("a.txt", "\ufeffein Bär\n".encode()))
    assert samples(tmp_path)[0].columns["txt"] == "ein Bär"
