import io

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache_helpers import NumberReader, number_of, numbered, options, photo, shard_hashes

from first_stage.commands.cache import main
from first_stage.errors import UserError
from latent_tools import LatentDataset, precompute
from latent_tools.build import parquet as streaming
from latent_tools.build import sizes
from latent_tools.build.parquet import ParquetStream

COMMON = {"resolution": 8, "resize": 8, "dtype": "float32", "unit_size": 5, "batch_size": 2}


def encoded(number):
    buffer = io.BytesIO()
    numbered(number).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def picture(number, size):
    buffer = io.BytesIO()
    photo(number, size).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(root, system=None):
    """Two train files and a test file; row groups of four rows."""
    system = system or fsspec.filesystem("file")
    for name, numbers in (("train-0", range(13)), ("train-1", range(13, 30)), ("test-0", [99])):
        table = pa.table(
            {
                "image": [encoded(n) for n in numbers],
                "caption": [f"number {n}" for n in numbers],
            }
        )
        system.makedirs(f"{root}/data", exist_ok=True)
        with system.open(f"{root}/data/{name}.parquet", "wb") as file:
            pq.write_table(table, file, row_group_size=4)


def assert_numbers(output):
    dataset = LatentDataset(output, normalize="none")
    assert len(dataset) == 30
    for item in (dataset[n] for n in range(30)):
        assert item["caption"] == f"number {number_of(item['latents'])[0]}"


def test_rows_ids_and_splits(tmp_path):
    write_parquet(tmp_path)
    source = ParquetStream(str(tmp_path))
    assert len(source) == 30
    assert source.columns == ("caption",)
    assert source.id(0) == "data/train-0.parquet#000000000"
    assert source.id(13) == "data/train-1.parquet#000000000"
    assert source.id(29) == "data/train-1.parquet#000000016"
    assert [source.read(n).columns["caption"] for n in (29, 0, 13, 12)] == [
        "number 29", "number 0", "number 13", "number 12",
    ]  # fmt: skip
    assert len(ParquetStream(str(tmp_path), split="test")) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_group_is_fetched_once_by_who_needs_it(tmp_path, workers, monkeypatch):
    write_parquet(tmp_path)
    log = tmp_path / "log"
    original = pq.ParquetFile.read_row_group

    def read_row_group(self, group, *arguments, **named):
        with log.open("a") as file:
            file.write(f"{group}\n")
        return original(self, group, *arguments, **named)

    monkeypatch.setattr(streaming.pq.ParquetFile, "read_row_group", read_row_group)
    precompute(
        NumberReader(), "x", ParquetStream(str(tmp_path)), tmp_path / f"c{workers}",
        options(workers=workers, **COMMON),
    )  # fmt: skip
    assert_numbers(tmp_path / f"c{workers}")
    fetched = len(log.read_text().split())
    # Nine row groups; the data's fingerprint and a unit's edges may ask for one again.
    assert fetched <= 9 + 6
    alone = tmp_path / "alone"
    monkeypatch.undo()
    precompute(NumberReader(), "x", ParquetStream(str(tmp_path)), alone, options(**COMMON))
    assert shard_hashes(alone) == shard_hashes(tmp_path / f"c{workers}")


def test_with_buckets_a_row_group_is_read_once_to_plan_and_once_to_encode(tmp_path, monkeypatch):
    """Images of three shapes, mixed in every row group; a heavy column that nobody asked for."""
    shapes = [(16, 16), (32, 16), (16, 32)]
    numbers, folder = range(80), tmp_path / "data"
    folder.mkdir()
    table = pa.table(
        {
            "image": [picture(n, shapes[n % 3]) for n in numbers],
            "caption": [f"number {n}" for n in numbers],
            "heavy": [b"x" * 1000] * 80,
        }
    )
    pq.write_table(table, folder / "a.parquet", row_group_size=4)
    log = tmp_path / "log"
    original = pq.ParquetFile.read_row_group

    def read_row_group(self, group, columns=None, **named):
        with log.open("a") as file:
            file.write(f"{group} {','.join(columns)}\n")
        return original(self, group, columns=columns, **named)

    monkeypatch.setattr(streaming.pq.ParquetFile, "read_row_group", read_row_group)
    precompute(
        NumberReader(), "x", ParquetStream(str(folder)), tmp_path / "c",
        options(buckets="16x16,16x32,32x16", unit_size=4, workers=4, batch_size=2),
    )  # fmt: skip
    reads = log.read_text().splitlines()
    planned = sorted(int(r.split()[0]) for r in reads if r.endswith(" image"))
    encoded = [int(r.split()[0]) for r in reads if r.endswith(" image,caption")]
    assert planned == list(range(20))
    assert len(planned) + len(encoded) == len(reads)  # and never the heavy column
    # Once, but for stretches that two of the four workers share.
    assert set(encoded) == set(range(20))
    assert len(encoded) <= 20 + 3 * 3
    dataset = LatentDataset(tmp_path / "c", normalize="none")
    assert len(dataset) == 80
    for item in (dataset[n] for n in range(80)):
        width, height = shapes[int(item["caption"].split()[1]) % 3]
        assert item["original_size"].tolist() == [height, width]
        assert item["latents"].shape[-2:] == (height // 2, width // 2)


def test_sizes_that_were_read_are_not_read_again(tmp_path, monkeypatch):
    write_parquet(tmp_path / "data")
    monkeypatch.setattr(sizes, "_BLOCK", 8)
    read, original = [], ParquetStream.images

    def images(self, run):
        if len(read) == 3:
            raise KeyboardInterrupt
        read.append(run.tolist())
        return original(self, run)

    arguments = (NumberReader(), "x", ParquetStream(str(tmp_path / "data")), tmp_path / "c")
    chosen = options(buckets="8x8,8x16", **COMMON)
    monkeypatch.setattr(ParquetStream, "images", images)
    with pytest.raises(KeyboardInterrupt):
        precompute(*arguments, chosen)
    first = [place for run in read for place in run]
    assert first == list(range(12))  # a block of eight, and a part of the next

    def all_images(self, run):
        read.append(run.tolist())
        return original(self, run)

    monkeypatch.setattr(ParquetStream, "images", all_images)
    del read[:]
    precompute(*arguments, chosen)
    assert [place for run in read for place in run] == list(range(8, 30))
    assert_numbers(tmp_path / "c")
    assert not (tmp_path / "c" / "planning").exists()


def test_far_files_are_read_where_they_are_and_a_launch_resumes(tmp_path):
    """Through fsspec's in-memory file system, which stands for any remote one."""
    system = fsspec.filesystem("memory")
    write_parquet("/far", system)
    source = ParquetStream("memory://far")
    precompute(NumberReader(), "x", source, tmp_path / "c", options(**COMMON))
    assert_numbers(tmp_path / "c")
    before = shard_hashes(tmp_path / "c")
    (tmp_path / "c" / "commits" / "u000002.json").unlink()
    again = precompute(
        NumberReader(), "x", ParquetStream("memory://far"), tmp_path / "c", options(**COMMON)
    )
    assert (again.images, again.already) == (5, 5)
    assert shard_hashes(tmp_path / "c") == before


def test_the_command_streams(tmp_path, capsys):
    from cache_helpers import make_vae

    write_parquet(tmp_path / "data")
    make_vae().save_pretrained(tmp_path / "vae")
    main(
        ["--first_stage", str(tmp_path / "vae"), "--data.path", str(tmp_path / "data"),
         "--data.streaming", "--output", str(tmp_path / "c"), "--data.workers", "0"]
    )  # fmt: skip
    assert "30 samples" in capsys.readouterr().out
    dataset = LatentDataset(tmp_path / "c")
    assert [dataset[n]["caption"] for n in (0, 29)] == ["number 0", "number 29"]


def test_what_is_no_parquet_is_refused(tmp_path):
    with pytest.raises(UserError, match="no parquet files"):
        ParquetStream(str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match=r"'a\.parquet' of .* is no parquet file"):
        ParquetStream(str(tmp_path))
