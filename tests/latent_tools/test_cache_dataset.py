import itertools
import pickle

import numpy as np
import pytest
import torch
from cache_helpers import NumberReader, cache, make_vae, number_of, numbered, photo, write_photos
from torch.utils.data import DataLoader

from first_stage.errors import UserError
from latent_tools import BucketBatchSampler, LatentDataset, LatentStream


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache of eleven photos with flips, its data and its first stage's folder."""
    root = tmp_path_factory.mktemp("made")
    write_photos(root / "data", 11)
    make_vae().save_pretrained(root / "vae")
    cache(root / "data", root / "c", make_vae(), flip=True, unit_size=4, dtype="float32")
    return root


class TestDraws:
    def test_many_draws_have_the_stored_mean_and_variance(self, tmp_path):
        (tmp_path / "data").mkdir()
        numbered(7).save(tmp_path / "data" / "7.png")
        cache(
            tmp_path / "data", tmp_path / "c", NumberReader(logvar=-1.0), resolution=8, resize=8,
            dtype="float32",
        )  # fmt: skip
        dataset = LatentDataset(tmp_path / "c", normalize="none")
        mean, logvar = dataset.stored(0).chunk(2)
        draws = []
        for epoch in range(2000):
            dataset.set_epoch(epoch)
            draws.append(dataset[0]["latents"])
        drawn = torch.stack(draws)
        deviation = (0.5 * logvar).exp()
        # Five standard errors of a mean and of a variance over 2,000 draws.
        assert ((drawn.mean(0) - mean).abs() < 5 * deviation / 2000**0.5).all()
        ratio = drawn.var(0) / deviation**2
        assert ((ratio - 1).abs() < 5 * (2 / 2000) ** 0.5).all()

    def test_a_draw_is_a_function_of_seed_epoch_and_sample(self, made):
        one, other = LatentDataset(made / "c", seed=3), LatentDataset(made / "c", seed=3)
        other[5], other[2]  # earlier reads change nothing
        assert torch.equal(one[7]["latents"], other[7]["latents"])
        first = one[7]["latents"]
        one.set_epoch(1)
        assert not torch.equal(one[7]["latents"], first)
        one.set_epoch(0)
        assert torch.equal(one[7]["latents"], first)
        assert not torch.equal(LatentDataset(made / "c", seed=4)[7]["latents"], first)

    def test_workers_draw_the_same_and_hear_of_epochs(self, made):
        def read(workers):
            dataset = LatentDataset(made / "c", seed=1)
            loader = DataLoader(
                dataset, batch_size=3, num_workers=workers, persistent_workers=workers > 0
            )
            found = []
            for epoch in range(2):
                dataset.set_epoch(epoch)
                found.append(torch.cat([batch["latents"] for batch in loader]))
            return found

        alone, with_workers = read(0), read(2)
        assert torch.equal(alone[0], with_workers[0])
        assert torch.equal(alone[1], with_workers[1])
        assert not torch.equal(alone[0], alone[1])

    def test_mean_and_raw_do_not_draw(self, made):
        mean = LatentDataset(made / "c", sample="mean", normalize="none", flip=0.0)
        raw = LatentDataset(made / "c", sample="raw", flip=0.0)
        stored = raw.stored(4)
        assert torch.equal(raw[4]["latents"], stored)
        assert torch.equal(mean[4]["latents"], stored[:4])

    def test_flip_probability(self, made):
        dataset = LatentDataset(made / "c", sample="raw", flip=0.25)
        flips = 0
        for epoch in range(40):
            dataset.set_epoch(epoch)
            for n in range(len(dataset)):
                item = dataset[n]
                flips += item["flipped"]
                assert torch.equal(item["latents"], dataset.stored(n, item["flipped"]))
        assert abs(flips / 440 - 0.25) < 0.1
        assert not any(LatentDataset(made / "c", flip=0.0)[n]["flipped"] for n in range(11))


class TestScaling:
    def test_decoding_a_denormalized_item_equals_decoding_the_raw_latent(self, made):
        vae = make_vae()
        for normalize in ("scale_shift", "channel", "none"):
            dataset = LatentDataset(made / "c", sample="mean", normalize=normalize, flip=0.0)
            raw = dataset.stored(3)[:4]
            item = dataset[3]["latents"]
            with torch.no_grad():
                decoded = vae.decode(dataset.denormalize(item)[None]).sample
                expected = vae.decode(raw[None]).sample
            torch.testing.assert_close(decoded, expected, rtol=1e-4, atol=1e-5)
            if normalize == "scale_shift":
                torch.testing.assert_close(item, (raw - 0.3) * 1.7)
            elif normalize == "channel":
                assert not torch.allclose(item, raw)

    def test_channel_normalization_gives_zero_mean_and_unit_variance(self, made):
        dataset = LatentDataset(made / "c", normalize="channel", flip=0.0)
        drawn = []
        for epoch in range(20):
            dataset.set_epoch(epoch)
            drawn += [dataset[n]["latents"] for n in range(11)]
        values = torch.stack(drawn)
        assert values.mean((0, 2, 3)).abs().max() < 0.05
        assert (values.std((0, 2, 3)) - 1).abs().max() < 0.05

    def test_channel_normalization_of_means_has_unit_variance_too(self, tmp_path):
        """Posteriors so wide that the means' spread is a small part of the draws'."""
        (tmp_path / "data").mkdir()
        for n in range(12):
            photo(n, (8, 8)).save(tmp_path / "data" / f"{n}.png")
        wide = NumberReader(logvar=5.0)
        cache(tmp_path / "data", tmp_path / "c", wide, resolution=8, resize=8, dtype="float32")
        dataset = LatentDataset(tmp_path / "c", sample="mean", normalize="channel")
        values = torch.stack([dataset[n]["latents"] for n in range(12)])
        torch.testing.assert_close(values.std((0, 2, 3), correction=0), torch.ones(3))
        torch.testing.assert_close(values.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
        raw = dataset.denormalize(values)
        torch.testing.assert_close(raw[4], dataset.stored(4)[:3])

    def with_statistics(self, root, **config):
        vae = make_vae()
        vae.register_to_config(**config)
        write_photos(root / "data", 3)
        cache(root / "data", root / "c", vae, dtype="float32")
        return vae

    def test_the_lists_of_a_first_stage_are_applied_as_xl_does(self, tmp_path):
        mean, std = [1.0, -2.0, 0.5, 3.0], [2.0, 0.5, 1.5, 4.0]
        self.with_statistics(
            tmp_path, latents_mean=mean, latents_std=std, scaling_factor=0.7, shift_factor=None
        )
        dataset = LatentDataset(tmp_path / "c", sample="mean")
        item, raw = dataset[0]["latents"], dataset.stored(0)[:4]
        # As StableDiffusionXLPipeline goes back: latents * std / scaling_factor + mean.
        back = item * torch.tensor(std)[:, None, None] / 0.7 + torch.tensor(mean)[:, None, None]
        torch.testing.assert_close(back, raw)
        torch.testing.assert_close(dataset.denormalize(item), raw)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"shift_factor": 0.5}, "no pipeline applies together"),
            ({"shift_factor": None, "latents_std": [1.0, 2.0]}, "are not 4 numbers"),
            ({"shift_factor": None, "latents_std": [1.0, 2.0, 0.0, 1.0]}, "are not 4 numbers"),
        ],
    )
    def test_what_no_pipeline_does_is_refused(self, tmp_path, config, message):
        lists = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
        self.with_statistics(tmp_path, **{**lists, **config})
        with pytest.raises(UserError, match=f"{message}.*normalize='channel'"):
            LatentDataset(tmp_path / "c")
        LatentDataset(tmp_path / "c", normalize="channel")

    def test_a_batch_norm_over_patches_is_refused(self, tmp_path):
        vae = make_vae()
        vae.bn = torch.nn.BatchNorm2d(16)
        write_photos(tmp_path / "data", 1)
        cache(tmp_path / "data", tmp_path / "c", vae)
        with pytest.raises(UserError, match=r"batch norm: use normalize='channel'"):
            LatentDataset(tmp_path / "c")

    @pytest.mark.parametrize(
        "changed",
        [
            {"scaling_factor": 0.5},
            {"shift_factor": 0.0},
            {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4},
        ],
    )
    def test_an_expected_first_stage_has_the_caches_factors(self, made, changed):
        vae = make_vae()
        vae.register_to_config(**changed)
        name = next(iter(changed))
        with pytest.raises(UserError, match=f"the first stage's {name} is .* normalize='channel'"):
            LatentDataset(made / "c", expect=vae)
        for normalize in ("channel", "none"):
            LatentDataset(made / "c", expect=vae, normalize=normalize)


class TestWhatItChecks:
    def test_expect_takes_the_encoder_that_made_it_and_no_other(self, made, tmp_path):
        LatentDataset(made / "c", expect=make_vae())
        LatentDataset(made / "c", expect=made / "vae")
        other_decoder = make_vae()
        with torch.no_grad():
            other_decoder.decoder.conv_out.bias += 1
        LatentDataset(made / "c", expect=other_decoder)
        make_vae(1).save_pretrained(tmp_path)
        for other in (make_vae(1), str(tmp_path)):
            with pytest.raises(UserError, match=r"another first stage: encoder weights: cache \w+"):
                LatentDataset(made / "c", expect=other)

    def test_flips_that_are_not_there(self, tmp_path):
        write_photos(tmp_path / "data", 1)
        cache(tmp_path / "data", tmp_path / "c")
        assert LatentDataset(tmp_path / "c").flip == 0.0
        with pytest.raises(UserError, match="no latents of flipped images"):
            LatentDataset(tmp_path / "c", flip=0.5)

    def test_wrong_choices_and_folders(self, made, tmp_path):
        with pytest.raises(UserError, match="flip is 2"):
            LatentDataset(made / "c", flip=2)
        with pytest.raises(UserError, match="sample is 'best'; it can be posterior, mean, raw"):
            LatentDataset(made / "c", sample="best")
        with pytest.raises(UserError, match="normalize is 'x'"):
            LatentDataset(made / "c", normalize="x")
        with pytest.raises(UserError, match="no latent cache: it has no manifest"):
            LatentDataset(tmp_path)

    def test_an_unfinished_cache_says_so(self, tmp_path):
        write_photos(tmp_path / "data", 1)
        cache(tmp_path / "data", tmp_path / "c")
        (tmp_path / "c" / "index.parquet").unlink()
        with pytest.raises(UserError, match="is not finished"):
            LatentDataset(tmp_path / "c")

    def test_a_missing_shard_names_the_tool(self, tmp_path):
        write_photos(tmp_path / "data", 1)
        cache(tmp_path / "data", tmp_path / "c")
        (tmp_path / "c" / "shards" / "b16x16-u000000.safetensors").unlink()
        with pytest.raises(UserError, match=r"u000000\.safetensors.*latents verify"):
            LatentDataset(tmp_path / "c")[0]


class TestItems:
    @pytest.mark.parametrize("dtype", ["float32", "uint8"])
    @pytest.mark.parametrize("sample", ["posterior", "mean", "raw"])
    def test_many_at_once_are_those_one_by_one(self, tmp_path, dtype, sample):
        write_photos(tmp_path / "data", 9)
        cache(tmp_path / "data", tmp_path / "c", flip=True, unit_size=2, dtype=dtype)
        dataset = LatentDataset(tmp_path / "c", sample=sample, normalize="channel", flip=0.5)
        places = [8, 0, 3, 3, 5, 1]
        together = dataset.__getitems__(places)
        assert len({item["flipped"] for item in together}) == 2
        for place, item in zip(places, together, strict=True):
            alone = dataset[place]
            assert item.keys() == alone.keys()
            for name, value in alone.items():
                same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
                assert same(value, item[name]), name
        assert dataset.__getitems__([]) == []

    def test_many_at_once_of_several_shapes_keep_their_order(self, buckets):
        places = [20, 3, 11, 28, 4]
        together = buckets.__getitems__(places)
        assert [item["id"] for item in together] == [buckets.ids[place] for place in places]
        assert len({item["latents"].shape for item in together}) == 3
        for place, item in zip(places, together, strict=True):
            assert torch.equal(item["latents"], buckets[place]["latents"])

    def test_an_item(self, made):
        dataset = LatentDataset(made / "c")
        item = dataset[-1]
        assert item["id"] == dataset.ids[10] == "class1/00009.png"
        assert item["latents"].shape == (4, 8, 8)
        assert item["latents"].dtype == torch.float32
        assert (item["label"], item["class"]) == (1, "class1")
        assert item["original_size"].tolist() == [16, 16]
        assert item["crop"].tolist() == [0, 0]
        with pytest.raises(IndexError):
            dataset[11]

    def test_iterating_ends(self, made):
        assert sum(1 for _ in LatentDataset(made / "c")) == 11

    def test_it_can_be_pickled_after_reading(self, made):
        dataset = LatentDataset(made / "c")
        before = dataset[3]["latents"]
        copy = pickle.loads(pickle.dumps(dataset))
        assert torch.equal(copy[3]["latents"], before)

    def test_workers_that_are_spawned(self, made):
        dataset = LatentDataset(made / "c")
        dataset[0]
        loader = DataLoader(dataset, 4, num_workers=1, multiprocessing_context="spawn")
        assert [name for batch in loader for name in batch["id"]] == dataset.ids

    def test_decode_preview_loads_the_first_stage_or_takes_one(self, made):
        dataset = LatentDataset(made / "c", normalize="channel")
        name = dataset.ids[2]
        with torch.no_grad():
            expected = make_vae().decode(dataset.stored(2)[None, :4]).sample[0]
        (image,) = dataset.decode_preview([name], str(made / "vae"))
        torch.testing.assert_close(image, expected)
        (image,) = dataset.decode_preview([name], make_vae())
        torch.testing.assert_close(image, expected)
        with pytest.raises(UserError, match="has no sample 'x'"):
            dataset.decode_preview(["x"], make_vae())

    def test_to_datasets(self, made):
        dataset = LatentDataset(made / "c")
        table = dataset.to_datasets()
        assert len(table) == 11
        assert table["id"][:] == dataset.ids
        assert table[3]["label"] == dataset[3]["label"]
        for column, flipped in (("moments", False), ("moments_flip", True)):
            values = np.asarray(table.with_format("numpy")[column][3], np.float32)
            np.testing.assert_array_equal(values, dataset.stored(3, flipped).numpy())


@pytest.fixture(scope="module")
def buckets(tmp_path_factory):
    root = tmp_path_factory.mktemp("buckets")
    (root / "data").mkdir()
    for n in range(29):
        photo(n, [(16, 16), (32, 16), (16, 32)][n % 3]).save(root / "data" / f"{n:02d}.png")
    cache(root / "data", root / "c", buckets="16x16,16x32,32x16", unit_size=4)
    return LatentDataset(root / "c")


class TestBucketBatchSampler:
    @pytest.mark.parametrize("world", [1, 2, 3])
    @pytest.mark.parametrize("drop_last", [True, False])
    def test_processes_share_every_step(self, buckets, world, drop_last):
        def steps(rank):
            sampler = BucketBatchSampler(buckets, 2, rank=rank, world=world, drop_last=drop_last)
            found = list(sampler)
            assert len(found) == len(sampler)
            return found

        by_rank = [steps(rank) for rank in range(world)]
        seen: list[int] = []
        for together in zip(*by_rank, strict=True):
            rows = [row for batch in together for row in batch]
            assert len({tuple(shape) for shape in buckets.shapes[rows].tolist()}) == 1
            assert all(1 <= len(batch) <= 2 for batch in together)
            if drop_last:
                assert len(rows) == 2 * world
            seen += rows
        if drop_last:
            assert len(seen) == len(set(seen))
        else:
            assert set(seen) == set(range(29))
            # Ten, ten and nine samples: 3 processes have two more seats than one sample left over.
            assert len(seen) - 29 <= 2 * 3

    def test_epochs_shuffle(self, buckets):
        sampler = BucketBatchSampler(buckets, 2, rank=0, world=1)
        first = list(sampler)
        assert list(sampler) == first
        sampler.set_epoch(1)
        second = list(sampler)
        members = [{frozenset(batch) for batch in batches} for batches in (first, second)]
        assert not members[0] <= members[1]  # other batches, not just in another order
        shapes = [buckets.shapes[[batch[0] for batch in b]].tolist() for b in (first, second)]
        assert shapes[0] != shapes[1]
        sampler.set_epoch(0)
        assert buckets.epoch == 0

    def test_it_feeds_a_loader(self, buckets):
        sampler = BucketBatchSampler(buckets, 3, rank=0, world=1, drop_last=True)
        loader = DataLoader(buckets, batch_sampler=sampler)
        shapes = {tuple(batch["latents"].shape) for batch in loader}
        assert shapes == {(3, 4, 8, 8), (3, 4, 8, 16), (3, 4, 16, 8)}

    def test_to_datasets_wants_a_bucket(self, buckets):
        with pytest.raises(UserError, match=r"shape is None; .*\(16, 16\), \(16, 32\), \(32, 16\)"):
            buckets.to_datasets()
        assert len(buckets.to_datasets((16, 32))) == 10


class TestLatentStream:
    @pytest.mark.parametrize("workers", [0, 2])
    @pytest.mark.parametrize("world", [1, 3])
    def test_every_sample_comes_once(self, made, world, workers):
        names: list[str] = []
        for rank in range(world):
            stream = LatentStream(LatentDataset(made / "c"), mix=2, rank=rank, world=world)
            loader = DataLoader(stream, batch_size=None, num_workers=workers)
            names += [item["id"] for item in loader]
        # Shares are even: of eleven samples three processes get three each.
        assert len(names) == len(set(names)) == 11 // world * world
        assert set(names) <= set(LatentDataset(made / "c").ids)

    def test_it_reads_few_shards_at_a_time_and_shuffles(self, made):
        dataset = LatentDataset(made / "c")
        stream = LatentStream(dataset, mix=1)
        order = [item["id"] for item in stream]
        units = [int(dataset.units[dataset.index_of(name)]) for name in order]
        changes = sum(a != b for a, b in itertools.pairwise(units))
        assert changes == 2  # three units, one after the other
        assert order != dataset.ids
        stream.set_epoch(1)
        assert [item["id"] for item in stream] != order

    @pytest.mark.parametrize("taken", [0, 1, 5])
    def test_it_resumes_where_its_state_was_taken(self, made, taken):
        def items(stream):
            return [(item["id"], item["latents"].sum().item()) for item in stream]

        whole = LatentStream(LatentDataset(made / "c"), mix=2)
        whole.set_epoch(3)
        expected = items(whole)
        stopped = LatentStream(LatentDataset(made / "c"), mix=2)
        stopped.set_epoch(3)
        iterator = iter(stopped)
        for _ in range(taken):
            next(iterator)
        resumed = LatentStream(LatentDataset(made / "c"), mix=2)
        resumed.load_state_dict(stopped.state_dict())
        assert items(resumed) == expected[taken:]
        # The next epoch is a whole one.
        resumed.set_epoch(4)
        assert len(items(resumed)) == 11

    def test_a_state_of_an_epochs_end_begins_the_next_one(self, made):
        stopped = LatentStream(LatentDataset(made / "c"))
        stopped.set_epoch(3)
        assert len(list(stopped)) == 11
        resumed, whole = (LatentStream(LatentDataset(made / "c")) for _ in range(2))
        resumed.load_state_dict(stopped.state_dict())
        whole.set_epoch(4)
        for one, other in zip(resumed, whole, strict=True):
            assert one["id"] == other["id"]
            assert torch.equal(one["latents"], other["latents"])


def test_numbers_survive_the_stream(tmp_path):
    (tmp_path / "data").mkdir()
    for n in range(20):
        numbered(n).save(tmp_path / "data" / f"{n}.png")
    cache(tmp_path / "data", tmp_path / "c", NumberReader(), resolution=8, resize=8, unit_size=3)
    stream = LatentStream(LatentDataset(tmp_path / "c", normalize="none"))
    found = {item["id"]: number_of(item["latents"])[0] for item in stream}
    assert found == {f"{n}.png": n for n in range(20)}
