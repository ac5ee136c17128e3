"""What lies beside images, as people have it: captions, labels, metadata."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_folders import png, put, put_parquet

from first_stage.data import BrokenImage, open_source
from first_stage.errors import DataError


def opened(path, **options):
    """The samples' columns by id, and what was said."""
    lines: list[str] = []
    source = open_source(str(path), say=lines.append, **options)
    samples = [source.read(index) for index in range(len(source))]
    columns = {s.id: {name: s.columns[name] for name in source.columns} for s in samples}
    return columns, "\n".join(lines)


def test_captions_however_editors_wrote_them(tmp_path):
    put(tmp_path, "a.png", "B.PNG", "c.png", "d.png")
    (tmp_path / "a.txt").write_bytes("\ufeffein Bär\r\n".encode())
    (tmp_path / "B.TXT").write_text("up")
    (tmp_path / "c.Txt").write_text("mixed")
    columns, _ = opened(tmp_path)
    captions = {name: each["caption"] for name, each in columns.items()}
    assert captions == {"a.png": "ein Bär", "B.PNG": "up", "c.png": "mixed", "d.png": None}


def test_a_text_that_cannot_be_read_is_that_samples_failure(tmp_path):
    put(tmp_path, "a.png", "b.png")
    (tmp_path / "a.txt").write_bytes(b"\xfc")
    (tmp_path / "b.json").write_text("[" * 100_000 + "]" * 100_000)
    source = open_source(str(tmp_path))
    for index, column in ((0, "caption"), (1, "json")):
        with pytest.raises(BrokenImage, match="beside it cannot be read"):
            source.read(index).columns[column]


def test_metadata_with_marks_backslashes_and_whole_paths(tmp_path):
    put(tmp_path, "s/a.png", "b.png", "c.png")
    text = f"file_name,text\ns\\a.png,x\n./b.png,y\n{tmp_path}/c.png,z\n/etc/passwd,no\n"
    (tmp_path / "metadata.csv").write_bytes(("\ufeff" + text).encode())
    columns, said = opened(tmp_path)
    found = {name: each["text"] for name, each in columns.items()}
    assert found == {"s/a.png": "x", "b.png": "y", "c.png": "z"}
    assert "1 rows of metadata.csv name no image that is read" in said


def test_rows_that_come_again_are_counted(tmp_path):
    put(tmp_path, "a.png")
    rows = [{"file_name": "a.png", "text": "old"}, {"file_name": "a.png", "text": "new"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns, said = opened(tmp_path)
    assert columns["a.png"]["text"] == "new"
    assert "1 rows of metadata.jsonl name an image again; the last one counts" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [("{bad", "line 2 is no JSON: "), ('["a.png"]', "line 2 is no JSON object"),
     ("[" * 100_000, "line 2 is no JSON: ")],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path, line, words):
    put(tmp_path, "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n' + line)
    with pytest.raises(DataError, match=words) as error:
        open_source(str(tmp_path))
    assert "\n" not in str(error.value)


def test_labels_of_metadata_and_of_folders_are_not_mixed(tmp_path):
    """Else 1 could be `dog` for one image and something else for another."""
    put(tmp_path, "cat/a.png", "dog/b.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "cat/a.png", "label": 1}\n')
    columns, said = opened(tmp_path)
    assert columns == {"cat/a.png": {"label": 1}, "dog/b.png": {"label": None}}
    assert "labels are those of metadata.jsonl, not of the folders" in said


def test_values_of_several_kinds_become_texts(tmp_path):
    put(tmp_path, "a.png", "b.png", "c.png")
    rows = [{"file_name": "a.png", "tag": 1}, {"file_name": "b.png", "tag": "x"}]
    rows += [{"file_name": "c.png", "tag": None}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns, _ = opened(tmp_path)
    assert [each["tag"] for each in columns.values()] == ["1", "x", None]


def test_a_class_has_the_same_number_in_every_split(tmp_path):
    put(tmp_path, "train/cat/a.png", "train/dog/b.png", "test/ant/x.png", "test/dog/y.png")
    numbers = {}
    for split in ("train", "test", "all"):
        columns, _ = opened(tmp_path, hub_split=split)
        for each in columns.values():
            numbers.setdefault(each["class"], set()).add(each["label"])
    assert numbers == {"ant": {0}, "cat": {1}, "dog": {2}}


def test_tables_without_rows(tmp_path):
    empty = pa.table({"image": pa.array([], pa.binary())})
    pq.write_table(empty, tmp_path / "b.parquet")
    with pytest.raises(DataError, match="its tables have no rows"):
        open_source(str(tmp_path))
    put_parquet(tmp_path / "a.parquet")
    assert len(open_source(str(tmp_path))) == 3


def test_a_list_with_a_mark_and_tables_named_twice(tmp_path):
    put(tmp_path, "x/a.png", "x/b.png")
    (tmp_path / "list.txt").write_bytes("\ufeffx/a.png\r\nx/b.png\r\n".encode())
    assert len(open_source(str(tmp_path / "list.txt"))) == 2
    put_parquet(tmp_path / "t" / "a.parquet")
    assert len(open_source(f"[{tmp_path}/t/a.parquet, {tmp_path}/t/*.parquet]")) == 3


def test_a_saved_data_set_of_several_splits_says_which(tmp_path):
    import datasets

    table = datasets.Dataset.from_dict({"image": [{"bytes": png(0), "path": None}]})
    table = table.cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "s")
    with pytest.raises(DataError, match="has the splits train, test: say which"):
        open_source(str(tmp_path / "s"), hub_split=None)
