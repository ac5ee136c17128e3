import numpy as np
import pytest
import torch
from conftest import picture

from first_stage.data import (
    BrokenFiles,
    StepSampler,
    TrainingStream,
    View,
    fingerprint,
    fixed_images,
    open_source,
    spare_workers,
    training_loader,
)
from first_stage.data import (
    stream as loader,
)
from first_stage.errors import DataError


def stream(images, **options):
    options = {"channels": 3, "seed": 0, **options}
    return TrainingStream(open_source(str(images)), View(16, None), **options)


def batches(images, rank=0, world=1, micro=2, workers=0, start=0, steps=5, **options):
    sampler = StepSampler(6, micro, start, steps, rank, world)
    return list(training_loader(stream(images, **options), sampler, workers, pin_memory=False))


def joined(parts):
    return (
        [name for batch in parts for name in batch.ids],
        torch.cat([batch.pixels for batch in parts]),
        torch.tensor([p for batch in parts for p in batch.positions]),
    )


def test_every_epoch_is_a_permutation(images):
    ids, _, positions = joined(batches(images, steps=4))
    assert sorted(ids[:12]) == sorted(ids[12:]) == [f"{i:02d}.png" for i in range(12)]
    assert ids[:12] != ids[12:]
    assert positions.tolist() == list(range(24))


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (3, 0), (1, 2), (3, 1)])
def test_neither_processes_nor_workers_change_a_step(images, world, workers):
    expected = joined(batches(images, micro=6))
    share = 6 // world
    ranks = [batches(images, rank, world, share, workers) for rank in range(world)]
    together = joined([ranks[rank][step] for step in range(5) for rank in range(world)])
    assert together[0] == expected[0]
    assert torch.equal(together[1], expected[1])
    assert torch.equal(together[2], expected[2])
    for step in range(5):
        seen = [set(ranks[rank][step].ids) for rank in range(world)]
        assert sum(map(len, seen)) == len(set().union(*seen)) == 6


def test_resuming_is_starting_at_a_step(images):
    whole, rest = batches(images, micro=6), batches(images, micro=6, start=3)
    assert joined(whole[3:])[0] == joined(rest)[0]
    assert torch.equal(joined(whole[3:])[1], joined(rest)[1])


def test_seed_crop_and_flip(images):
    first, again, other = (joined(batches(images, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first[1], again[1])
    assert first[0] != other[0]
    still = stream(images, random_crop=False, flip=False)
    epochs = [still[position] for position in range(24)]
    views = {}
    for example in epochs:
        views.setdefault(example.id, []).append(example.pixels)
    assert all(np.array_equal(a, b) for a, b in views.values())
    moving = stream(images)
    flips = [moving[position] for position in range(24)]
    assert any(not np.array_equal(a.pixels, b.pixels) for a, b in zip(epochs, flips, strict=True))


def test_a_data_set_smaller_than_a_batch_comes_round(tmp_path):
    picture(0).save(tmp_path / "only.png")
    assert batches(tmp_path, steps=1)[0].ids == ["only.png", "only.png"]


def test_broken_files_are_skipped_and_reported(images):
    (images / "03.png").write_bytes(b"rubbish")
    (images / "07.png").write_bytes(b"")
    found = batches(images, micro=6, steps=2)
    broken = {}
    for batch in found:
        assert len(batch.ids) == 6
        assert not {"03.png", "07.png"} & set(batch.ids)
        broken |= batch.broken
    assert set(broken) == {"03.png", "07.png"}
    assert all("not an image" in reason for reason in broken.values())
    # Who decodes does not matter for what takes their place.
    assert joined(found)[0] == joined(batches(images, micro=6, steps=2, workers=2))[0]


def test_nothing_but_broken_files_is_told(tmp_path):
    (tmp_path / "a.png").write_bytes(b"rubbish")
    with pytest.raises(DataError, match="cannot be decoded"):
        stream(tmp_path)[0]
    with pytest.raises(DataError, match="none of the 1 samples"):
        fixed_images(open_source(str(tmp_path)), View(16, None), 3, 4, 0)


def test_the_share_of_broken_files_is_bounded(tmp_path):
    broken = BrokenFiles(tmp_path / "broken.jsonl", max_share=0.02)
    broken.add(50, [("a", "bad"), ("b", "worse")], write=True)  # 2 of 100 are allowed so far
    broken.add(50, [], write=True)
    with pytest.raises(DataError, match=r"3 of 110 samples.*max_broken \(0.02\).*a: bad"):
        broken.add(10, [("a", "bad")], write=True)
    lines = (tmp_path / "broken.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert '"worse"' in lines[1]


def test_sixteen_bit_files_widen_a_batch_without_changing_values(images):
    from PIL import Image

    deep = Image.fromarray(np.full((20, 24), 257 * 100, np.uint16))
    plain = joined(batches(images, micro=6, steps=2, flip=False, random_crop=False))
    deep.save(images / "05.png")
    mixed = batches(images, micro=6, steps=2, flip=False, random_crop=False)
    assert {batch.pixels.dtype for batch in mixed} == {torch.uint8, torch.float32}
    ids, *_ = joined(mixed)
    values = torch.cat([batch.pixels.float() for batch in mixed])
    for place, name in enumerate(ids):
        expected = torch.full_like(values[place], 100) if name == "05.png" else plain[1][place]
        assert torch.equal(values[place], expected.float())


def test_a_changed_folder_has_another_fingerprint(images):
    before = fingerprint(open_source(str(images)))
    assert before == fingerprint(open_source(str(images)))
    picture(99).save(images / "new.png")
    assert before != fingerprint(open_source(str(images)))


def test_spare_cores_decode(monkeypatch):
    monkeypatch.setattr(loader.os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert spare_workers() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert spare_workers() == 3
    assert spare_workers(busy=4) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "24")
    assert spare_workers() == 0
