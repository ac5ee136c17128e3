import io
import os
import tarfile
import time

import datasets
import pytest
from conftest import picture

from first_stage.data import open_image, open_source, size_of, split_source
from first_stage.data.find_shards import find_shards
from first_stage.errors import DataError


def png(seed):
    stream = io.BytesIO()
    picture(seed).save(stream, "PNG")
    return stream.getvalue()


def sizes(source):
    return [size_of(open_image(source.read(i).image, 3))[::-1] for i in range(len(source))]


def test_a_nested_folder_with_classes(tmp_path):
    for name in ["cats/a.png", "cats/a.JPG", "dogs/deep/a.png", "dogs/notes.txt", ".hidden/x.png"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(0).save(path, "PNG") if path.suffix != ".txt" else path.write_text("x")
    source = open_source(str(tmp_path))
    ids = [source.id(i) for i in range(len(source))]
    assert ids == ["cats/a.JPG", "cats/a.png", "dogs/deep/a.png"]
    assert [source.read(i).columns["label"] for i in range(3)] == [0, 0, 1]
    assert source.read(2).columns["class"] == "dogs"
    assert sizes(source) == [(24, 20)] * 3


def test_a_flat_folder_has_no_labels(images):
    source = open_source(str(images))
    assert source.columns == ()
    assert source.read(0).columns == {}


def test_links_are_followed_and_loops_end(tmp_path):
    inside, outside = tmp_path / "data", tmp_path / "secret.png"
    inside.mkdir()
    picture(0).save(outside)
    picture(1).save(inside / "own.png")
    os.symlink(outside, inside / "leak.png")
    os.symlink(inside / "own.png", inside / "alias.png")
    source = open_source(str(inside))
    assert [source.id(i) for i in range(len(source))] == ["alias.png", "leak.png", "own.png"]


def rows():
    features = datasets.Features({"picture": datasets.Image(), "text": datasets.Value("string")})
    values = {
        "picture": [{"bytes": png(i), "path": None} for i in range(3)],
        "text": ["a", "b", "c"],
    }
    return datasets.Dataset.from_dict(values, features=features)


def test_saved_parquet_and_webdataset_shards(tmp_path):
    rows().save_to_disk(tmp_path / "saved")
    (tmp_path / "shards").mkdir()
    rows().to_parquet(tmp_path / "shards/part-0.parquet")
    with tarfile.open(tmp_path / "w.tar", "w") as tar:
        for i in range(3):
            for suffix, content in (("png", png(i)), ("txt", f"text {i}".encode())):
                info = tarfile.TarInfo(f"{i:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    for path in ("saved", "shards", "shards/part-0.parquet"):
        source = open_source(str(tmp_path / path))
        assert len(source) == 3
        assert dict(source.read(1).columns) == {"text": "b"}
        assert sizes(source) == [(24, 20)] * 3
    tar_source = open_source(str(tmp_path / "w.tar"))
    assert len(tar_source) == 3
    assert [tar_source.id(i) for i in range(3)] == ["w.tar#000", "w.tar#001", "w.tar#002"]
    assert tar_source.read(2).columns["txt"] == "text 2"
    assert sizes(tar_source) == [(24, 20)] * 3


def test_a_column_that_is_not_there_names_those_that_are(tmp_path):
    rows().save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"data.image_column is 'photo'.*picture, text"):
        open_source(str(tmp_path / "saved"), image_column="photo")


def test_a_split_that_is_not_there_names_those_that_are(tmp_path):
    datasets.DatasetDict({"test": rows()}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"data.split is 'train'.*test"):
        open_source(str(tmp_path / "saved"))


def test_what_is_not_there_is_told_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    for path, words in [
        (str(tmp_path / "empty"), "holds no images"),
        (str(tmp_path / "nowhere"), "does not exist"),
        (str(tmp_path / "notes.txt"), "holds no images"),
        ("./nowhere", "does not exist"),
    ]:
        with pytest.raises(DataError, match=words) as caught:
            open_source(path)
        assert "\n" not in str(caught.value)


def test_the_built_in_sets():
    photos = {split: open_source("photos", split=split) for split in ("train", "validation", "all")}
    assert [len(p) for p in photos.values()] == [24, 2, 26]
    trained_on = {photos["train"].id(i) for i in range(4)}
    assert not trained_on & {photos["validation"].id(i) for i in range(2)}
    assert all(min(size) == 256 for size in sizes(photos["all"]))
    digits = open_source("digits", split="validation")
    assert len(digits) == 500
    assert sorted({digits.read(i).columns["label"] for i in range(500)}) == list(range(10))
    assert size_of(open_image(digits.read(0).image, 1)) == (28, 28)


def test_a_folder_named_like_a_built_in_set_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    picture(0).save(tmp_path / "photos/mine.png")
    assert open_source("photos").id(0) == "mine.png"


def test_holding_out_is_stable_and_disjoint(images):
    source = open_source(str(images))
    ids = [{part.id(i) for i in range(len(part))} for part in split_source(source, 0.25, 0)]
    assert [len(part) for part in ids] == [9, 3]
    assert not ids[0] & ids[1]
    again = split_source(source, 0.25, 0)[1]
    assert ids[1] == {again.id(i) for i in range(3)}
    with pytest.raises(DataError, match="leaves nothing to train on"):
        split_source(source, 0.99, 0)


def test_files_are_not_decoded_before_they_are_needed(tmp_path):
    (tmp_path / "ok.png").write_bytes(b"rubbish")
    assert len(open_source(str(tmp_path))) == 1


def test_a_name_that_is_no_folder_is_told_at_once_without_a_network(monkeypatch, capfd):
    """`datasets` asks the hub six times, and prints as often."""
    from huggingface_hub import constants

    def head(*_, **__):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.get_session", lambda: type("S", (), {"head": head}))
    began = time.monotonic()
    for find in (open_source, find_shards):
        with pytest.raises(
            DataError, match=r"'nothere' is no .* here.* cannot be reached"
        ) as error:
            find("nothere")
        assert "\n" not in str(error.value)
    assert time.monotonic() - began < 5
    assert "Retrying" not in "".join(capfd.readouterr())
    assert not constants.HF_HUB_OFFLINE
