"""What counts as the data set: found, counted, never silently left out."""

import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_folders import png, put, put_parquet, put_tar

from first_stage.data import BrokenImage, listing, open_image, open_source, size_of, take_inventory
from first_stage.data.checks import value_remark
from first_stage.data.decode import Reading
from first_stage.data.paths import Paths
from first_stage.errors import DataError


def ids(source) -> list[str]:
    return [source.id(index) for index in range(len(source))]


def said(path, split=None) -> str:
    lines: list[str] = []
    open_source(str(path), hub_split=split, say=lines.append)
    return "\n".join(lines)


def refused(path, split=None, **options) -> str:
    with pytest.raises(DataError) as caught:
        open_source(str(path), hub_split=split, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestLayouts:
    def test_suffixes_in_any_case_and_none(self, tmp_path):
        put(tmp_path, "a.JPE", "b.PNG", "c", "d.TIFF", "notes.xyz", "old.psd")
        (tmp_path / "readme").write_text("hello")
        assert ids(open_source(str(tmp_path))) == ["a.JPE", "b.PNG", "c", "d.TIFF"]
        text = said(tmp_path)
        assert f"{tmp_path}: 4 images" in text
        assert "left out: 1 .psd: no known image format, such as old.psd" in text
        assert "left out: 1 no suffix: no known image format, such as readme" in text

    def test_formats_that_need_a_package_say_which(self, tmp_path, monkeypatch):
        monkeypatch.setattr(listing, "find_spec", lambda module: None)
        put(tmp_path, "a.png", *(f"{n}.heic" for n in range(20)), "scan.dcm", "x.jxl")
        text = said(tmp_path)
        assert "left out: 20 .heic: pip install pillow-heif" in text
        assert "1 .dcm: pip install pydicom" in text
        assert "1 .jxl: pip install pillow-jxl-plugin" in text

    def test_nested_shards_are_found(self, tmp_path):
        put_parquet(tmp_path / "hub" / "data" / "part-0.parquet")
        put(tmp_path / "hub", "README.md")
        assert ids(open_source(str(tmp_path / "hub"))) == [
            f"data/part-0.parquet#{n:09d}" for n in range(3)
        ]
        put_tar(tmp_path / "tars" / "a" / "0.tar")
        put_tar(tmp_path / "tars" / "b" / "0.tar", 2)
        source = open_source(str(tmp_path / "tars"))
        assert len(source) == 5
        assert source.id(4) == "b/0.tar#0-001"

    def test_the_output_of_img2dataset(self, tmp_path):
        put_tar(tmp_path / "00000.tar")
        pq.write_table(pa.table({"url": ["x"], "width": [3]}), tmp_path / "00000.parquet")
        (tmp_path / "00000_stats.json").write_text("{}")
        assert len(open_source(str(tmp_path))) == 3
        text = said(tmp_path)
        assert "1 tar file" in text
        assert "1 parquet files, of tar files beside them" in text

    def test_images_beside_shards_are_never_a_silent_choice(self, tmp_path):
        many = put(tmp_path / "many", *(f"{n}.png" for n in range(30)))
        put_tar(many / "backup.tar")
        assert len(open_source(str(many))) == 30
        assert "left out: 1 tar files: the folder holds 30 images, such as backup.tar" in said(many)
        put_parquet(many / "thumbs.parquet")
        assert "left out: 1 tar files: the folder holds 30 images" in said(many)
        put(many, *(f"{n}.jpg" for n in range(30)))
        assert "left out: 1 parquet files: the folder holds 60 images" in said(many)
        few = put(tmp_path / "few", "banner.png", "other.png")
        put_tar(few / "a.tar")
        assert "holds 2 images and 1 tar file: say which with a pattern" in refused(few)
        both = tmp_path / "both"
        put_tar(both / "a.tar")
        put_parquet(both / "a.parquet")
        assert "holds tar and parquet shards" in refused(both)

    def test_patterns_braces_several_paths_and_lists(self, tmp_path):
        for name in ("one", "two"):
            put(tmp_path / name, "a.png", "b.jpg")
        for number in range(3):
            put_tar(tmp_path / "t" / f"{number:03d}.tar")
        assert len(open_source(f"{tmp_path}/t/*.tar")) == 9
        assert len(open_source(f"{tmp_path}/t/{{000..001}}.tar")) == 6
        assert ids(open_source(f"{tmp_path}/*/*.png")) == ["one/a.png", "two/a.png"]
        both = ["one/a.png", "one/b.jpg", "two/a.png", "two/b.jpg"]
        assert ids(open_source(f"{tmp_path}/{{one,two}}")) == both
        assert ids(open_source(f"[{tmp_path}/one, {tmp_path}/two]")) == both
        (tmp_path / "list.txt").write_text("one/b.jpg\ntwo/a.png\nthree/gone.png\n")
        assert ids(open_source(str(tmp_path / "list.txt"))) == ["one/b.jpg", "two/a.png"]
        assert "1 listed files that are not there" in said(tmp_path / "list.txt")
        assert "nothing matches" in refused(f"{tmp_path}/*.tar")
        assert "does not exist" in refused(f"[{tmp_path}/one, {tmp_path}/three]")

    def test_nothing_says_what_is_there(self, tmp_path, monkeypatch):
        monkeypatch.setattr(listing, "find_spec", lambda module: None)
        put(tmp_path / "heic", "a.heic", "b.heic")
        assert "it has 2 .heic: pip install pillow-heif" in refused(tmp_path / "heic")
        (tmp_path / "zip").mkdir()
        (tmp_path / "zip" / "all.zip").write_bytes(b"PK")
        assert "1 .zip: unpack them first" in refused(tmp_path / "zip")
        (tmp_path / "table").mkdir()
        pq.write_table(pa.table({"url": ["x"]}), tmp_path / "table" / "a.parquet")
        assert "1 parquet files without a column of images" in refused(tmp_path / "table")

    def test_links_out_of_the_folder_loops_and_a_folder_that_is_all_links(self, tmp_path):
        put(tmp_path / "blobs", "0", "1")
        put(tmp_path / "elsewhere" / "dogs", "a.png")
        put(tmp_path / "data" / "cats", "b.png")
        data = tmp_path / "data"
        (data / "dogs").symlink_to(tmp_path / "elsewhere" / "dogs")
        (data / "cats" / "up").symlink_to(data)
        (data / "gone.png").symlink_to(tmp_path / "nowhere.png")
        (data / "zero.png").symlink_to("/dev/zero")
        source = open_source(str(data))
        assert ids(source) == ["cats/b.png", "dogs/a.png"]
        assert source.read(1).columns["class"] == "dogs"
        text = said(data)
        assert "1 links to folders that are listed already, such as cats/up" in text
        assert "1 links that lead nowhere, such as gone.png" in text
        assert "1 no regular files, such as zero.png" in text
        assert "2 links out of the folder followed" in text
        (tmp_path / "snapshot").mkdir()
        for number in range(2):
            (tmp_path / "snapshot" / f"{number}.png").symlink_to(tmp_path / "blobs" / f"{number}")
        assert len(open_source(str(tmp_path / "snapshot"))) == 2

    def test_junk_of_systems_and_storage_boxes(self, tmp_path):
        put(tmp_path, "cats/a.png", "cats/._a.png", "cats/@eaDir/a.png/THUMB.png",
            "dogs/b.png", "@eaDir/x.png", "__MACOSX/y.png", "#recycle/z.png",
            "._b.parquet")  # fmt: skip
        source = open_source(str(tmp_path))
        assert ids(source) == ["cats/a.png", "dogs/b.png"]
        assert source.classes == ["cats", "dogs"]
        assert "left out: 6 hidden and system files" in said(tmp_path)

    def test_names_that_are_not_utf8(self, tmp_path):
        with open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png"), "wb") as stream:
            stream.write(png(0))
        put(tmp_path, "ok.png", "über.png")
        source = open_source(str(tmp_path))
        assert ids(source) == ["caf\\xe9.png", "ok.png", "über.png"]
        assert size_of(open_image(source.read(0).image, 3)) == (20, 24)
        assert source.ids().to_pylist() == ids(source)
        json.dumps(ids(source)).encode("utf-8")

    def test_the_list_is_a_file(self, tmp_path):
        put(tmp_path / "d", "a.png", "x.psd")
        inventory = take_inventory(str(tmp_path / "d"))
        inventory.write(tmp_path / "files.txt")
        lines = (tmp_path / "files.txt").read_text().splitlines()
        assert "+ a.png" in lines
        assert "- x.psd\t.psd: no known image format" in lines

    def test_paths_in_one_buffer(self):
        names = [b"a", b"", b"b/c d.png", "ü".encode()]
        paths = Paths(names)
        assert list(paths) == names
        assert [paths[i] for i in range(4)] == names
        assert paths.texts().to_pylist() == ["a", "", "b/c d.png", "ü"]


class TestSplits:
    @pytest.fixture
    def shards(self, tmp_path):
        put_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", (0, 1))
        put_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", (2,))
        put_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", (3, 4, 5))
        return tmp_path

    def test_of_shards(self, shards):
        for split, count in (("train", 2), ("validation", 1), ("val", 1), ("test", 3), ("all", 6)):
            assert len(open_source(str(shards), hub_split=split)) == count
        assert "say which with data.split" in refused(shards)
        assert "'dogs', but" in refused(shards, "dogs")
        assert "has the splits: test, train, validation" in refused(shards, "dogs")
        assert "left out: 1 shards of the split test" in said(shards, "train")

    def test_of_folders_of_images(self, tmp_path):
        put(tmp_path, "train/cats/a.png", "train/dogs/b.png", "val/cats/c.png", "val/dogs/d.png")
        train = open_source(str(tmp_path), hub_split="train")
        assert ids(train) == ["train/cats/a.png", "train/dogs/b.png"]
        assert train.classes == ["cats", "dogs"]
        assert ids(open_source(str(tmp_path), hub_split="validation")) == [
            "val/cats/c.png", "val/dogs/d.png",
        ]  # fmt: skip
        everything = open_source(str(tmp_path), hub_split="all")
        assert everything.classes == ["cats", "dogs"]
        assert "2 images of the split validation" in said(tmp_path, "train")

    def test_a_class_named_like_a_split_is_a_class(self, tmp_path):
        put(tmp_path, "bus/a.png", "car/b.png", "train/c.png")
        assert open_source(str(tmp_path)).classes == ["bus", "car", "train"]

    def test_a_split_that_no_name_says_is_refused(self, tmp_path):
        put(tmp_path, "a.png")
        assert "nothing in" in refused(tmp_path, "test")
        assert len(open_source(str(tmp_path), hub_split="train")) == 1

    def test_one_file_is_that_file_whatever_its_name(self, shards):
        assert len(open_source(f"{shards}/data/test-00000-of-00001.parquet")) == 3
        assert len(open_source(f"{shards}/data/test-*.parquet")) == 3

    def test_of_tars(self, tmp_path):
        put_tar(tmp_path / "train-000.tar", 4)
        put_tar(tmp_path / "val-000.tar", 2)
        assert len(open_source(str(tmp_path), hub_split="validation")) == 2


class TestBesideImages:
    def test_captions_and_json(self, tmp_path):
        put(tmp_path, "a.png", "b.png", "c.png")
        (tmp_path / "a.txt").write_text("a cat\n")
        (tmp_path / "b.caption").write_text("a dog")
        (tmp_path / "c.json").write_text('{"stars": 3}')
        (tmp_path / "lonely.txt").write_text("x")
        source = open_source(str(tmp_path))
        assert source.columns == ("caption", "json")
        assert [source.read(i).columns["caption"] for i in range(3)] == ["a cat", "a dog", None]
        assert source.read(2).columns["json"] == {"stars": 3}
        text = said(tmp_path)
        assert "2 caption files beside the images" in text
        assert "1 texts and JSON files without an image of the same name, such as lonely" in text
        (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xfa")
        sample = open_source(str(tmp_path)).read(0)
        open_image(sample.image, 3)  # what nobody asks for is not decoded
        with pytest.raises(BrokenImage, match=r"a\.txt beside it cannot be read"):
            sample.columns["caption"]

    @pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
    def test_metadata_as_imagefolder_reads_it(self, tmp_path, kind):
        put(tmp_path, "sub/a.png", "sub/b.png", "sub/c.png")
        rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "two"},
                {"file_name": "gone.png", "text": "three"}]  # fmt: skip
        path = tmp_path / "sub" / f"metadata.{kind}"
        if kind == "jsonl":
            path.write_text("\n".join(map(json.dumps, rows)))
        elif kind == "csv":
            path.write_text("file_name,text\n" + "\n".join(",".join(r.values()) for r in rows))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        source = open_source(str(tmp_path))
        assert "text" in source.columns
        assert [source.read(i).columns["text"] for i in range(3)] == ["one", "two", None]
        text = said(tmp_path)
        assert f"1 rows of sub/metadata.{kind} name no image that is read" in text
        assert "1 images have no row of metadata" in text
        path.write_bytes(b"{rubbish")
        if kind != "csv":
            assert f"metadata.{kind}' cannot be read" in refused(tmp_path)

    def test_metadata_leads_nowhere_else(self, tmp_path):
        put(tmp_path / "data", "a.png")
        put(tmp_path, "secret.png")
        lines = ['{"file_name": "../secret.png", "text": "x"}', '{"file_name": "/etc/passwd"}']
        (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
        assert ids(open_source(str(tmp_path / "data"))) == ["a.png"]

    def test_one_stray_image_takes_no_labels_away(self, tmp_path):
        put(tmp_path, "cats/a.png", "dogs/b.png", "cover.png")
        source = open_source(str(tmp_path))
        assert [source.read(i).columns["label"] for i in range(3)] == [0, None, 1]
        assert "1 image beside the class folders has no label: cover.png" in said(tmp_path)

    def test_class_names_of_data_sets_are_kept(self, tmp_path):
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
        )
        values = {"image": [{"bytes": png(0), "path": None}] * 2, "label": [1, 0]}
        datasets.Dataset.from_dict(values, features=features).save_to_disk(tmp_path / "s")
        source = open_source(str(tmp_path / "s"))
        assert [dict(source.read(i).columns) for i in range(2)] == [
            {"label": 1, "class": "dog"}, {"label": 0, "class": "cat"},
        ]  # fmt: skip


class TestParquet:
    def test_paths_lead_nowhere_else(self, tmp_path):
        put(tmp_path / "data" / "pictures", "in.png")
        put(tmp_path, "secret.png")
        places = ["pictures/in.png", str(tmp_path / "secret.png"), "../secret.png", "/dev/zero",
                  "https://example.org/a.png", "pictures/gone.png"]  # fmt: skip
        as_struct = pa.array([{"bytes": None, "path": p} for p in places])
        for column in (as_struct, pa.array(places)):
            pq.write_table(pa.table({"image": column}), tmp_path / "data" / "a.parquet")
            source = open_source(f"{tmp_path}/data/a.parquet")
            assert size_of(open_image(source.read(0).image, 3)) == (20, 24)
            for index, words in enumerate(["outside", "outside", "outside", "https"], 1):
                with pytest.raises(BrokenImage, match=words):
                    open_image(source.read(index).image, 3)
            with pytest.raises(BrokenImage):
                open_image(source.read(5).image, 3)

    def test_a_damaged_file_and_drifting_columns_are_named(self, tmp_path):
        put_parquet(tmp_path / "a.parquet", label=[1, 2, 3])
        put_parquet(tmp_path / "b.parquet", label=["x", "y", "z"], more=[1, 2, 3])
        source = open_source(str(tmp_path))
        assert len(source) == 6
        assert source.columns == ()
        assert "columns that not all files have alike are not read: label, more" in said(tmp_path)
        pq.write_table(pa.table({"label": [1]}), tmp_path / "c.parquet")
        assert len(open_source(str(tmp_path))) == 6
        (tmp_path / "b.parquet").write_bytes(b"PAR1 rubbish PAR1")
        assert "b.parquet' cannot be read" in refused(tmp_path)

    def test_a_broken_second_image_column_is_nobodys_business(self, tmp_path):
        broken = [{"bytes": b"no", "path": None}] * 3
        put_parquet(tmp_path / "a.parquet", depth=broken)
        source = open_source(str(tmp_path))
        assert size_of(open_image(source.read(1).image, 3)) == (20, 24)

    def test_a_full_disk_of_the_cache_is_told(self, tmp_path, monkeypatch):
        put_parquet(tmp_path / "a.parquet")

        def full(*_, **__):
            try:
                raise OSError(28, "No space left on device")
            except OSError as error:
                raise RuntimeError("An error occurred while generating the dataset") from error

        monkeypatch.setattr(datasets, "load_dataset", full)
        assert "is full: set HF_HOME to another disk" in refused(tmp_path)

    def test_arrays(self, tmp_path):
        values = [[[[b * 100 + x for b in range(5)] for x in range(4)] for _ in range(3)]]
        kind = pa.list_(pa.list_(pa.list_(pa.uint16())))
        pq.write_table(pa.table({"image": pa.array(values, kind)}), tmp_path / "a.parquet")
        seen = open_image(open_source(str(tmp_path)).read(0).image, Reading(5))
        assert seen.shape == (3, 4, 5)
        assert seen[0, 3, 4] * 257 == pytest.approx(403)


def test_values_that_use_a_small_part_of_their_range_are_remarked(tmp_path):
    import numpy as np
    from PIL import Image

    Image.fromarray(np.arange(4064, dtype=np.uint16).reshape(32, 127)).save(tmp_path / "a.png")
    source = open_source(str(tmp_path))
    remark = value_remark(source, Reading(1))
    assert "are 0 to 4063 of 65535" in remark
    assert "data.value_range [0, 4095]" in remark
    assert value_remark(source, Reading(1, value_range=(0, 4095))) == ""
    put(tmp_path / "photos", "a.png")
    assert value_remark(open_source(str(tmp_path / "photos")), Reading(3)) == ""
