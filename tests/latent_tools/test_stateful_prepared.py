"""Behind accelerate's stateful loaders, whose workers begin to read in `prepare` already."""

from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from cache_helpers import draws, eleven_photos
from torch.utils.data import DataLoader

from latent_tools import BucketBatchSampler, LatentDataset, LatentStream

pytest.importorskip("torchdata.stateful_dataloader")

WORKERS = [(0, False), (2, False), (2, True)]
"""How many, and whether they stay alive between epochs."""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return eleven_photos(tmp_path_factory.mktemp("made"))


class Reading:
    """A training's reading: what is told the epoch, the prepared loader, the accelerator."""

    def __init__(self, made, kind, workers, persistent):
        config = DataLoaderConfiguration(use_stateful_dataloader=True)
        self.accelerator = Accelerator(cpu=True, dataloader_config=config)
        dataset = LatentDataset(made, flip=0.0)
        self.told = dataset
        options = {"num_workers": workers, "persistent_workers": persistent}
        if kind == "stream":
            self.told = dataset = LatentStream(dataset, mix=2)
            options["batch_size"] = 2
        elif kind == "buckets":
            self.told = options["batch_sampler"] = BucketBatchSampler(dataset, 2)
        else:
            options |= {"batch_size": 2, "shuffle": True}
        self.loader = self.accelerator.prepare(DataLoader(dataset, **options))

    def tell(self, who, epoch):
        """Say the epoch as training loops do."""
        if who == "data":
            self.told.set_epoch(epoch)
        if who == "loader":
            self.loader.set_epoch(epoch)

    def items(self, save_after=None, folder=None):
        """Ids and sums; to the end of the epoch, or of the state that is saved in between."""
        found = []
        for number, batch in enumerate(self.loader, 1):
            found += zip(batch["id"], batch["latents"].sum((1, 2, 3)).tolist(), strict=True)
            if number == save_after:
                self.accelerator.save_state(folder)
                if number < 6:  # of six
                    break
        return found


@pytest.mark.parametrize("kind", ["stream", "buckets", "map"])
@pytest.mark.parametrize(("workers", "persistent"), WORKERS)
@pytest.mark.parametrize("who", ["data", "loader"])
def test_after_a_restart_the_epoch_is_the_one_that_is_told(made, kind, workers, persistent, who):
    reading = Reading(made, kind, workers, persistent)
    for epoch in (7, 8):
        reading.tell(who, epoch)
        found = reading.items()
        assert len(found) == 11
        assert dict(found) == pytest.approx(draws(made, epoch))


@pytest.mark.parametrize(
    ("kind", "who"),
    # Nothing of a sampler's epoch is in the state: its loop has to tell it.
    [(kind, who) for kind in ("stream", "buckets") for who in ("data", "loader")]
    + [("stream", "nobody")],
)
@pytest.mark.parametrize(("workers", "persistent"), WORKERS)
def test_within_an_epoch_it_goes_on(made, tmp_path, kind, workers, persistent, who):
    start = 0 if who == "nobody" else 7
    reading = Reading(made, kind, workers, persistent)
    reading.tell(who, start)
    expected = reading.items()
    reading = Reading(made, kind, workers, persistent)
    reading.tell(who, start)
    first = reading.items(save_after=3, folder=tmp_path)
    assert 0 < len(first) < 11
    reading = Reading(made, kind, workers, persistent)
    reading.accelerator.load_state(tmp_path)
    reading.tell(who, start)
    assert first + reading.items() == expected
    reading.tell(who, start + 1)
    found = reading.items()
    assert len(found) == 11
    assert dict(found) == pytest.approx(draws(made, start + 1))


@pytest.mark.parametrize(("workers", "persistent"), WORKERS)
@pytest.mark.parametrize("who", ["data", "loader", "nobody"])
def test_a_state_of_an_epochs_end_begins_the_next(made, tmp_path, workers, persistent, who):
    start = 0 if who == "nobody" else 7
    reading = Reading(made, "stream", workers, persistent)
    reading.tell(who, start)
    assert len(reading.items(save_after=6, folder=tmp_path)) == 11
    reading = Reading(made, "stream", workers, persistent)
    reading.accelerator.load_state(tmp_path)
    for epoch in (start + 1, start + 2):
        reading.tell(who, epoch)
        found = reading.items()
        assert len(found) == 11
        assert dict(found) == pytest.approx(draws(made, epoch))
