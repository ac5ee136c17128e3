"""The comparison of objectives: photos, measures, rows, stripes, table, and going on."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import picture

from experiments.objectives import command, results, stripes
from experiments.objectives.experiment import Experiment, Photos, Result
from experiments.objectives.measures import LocalFeatures, Scores, score
from experiments.objectives.photos import packaged_photos, shrunk, tiles
from experiments.objectives.rows import BUDGETS, START, VGG, Budget, row_config, row_names
from first_stage.data import Sample
from first_stage.data.sources import ListSource
from first_stage.errors import ConfigError, UserError
from first_stage.models.critic import PatchCritic
from first_stage.training.players import make_first_stage

TINY = Budget(2, 30, 0, 2, 16, (16, 16), 4, 1e-3)


@pytest.fixture(scope="module")
def network() -> LocalFeatures:
    return LocalFeatures()


@pytest.fixture(scope="module")
def photos() -> Photos:
    source = ListSource("photos", [Sample(f"{n}", picture(n, 40, 34)) for n in range(4)])
    return Photos(source, *tiles(source, 16, 3))


# -- photos -----------------------------------------------------------------------------------


def test_what_is_held_out_was_not_trained_on():
    training, held_out = packaged_photos()
    names = [{source.id(i) for i in range(len(source))} for source in (training, held_out)]
    assert not names[0] & names[1]
    assert len(names[0]) == len(training) >= 50
    assert len(names[1]) == len(held_out) >= 25
    assert all(source.read(i).image.exists() for source in (training, held_out) for i in range(9))


def test_tiles_by_hand():
    pixels = np.zeros((20, 37, 3), dtype=np.uint8)
    pixels[2:18, 2:18] = 255  # 16 x 16 tiles: one row and two columns, centred
    source = ListSource("one", [Sample("a", picture(0)), Sample("b", picture(1, 37, 20))])
    shown, names = tiles(source, 16, 3)
    assert names == ["a", "b", "b"]  # 24 x 20, and 37 x 20
    assert shown.shape == (3, 3, 16, 16)
    assert -1 <= shown.min() < shown.max() <= 1
    with pytest.raises(UserError, match="pixels high and wide"):
        tiles(source, 64, 3)


def test_photos_are_shrunk_to_their_shorter_side():
    small = shrunk([ListSource("one", [Sample("a", picture(0, 48, 30))])], 15, 3)
    assert small.read(0).image.size == (24, 15)


def test_photos_of_several_sources_are_put_together_and_none_is_enlarged():
    first = ListSource("one", [Sample("a", picture(0, 48, 30))])
    second = ListSource("two", [Sample("b", picture(1, 12, 20)), Sample("c", picture(2))])
    together = shrunk([first, second], 16, 3)
    assert together.name == "one, two"
    assert [together.id(i) for i in range(3)] == ["a", "b", "c"]
    assert together.read(1).image.size == (12, 20)


# -- measures ---------------------------------------------------------------------------------


class Same:
    """A first stage that changes nothing, or adds to the latents."""

    config = SimpleNamespace(in_channels=3)

    def __init__(self, offset: float = 0.0):
        self.offset = offset

    def parameters(self):
        yield torch.zeros(1)

    def encode(self, images):
        return type("Encoded", (), {"latents": images})

    def decode(self, latents):
        return type("Decoded", (), {"sample": latents + self.offset})


def test_a_perfect_first_stage_scores_perfectly(network, photos):
    found = score(Same(), photos.held_out, network)
    assert found.psnr == float("inf")
    assert found.local_frechet == pytest.approx(0.0, abs=1e-3)
    assert found.high_frequencies == pytest.approx(1.0)
    assert found.feature_distance == 0.0


def test_scores_do_not_depend_on_the_batch_size(network, photos):
    vae = make_first_stage(row_config("mse", TINY, 0).model, 16)
    one, all_ = (score(vae, photos.held_out, network, batch_size=n) for n in (1, 64))
    assert one.codes_used is one.codes_perplexity is None
    without = {"codes_used", "codes_perplexity"}
    found, expected = ({k: v for k, v in dataclasses.asdict(s).items() if k not in without}
                       for s in (one, all_))  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-4)
    assert one.local_frechet > 10


def test_local_features_are_those_of_the_fifth_block(network):
    assert network(torch.zeros(2, 3, 32, 48)).shape == (2, 40, 4, 6)
    seen = []
    handles = [
        block.register_forward_hook(lambda *_, n=n: seen.append(n))
        for n, block in enumerate(network.network._blocks)
    ]
    network(torch.zeros(1, 3, 16, 16))
    for handle in handles:
        handle.remove()
    assert seen == [0, 1, 2, 3, 4]


# -- rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", BUDGETS)
def test_every_row_sees_the_same_images_with_the_same_first_stage(size):
    configs = [
        row_config(row, BUDGETS[size], 3, "vgg.pth")
        for row in row_names(pretrained=True)
        if row != START
    ]
    trains = [dataclasses.replace(c.train, encoder_steps=None) for c in configs]
    shared = {
        (c.model, train, c.data, c.seed, c.loss.kl_weight)
        for c, train in zip(configs, trains, strict=True)
    }
    assert len(shared) == 1
    # An encoder learns to the end, or until halfway from where the objectives part.
    halfway = BUDGETS[size].warmup_steps + BUDGETS[size].steps // 2
    assert {c.train.encoder_steps for c in configs} == {None, halfway}
    assert len({c.loss for c in map(_hashable, configs)}) >= 6


def _hashable(config):
    balance = dataclasses.replace(config.loss.balance, shares=())
    loss = dataclasses.replace(config.loss, balance=balance, penalties=())
    return dataclasses.replace(config, loss=loss)


def test_the_pretrained_row_is_there_with_weights_only():
    assert VGG in row_names(pretrained=True)
    assert VGG not in row_names(pretrained=False)


# -- stripes ----------------------------------------------------------------------------------


def test_stripes_by_hand():
    image, shifted, gray = stripes.stripes(1, 4, 0.5)
    assert image[0, 0, 0].tolist() == [0.5, -0.5, 0.5, -0.5]
    assert shifted[0, 0, 3].tolist() == [-0.5, 0.5, -0.5, 0.5]
    assert not gray.any()
    assert stripes.pixel_ratio("l2") == 4.0
    assert stripes.pixel_ratio("l1") == 2.0


def test_antialiasing_brings_the_critics_ratio_below_1(photos):
    found = []
    for antialias in (False, True):
        torch.manual_seed(0)
        critic = PatchCritic(3, width=16, layers=2, antialias=antialias)
        found.append(stripes.critic_ratios(critic, photos.held_out))
    strided, blurred = found
    assert set(strided) == {"all", "layer 0", "layer 1", "layer 2"}
    assert strided["all"] > 1
    assert blurred["all"] < 0.5


# -- table ------------------------------------------------------------------------------------


def made(frechet: float, kept: float, feature: float) -> Result:
    return Result(Scores(20.0, frechet, kept, feature), {}, 1.0)


def test_verdicts_hold_each_seed_against_its_own_and_the_mean_against_the_spread():
    mse = [made(100.0, 0.10, 3.0), made(120.0, 0.20, 3.4)]
    good = {"mse": mse, "learned+hinge": [made(40.0, 0.42, 2.7), made(50.4, 0.80, 3.162)]}
    said = results.verdicts(good)
    # 0.40 and 0.42, 4.2 and 4.0, 0.90 and 0.93; deviations sqrt(2) / 2 of the difference.
    assert said == [
        "met: 0.410 +- 0.014 (0.400 to 0.420; any two seeds: 0.333 to 0.504) of mse's local "
        "Frechet distance, wanted: at most 0.5",
        "met: at most 0.800 of the original's high frequencies, 4.100 +- 0.141 (4.000 to 4.200; "
        "any two seeds: 2.100 to 8.000) times mse's, wanted: at least 3",
        "met: 0.915 +- 0.021 (0.900 to 0.930; any two seeds: 0.794 to 1.054) of mse's feature "
        "distance, wanted: at most 1",
    ]
    too_much = {"mse": [made(100.0, 0.3, 3.0)], "learned+hinge": [made(40.0, 1.01, 2.9)]}
    assert [line[:3] for line in results.verdicts(too_much)] == ["met", "NOT", "met"]
    # The means would do, but seeds differ by more than that.
    bad = {"mse": mse, "learned+hinge": [made(40.0, 0.59, 2.9), made(60.0, 0.61, 3.5)]}
    assert all(line.startswith("NOT MET") for line in results.verdicts(bad))
    assert results.verdicts({"mse": mse}) == []


def test_the_table_gives_means_and_ranges():
    text = results.table({"mse": [made(100.0, 0.1, 3.0), made(120.0, 0.3, 4.0)]})
    assert (
        "| mse | 20.00 (20.00 to 20.00) | 110.0 (100.0 to 120.0) | 0.200 (0.100 to 0.300)" in text
    )


# -- the whole --------------------------------------------------------------------------------


def test_rows_are_made_once_and_refused_with_other_settings(network, photos, tmp_path):
    said: list[str] = []

    def experiment(budget: Budget) -> Experiment:
        return Experiment(photos, budget, tmp_path, said.append)

    first = experiment(TINY).result("learned+hinge", 0)
    assert set(first.stripes) >= {"all", "untrained all", "layer 0"}
    assert first.stripes["all"] != first.stripes["untrained all"]
    trained = [line for line in said if "min)" in line]
    assert len(trained) == 1
    again = experiment(TINY).result("learned+hinge", 0)
    assert again == first
    assert len([line for line in said if "min)" in line]) == 1
    # The warm-up is shared and kept too: another row begins where the first one began.
    start = experiment(TINY).result(START, 0)
    other = experiment(TINY).result("l1", 0)
    assert start.scores != other.scores != first.scores
    with pytest.raises(UserError, match="other settings"):
        experiment(dataclasses.replace(TINY, learning_rate=0.1)).result("learned+hinge", 0)


def test_the_figure_has_a_row_for_each(photos, tmp_path):
    experiment = Experiment(photos, TINY, tmp_path, lambda _: None)
    experiment.result(START, 0)
    folder = experiment.first_stage_folder(START, 0)
    sheet = results.figure({"a": folder, "b": folder}, photos, columns=3)
    assert sheet.height == 9 * (3 * (16 + 4) + 4)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--quick", "--small"], "choose one"),
        (["--seeds", "1", "1"], "seeds are different"),
        (["--data", "x"], "go together"),
        (["--tile", "20"], "multiple of 8"),
        (["--rows", "msee"], "there are: start, mse"),
        (["--rows", "l1+vgg"], "needs --vgg"),
        (["--threads", "0"], "above 0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(line, words):
    with pytest.raises(ConfigError, match=words) as caught:
        command.parse_options(line)
    assert "\n" not in str(caught.value)


def test_options_choose_size_and_rows():
    options = command.parse_options(["--quick", "--steps", "7", "--rows", "mse"])
    assert command.make_budget(options) == dataclasses.replace(BUDGETS["quick"], steps=7)
    assert command.chosen_rows(options) == [START, "mse"]
    assert VGG not in command.chosen_rows(command.parse_options(["--quick"]))
