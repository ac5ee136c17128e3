import collections
import time

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

from first_stage.data import (
    BrokenFiles,
    Later,
    StepSampler,
    TrainingStream,
    Variation,
    View,
    cache_workers,
    fingerprint,
    fixed_images,
    open_source,
    spare_workers,
    too_many,
    training_loader,
)
from first_stage.data import (
    workers as loader,
)
from first_stage.errors import DataError


def stream(images, reading=3, seed=0, **variation):
    source = open_source(str(images))
    return TrainingStream(source, View(16, None), reading, seed, Variation(**variation))


def batches(images, rank=0, world=1, micro=2, workers=0, start=0, steps=5, **options):
    sampler = StepSampler(6, micro, range(start, steps), rank, world)
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


class TestSizes:
    """With `least_scale` the size of the image around a crop is drawn too."""

    @pytest.fixture
    def ramp(self, tmp_path):
        """Four images that grow brighter from left to right, by 1 a pixel."""
        for index in range(4):
            values = np.broadcast_to(np.arange(240, dtype=np.uint8), (200, 240))
            Image.fromarray(values).save(tmp_path / f"{index}.png")
        return tmp_path

    def of(self, folder, least_scale, view, draws=1):
        variation = Variation(flip="none", least_scale=least_scale)
        made = TrainingStream(open_source(str(folder)), view, 1, 0, variation)
        pixels = [made[position].pixels[:, :, 0].astype(float) for position in range(draws)]
        return pixels, np.array([1 / np.diff(p[:, 2:-2], axis=1).mean() for p in pixels])

    def test_are_drawn_evenly_on_a_log_scale_down_to_the_least(self, ramp):
        pixels, scales = self.of(ramp, 0.25, View(16, None), 400)
        assert {p.shape for p in pixels} == {(16, 16)}
        assert 0.245 < scales.min() < 0.27
        assert 0.95 < scales.max() < 1.02
        parts = np.histogram(np.log(scales.clip(0.25, 1)), 4, (np.log(0.25), 0))[0]
        assert parts.min() > 70  # 100 each, deviation 9

    def test_never_make_an_image_smaller_than_the_crop(self, ramp):
        pixels, scales = self.of(ramp, 0.01, View(100, None), 40)
        assert {p.shape for p in pixels} == {(100, 100)}
        assert scales.min() == pytest.approx(0.5, abs=0.01)  # of 200 rows
        assert (np.abs(scales - 0.5) < 0.01).sum() > 20

    def test_of_a_share_of_one_are_what_they_were(self, ramp):
        (one,), _ = self.of(ramp, 1.0, View(16, None))
        (near,), scale = self.of(ramp, 0.999999, View(16, None))
        np.testing.assert_array_equal(one, near)  # and in the same place
        assert scale[0] == pytest.approx(1)

    def test_do_not_depend_on_processes_or_workers(self, images):
        view = {"least_scale": 0.3}
        expected = joined(batches(images, micro=6, **view))[1]
        parts = [batches(images, rank, 2, 3, 1, **view) for rank in range(2)]
        found = joined([parts[rank][step] for step in range(5) for rank in range(2)])[1]
        assert torch.equal(found, expected)
        assert not torch.equal(found, joined(batches(images, micro=6))[1])


class TestLater:
    """From some position on crops are larger, and nothing else changes."""

    def made(self, images, **options):
        later = Later(12, View(20, None))
        variation = Variation(least_scale=0.5)
        source = open_source(str(images))
        return TrainingStream(source, View(16, None), 3, 0, variation, later=later, **options)

    def test_begins_where_it_is_to(self, images):
        grown, plain = self.made(images), stream(images, least_scale=0.5)
        for position in range(24):
            found, expected = grown[position], plain[position]
            assert found.id == expected.id
            if position < 12:
                np.testing.assert_array_equal(found.pixels, expected.pixels)
            else:
                assert found.pixels.shape == (20, 20, 3)

    def test_a_sample_that_takes_anothers_place_is_seen_as_that_one_would_be(self, images):
        grown = self.made(images)
        (images / grown[11].id).write_bytes(b"no image")
        (images / grown[23].id).write_bytes(b"no image")
        grown = self.made(images)
        assert [grown[position].pixels.shape[0] for position in range(10, 14)] == [16, 16, 20, 20]


class TestColors:
    """Half of the crops get other colors."""

    def pixels(self, dtype=np.uint8, channels=3):
        draw = np.random.default_rng(0)
        return draw.integers(60, 160, (64, 64, channels)).astype(dtype)

    def change(self, pixels, hue=0.5, saturation=0.5, **variation):
        draw = np.array([0, 0, 0, 0, 0, 0, hue, saturation, 0.4])
        return Variation(**variation).colors(pixels, draw)

    def test_luma_and_alpha_stay(self):
        pixels = self.pixels(channels=4)
        found = self.change(pixels, 0.9, 0.8, jitter_saturation=0.5, jitter_hue=0.2)
        luma = (pixels[..., :3] @ [0.299, 0.587, 0.114], found[..., :3] @ [0.299, 0.587, 0.114])
        assert np.abs(luma[0] - luma[1]).max() < 1.0
        np.testing.assert_array_equal(found[..., 3], pixels[..., 3])
        assert np.abs(found[..., :3] - pixels[..., :3].astype(float)).mean() > 5

    def test_gray_stays_gray(self):
        gray = np.repeat(self.pixels(channels=1), 3, axis=2)
        found = self.change(gray, 1.0, 1.0, jitter_saturation=1.0, jitter_hue=1.0)
        np.testing.assert_array_equal(found, gray)

    def test_saturation_is_what_the_draw_says(self):
        pixels = self.pixels(np.float32)
        luma = (pixels @ np.float32([0.299, 0.587, 0.114]))[..., None]
        for draw, factor in ((0.0, 0.5), (0.5, 1.0), (1.0, 1.5)):
            found = self.change(pixels, saturation=draw, jitter_saturation=0.5)
            np.testing.assert_allclose(found - luma, factor * (pixels - luma), atol=0.3)
        assert found.dtype == np.float32

    def test_hue_turns(self):
        red = np.broadcast_to(np.float32([150, 100, 100]), (2, 2, 3))
        there = self.change(red, hue=1.0, jitter_hue=0.5)
        back = self.change(there, hue=0.0, jitter_hue=0.5)
        assert there[0, 0].argmax() != 0  # a quarter of a circle: red no more
        np.testing.assert_allclose(back, red, atol=0.05)

    def test_half_of_the_crops_are_left_alone(self, images):
        still, jittered = stream(images), stream(images, jitter_saturation=0.9, jitter_hue=0.9)
        pairs = [(still[n].pixels, jittered[n].pixels) for n in range(120)]
        changed = sum(not np.array_equal(a, b) for a, b in pairs)
        assert 40 < changed < 80
        assert {p.dtype for _, p in pairs} == {np.dtype(np.uint8)}

    def test_what_is_in_the_file_is_not_touched(self):
        pixels = self.pixels()
        kept = pixels.copy()
        self.change(pixels, 0.9, 0.9, jitter_saturation=0.9)
        np.testing.assert_array_equal(pixels, kept)


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


def test_each_kind_of_mirror_images_is_drawn_equally_often(tmp_path):
    corner = np.zeros((16, 16, 3), np.uint8)
    corner[:4, :2] = 255  # every one of the eight looks different
    Image.fromarray(corner).save(tmp_path / "a.png")
    expected = {
        "none": 1, False: 1, "horizontal": 2, True: 2, "both": 4, "dihedral": 8,
    }  # fmt: skip
    for flip, number in expected.items():
        views = stream(tmp_path, flip=flip)
        seen = collections.Counter(views[n].pixels.tobytes() for n in range(400))
        assert len(seen) == number
        assert min(seen.values()) > 400 / number / 2
    both = [stream(tmp_path, flip=flip)[n].pixels for flip in (True, "horizontal") for n in (3, 5)]
    assert np.array_equal(both[0], both[2])


def test_nothing_but_broken_files_is_told(tmp_path):
    (tmp_path / "a.png").write_bytes(b"rubbish")
    with pytest.raises(DataError, match="cannot be decoded"):
        stream(tmp_path)[0]
    with pytest.raises(DataError, match=r"none of the 1 samples .*first: a.png: not an image"):
        fixed_images(open_source(str(tmp_path)), View(16, None), 3, 4, 0)


def test_the_share_of_broken_files_is_bounded(tmp_path):
    broken = BrokenFiles(tmp_path / "broken.jsonl", 0.02)
    broken.add(100, [("a", "bad"), ("b", "bad")], write=True)
    with pytest.raises(DataError, match=r"17 of 115 samples.*max_broken \(0.02\).*a: bad"):
        broken.add(15, [(f"c{n}", "worse") for n in range(15)], write=True)
    assert len((tmp_path / "broken.jsonl").read_text().splitlines()) == 17
    assert (broken.drawn, broken.skipped, len(broken.reasons)) == (100, 2, 2)
    assert "2 samples could not be decoded and were skipped (2.00%" in broken.summary()
    assert BrokenFiles(tmp_path / "x", 0.02).summary() == ""


def test_an_allowed_share_stops_no_run_and_a_larger_one_stops_soon(tmp_path):
    def stopped_at(share: float, seed: int, steps: int) -> int | None:
        broken = BrokenFiles(tmp_path / "b", 0.05)
        draw = np.random.default_rng(seed)
        for step in range(steps):
            bad = int(draw.binomial(32, share))
            try:
                broken.add(32, [(f"{step}-{n}", "x") for n in range(bad)], write=False)
            except DataError:
                return step
        return None

    assert all(stopped_at(0.04, seed, 400) is None for seed in range(100))
    assert sum(stopped_at(0.05, seed, 400) is not None for seed in range(100)) <= 2
    ends = [stopped_at(0.10, seed, 400) for seed in range(50)]
    assert None not in ends
    assert np.median(ends) < 40
    assert stopped_at(1.0, 0, 1) == 0
    assert not too_many(0, 10, 0.0)
    assert too_many(1, 10**9, 0.0)
    assert not too_many(10, 10, 1.0)


def test_counting_costs_the_same_however_long_the_list_is(tmp_path):
    def seconds(known: int) -> float:
        broken = BrokenFiles(tmp_path / "b", 0.5)
        broken.reasons = {str(n): "x" for n in range(known)}
        started = time.perf_counter()
        for step in range(50):
            broken.add(32, [(f"new {step}", "x")], write=False)
        return time.perf_counter() - started

    assert min(seconds(1_000_000) for _ in range(3)) < 50 * max(seconds(0), 1e-4)


def test_sixteen_bit_files_widen_a_batch_without_changing_values(images):
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
    assert spare_workers() == 11  # however many there are
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert spare_workers() == 3
    assert spare_workers(busy=4) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "24")
    assert spare_workers() == 0


def test_a_gpu_that_caches_is_fed_by_all_of_its_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    assert cache_workers(torch.device("cuda")) == 4
    assert cache_workers(torch.device("cpu")) == 1
