"""The comparison of quantizers: equal conditions, diffusers' own quantizer, tables, going on."""

import dataclasses
from pathlib import Path

import pytest
import torch
from conftest import picture
from diffusers.models.autoencoders.vae import VectorQuantizer

from experiments.objectives.experiment import Photos, Result
from experiments.objectives.measures import Scores
from experiments.objectives.photos import tiles
from experiments.objectives.rows import Budget, row_config
from experiments.quantizers import command, results
from experiments.quantizers.rows import BASELINE, BUDGETS, FIRST_STAGES, OBJECTIVE, WANTED
from experiments.quantizers.shifts import used_at_every_shift
from experiments.quantizers.stock import StockCodebook
from first_stage.data import Sample
from first_stage.data.sources import ListSource
from first_stage.errors import ConfigError
from first_stage.models.discrete import Discrete
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder
from first_stage.training.players import make_first_stage

TINY = Budget(2, 20, 0, 2, 16, (16, 16), 4, 1e-3)


@pytest.fixture(scope="module")
def photos() -> Photos:
    source = ListSource("photos", [Sample(f"{n}", picture(n, 40, 34)) for n in range(4)])
    return Photos(source, *tiles(source, 16, 3))


def tiny(name: str) -> FirstStage:
    budget = dataclasses.replace(TINY, first_stage=FIRST_STAGES[name])
    torch.manual_seed(0)
    return make_first_stage(row_config(BASELINE, budget, 0).model, 16)


@pytest.mark.parametrize("size", BUDGETS)
def test_all_have_the_same_network_steps_photos_and_loss(size):
    shared, sizes = [], set()
    for name, first_stage in FIRST_STAGES.items():
        budget = dataclasses.replace(BUDGETS[size], first_stage=first_stage)
        config = row_config(BASELINE, budget, 3)
        layout = (config.model.block_out_channels, config.model.layers_per_block)
        shared.append((layout, config.train, config.data, config.seed, config.loss))
        assert config.model.latent_channels == (5 if name == "fsq-16384" else 4)
        assert row_config(OBJECTIVE, budget, 3).model == config.model
        if size == "quick":
            sizes.add(sum(p.numel() for p in tiny(name).model.encoder.parameters()))
    assert all(one == shared[0] for one in shared)
    assert len(sizes) <= 3  # a posterior has twice the channels, the largest grid one more


def test_the_names_say_how_many_codes_there_are():
    for name in FIRST_STAGES.keys() - {"kl"}:
        bottleneck = tiny(name).bottleneck
        assert isinstance(bottleneck, Discrete)
        assert len(bottleneck.usage) == pytest.approx(results.codes_of(name), rel=0.07)
    assert set(WANTED) < set(FIRST_STAGES)


def test_the_stock_row_is_diffusers_own_quantizer_with_its_own_loss():
    stage = tiny("stock-1024")
    stock = VectorQuantizer(1024, 4, beta=0.25, remap=None, sane_index_shape=False)
    stock.embedding.weight.data.copy_(stage.model.quantize.embedding.weight.data)
    vectors = torch.randn(3, 4, 5, 6)
    here, there = vectors.clone().requires_grad_(), vectors.clone().requires_grad_()
    code = stage.bottleneck(here)
    latents, loss, (_, _, tokens) = stock(there)
    assert torch.equal(code.latents, latents)
    assert code.penalties["stock"].shape == (3,)
    (code.penalties["stock"].mean() + code.latents.square().sum()).backward()
    (loss + latents.square().sum()).backward()
    torch.testing.assert_close(here.grad, there.grad)
    found = stage.model.quantize.embedding.weight.grad
    torch.testing.assert_close(found, stock.embedding.weight.grad)
    assert torch.equal(stage.bottleneck.tokens(vectors).flatten(), tokens)
    assert isinstance(stage.bottleneck, StockCodebook)
    assert not list(stage.bottleneck.parameters())  # the model's, and trained once


@pytest.mark.parametrize("name", ["stock-1024", "vq-1024", "fsq-1024"])
def test_a_row_trains_is_kept_and_loads(photos, tmp_path, name):
    experiment = command.make_experiment(name, photos, TINY, tmp_path)
    found = experiment.result(BASELINE, 0)
    assert 0 < found.scores.codes_used <= 1
    assert found == command.make_experiment(name, photos, TINY, tmp_path).result(BASELINE, 0)
    stage = FirstStage(load_autoencoder(str(experiment.first_stage_folder(BASELINE, 0))))
    tokens = stage.bottleneck.tokens(stage.encode(photos.held_out).latents)
    share = len(tokens.unique()) / len(stage.bottleneck.usage)
    assert share == pytest.approx(found.scores.codes_used)


def test_a_codebook_goes_on_with_a_critic_from_its_own_start(photos, tmp_path):
    experiment = command.make_experiment("vq-1024", photos, TINY, tmp_path)
    plain, hinge = (experiment.result(row, 0) for row in (BASELINE, OBJECTIVE))
    assert plain.scores.psnr != hinge.scores.psnr
    assert hinge.stripes


def made(used: float | None) -> Result:
    return Result(Scores(20.0, 100.0, 0.1, 3.0, used, used and 100 * used), {}, 1.0)


def test_the_table_and_what_was_wanted(photos):
    rows = {
        "kl": {BASELINE: [made(None), made(None)]},
        "vq-1024": {BASELINE: [made(0.99), made(0.93)], OBJECTIVE: [made(0.9)]},
        "simvq-16384": {BASELINE: [made(0.5)]},
    }
    text = results.as_text(rows, photos)
    assert (
        "| kl | 20.00 (20.00 to 20.00) | 100.0 (100.0 to 100.0) | 0.100 (0.100 to 0.100) |  |"
        in text
    )
    assert "| vq-1024 | 20.00 (20.00 to 20.00)" in text
    assert "96.0% (93.0% to 99.0%) | 96 (93 to 99) |" in text
    assert "| simvq-16384 (1 of 2 seeds) | 20.00 | 100.0 | 0.100 | 50.0% | 50 |" in text
    assert "met: vq-1024 uses 96.0% of its codes on held-out photos" in text
    tokens = len(photos.held_out) * 16
    even = 1 - (1 - 1 / 16384) ** tokens
    assert (
        "NOT MET: simvq-16384 uses 50.0% of its codes on held-out photos, wanted: at least 80% "
        f"(all equally frequent: {even:.1%})"
    ) in text
    assert "vq-1024, learned+hinge against mse:" in text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["--quick", "--small"], "choose one"),
        (["--seeds", "1", "1"], "seeds are different"),
        (["--rows", "vqq"], "there are: kl, stock-1024"),
        (["--threads", "0"], "above 0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(line, words):
    with pytest.raises(ConfigError, match=words) as caught:
        command.parse_options(line)
    assert "\n" not in str(caught.value)


def test_whoever_looks_in_early_has_what_is_there(photos, tmp_path):
    rows = {"kl": {BASELINE: [made(None)]}, "vq-1024": {BASELINE: []}}
    command.write(tmp_path, rows, photos)
    text = Path(tmp_path / "quantizers.md").read_text()
    assert "| kl |" in text
    assert "vq-1024" not in text


def test_usage_at_every_shift_counts_the_tokens_of_every_crop(photos):
    stage = tiny("vq-1024")
    tokens, used = used_at_every_shift(stage, photos.held_out)
    f, side = stage.downsample_factor, photos.held_out.shape[-1]
    assert tokens == f * f * len(photos.held_out) * (side // f - 1) ** 2
    crops = [photos.held_out[..., y : y + side - f, x : x + side - f]
             for y in range(f) for x in range(f)]  # fmt: skip
    found = torch.cat([stage.bottleneck.tokens(stage.encode(crop).latents).flatten()
                       for crop in crops])  # fmt: skip
    assert used == pytest.approx(len(found.unique()) / 1024)
