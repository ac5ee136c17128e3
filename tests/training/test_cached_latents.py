"""The decoder learns from cached latents: the same steps, the right pairs, and no encoder."""

from unittest import mock

import numpy as np
import pytest
import torch
from autoencoders import tiny_dc, tiny_kl, tiny_taesd, tiny_vq
from conftest import picture
from launching import TRAIN, run
from stepping import gradients_of, make_trainer

from first_stage.config import parse_config
from first_stage.data import open_source
from first_stage.data.images import images_from_pixels
from first_stage.data.stream import collate
from first_stage.errors import ConfigError, UserError
from first_stage.files import read_log
from first_stage.models.first_stage import FirstStage
from first_stage.models.loading import load_autoencoder
from first_stage.training.data import open_data, open_stream, pair_latents
from first_stage.training.loop import train
from first_stage.training.plan import plan
from latent_tools import CachedLatents, CacheOptions, precompute
from latent_tools.format.manifest import fingerprint_weights

EVERY = {
    "kl": (tiny_kl, "moments"),
    "vq": (tiny_vq, "mean"),
    "tokens": (tiny_vq, "tokens"),
    "tiny": (tiny_taesd, "mean"),
    "dc": (tiny_dc, "mean"),
}


def make(tmp_path, images, model, representation="moments", **options):
    """The first stage and its cache; fields of a run that learns from it."""
    folder = tmp_path / "before"
    model.save_pretrained(folder)
    fields = {"resolution": 16, "resize": 16, "dtype": "float32", "flip": True, "unit_size": 5}
    wanted = CacheOptions(**{**fields, "representation": representation, **options})
    precompute(load_autoencoder(str(folder)), str(folder), open_source(str(images)),
               tmp_path / "cache", wanted)  # fmt: skip
    return {
        "model__pretrained": folder,
        "data__latents": tmp_path / "cache",
        "data__crop": "center",
        "train__parts": "[decoder]",
    }


def stream_of(config, model, tmp_path):
    sizes = {"seed": config.seed, "batch_size": config.train.batch_size}
    source, _ = open_data(config.data, folder=tmp_path, **sizes)
    latents = CachedLatents(config.data.latents)
    paired = pair_latents(latents, source, config.data, FirstStage(model))
    return open_stream(source, config.data, paired, channels=3, **sizes)


@pytest.mark.parametrize("name", EVERY)
def test_every_image_meets_its_own_latents(name, tiny, images, tmp_path):
    build, representation = EVERY[name]
    model = build()
    config = tiny(**make(tmp_path, images, model, representation))
    stream = stream_of(config, model, tmp_path)
    examples = [stream[n] for n in range(30)]
    batch = collate(examples)
    stage = FirstStage(model)
    with torch.no_grad():
        code = stage.family.to_code(model, images_from_pixels(batch.pixels))
    if name == "tokens":
        assert torch.equal(batch.encoded, stage.bottleneck.tokens(code))
    else:
        torch.testing.assert_close(batch.encoded, code, rtol=1e-4, atol=1e-5)
    # Both pictures and mirrored ones were among them, of several epochs.
    flips = {(e.id, e.pixels[0, 0].tobytes()) for e in examples}
    assert len(flips) > len({e.id for e in examples})


@pytest.mark.parametrize("name", EVERY)
def test_a_step_from_latents_is_the_step_from_images(name, tiny, images, tmp_path):
    build, representation = EVERY[name]
    model = build()
    fields = make(tmp_path, images, model, representation)
    config = tiny(**fields, loss__learned__start_step=0, loss__adversarial__start_step=0,
                  critic__start_step=0)  # fmt: skip
    stream = stream_of(config, model, tmp_path)
    batch = collate([stream[n] for n in range(4)])
    found = []
    for encoded in (None, batch.encoded):
        trainer = make_trainer(config)
        batch.encoded = encoded
        kind = type(trainer.first_stage.network.family)
        with mock.patch.object(kind, "to_code", autospec=True, side_effect=kind.to_code) as ran:
            found.append(gradients_of(trainer, 0, [batch]))
        assert ran.called == (encoded is None)
    assert set(found[0]) == {"first_stage", "critic"}
    for player, expected in found[0].items():
        scale = max(g.abs().max().item() for g in expected)
        assert scale > 0
        for one, other in zip(found[1][player], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * max(scale, 1))


def test_given_what_the_encoder_gives_a_step_is_the_same_bit_for_bit(tiny, images, tmp_path):
    config = tiny(**make(tmp_path, images, tiny_kl()))
    stream = stream_of(config, load_autoencoder(config.model.pretrained), tmp_path)
    batch = collate([stream[n] for n in range(4)])
    results = []
    for given in (False, True):
        trainer = make_trainer(config)
        stage = trainer.first_stage.network
        with torch.no_grad():
            code = stage.family.to_code(stage.model, images_from_pixels(batch.pixels))
        batch.encoded = code if given else None
        for step in range(3):
            trainer.training_step(step, [batch])
        results.append({k: v.clone() for k, v in stage.model.state_dict().items()})
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_a_run_from_latents_ends_where_a_run_from_images_does(tiny, images, tmp_path):
    fields = make(tmp_path, images, tiny_kl())
    both = {}
    for name, cache in (("pixels", None), ("latents", tmp_path / "cache")):
        config = tiny(**{**fields, "output_dir": tmp_path / name, "data__latents": cache})
        train(config, cache and CachedLatents(cache))
        log = [line for line in read_log(tmp_path / name / "log.jsonl") if "loss/pixel" in line]
        both[name] = [[line["loss/pixel"], line["loss/kl"]] for line in log]
    np.testing.assert_allclose(both["latents"], both["pixels"], rtol=1e-4)
    before, after = (
        fingerprint_weights(load_autoencoder(str(tmp_path / n)))
        for n in ("before", "latents/export")
    )
    assert before.encoder == after.encoder
    assert before.decoder != after.decoder


def test_a_run_goes_on_where_it_stopped(tiny, images, tmp_path):
    fields = make(tmp_path, images, tiny_kl())
    latents = CachedLatents(tmp_path / "cache")
    train(tiny(output_dir=tmp_path / "whole", **fields), latents)
    train(tiny(output_dir=tmp_path / "parts", train__max_steps=2, **fields), latents)
    # Where the cache and the first stage lie may change.
    (tmp_path / "cache").rename(tmp_path / "moved")
    fields["data__latents"] = tmp_path / "moved"
    latents = CachedLatents(tmp_path / "moved")
    train(tiny(output_dir=tmp_path / "parts", resume="latest", **fields), latents)
    one, two = (load_autoencoder(str(tmp_path / n / "export")) for n in ("whole", "parts"))
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())


@pytest.mark.slow
def test_two_processes_train_what_one_does(arguments_of, images, tmp_path):
    fields = make(tmp_path, images, tiny_kl())
    for processes in (1, 2):
        line = arguments_of(tmp_path / f"on-{processes}", **fields, train__micro_batch_size=2)
        text = run(processes, TRAIN, *line, output=tmp_path / f"on-{processes}.txt")
        assert f"{processes} process" in text
    one, two = (load_autoencoder(str(tmp_path / f"on-{n}" / "export")).state_dict() for n in (1, 2))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_an_image_that_changed_is_left_out_and_listed(tiny, images, tmp_path):
    fields = make(tmp_path, images, tiny_kl())
    picture(99).save(images / "03.png")
    config = tiny(**fields, data__validation_share=0, data__max_broken=0.5)
    stream = stream_of(config, tiny_kl(), tmp_path)
    broken = {k: v for n in range(24) for k, v in stream[n].broken.items()}
    assert broken == {"03.png": "changed since its latents were cached"}


def test_what_cannot_be_paired_is_refused_in_one_line(tiny, images, tmp_path):
    fields = make(tmp_path, images, tiny_kl(), flip=False)
    fields["data__flip"] = "none"
    model = tiny_kl()
    stream_of(tiny(**fields), model, tmp_path)
    for n in range(5):
        picture(50 + n).save(images / f"new-{n}.png")
    with torch.no_grad():
        other = tiny_kl()
        other.encoder.conv_in.bias.add_(1)
    for changed, first_stage, words in (
        ({"data__flip": "horizontal"}, model, "no latents of mirrored images"),
        ({"data__resize": 18}, model, r"other pixels \(resize: cache 16, now 18\)"),
        ({"data__resolution": 20, "data__resize": 16}, model, "resolution: cache 16, now 20"),
        ({}, other, "encoded by another first stage: encoder weights"),
        ({"data__validation_share": 0}, model, "no latents of 5 of the 17 images .*'new-0.png'"),
        ({"data__latents": tmp_path / "nowhere"}, model, "is no latent cache"),
    ):
        with pytest.raises(UserError, match=words) as refused:
            stream_of(tiny(**{**fields, **changed}), first_stage, tmp_path)
        assert "\n" not in str(refused.value)


def test_means_without_variances_are_refused(tiny, images, tmp_path):
    config = tiny(**make(tmp_path, images, tiny_kl(), "mean"))
    with pytest.raises(UserError, match=r"stores the mean of each posterior.*moments"):
        stream_of(config, tiny_kl(), tmp_path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model__pretrained": "null"}, "but no first stage: name the one that made the cache"),
        ({"train__parts": "[all]"}, r"train.parts \['all'\] would change the encoder"),
        ({"data__crop": "random"}, "data.crop is random: a cache holds centre crops"),
        ({"data__flip": "dihedral"}, "data.flip is dihedral"),
        ({"data__streaming": "true"}, "data.streaming is true"),
    ],
)
def test_recipes_that_cannot_work_with_latents_are_refused(changed, words, tiny):
    fields = {"model__pretrained": "x", "data__latents": "cache", "data__crop": "center",
              "train__parts": "[decoder]"}  # fmt: skip
    with pytest.raises(ConfigError, match=words):
        train(tiny(**{**fields, **changed}))


def test_from_python_the_cache_is_given_and_a_plan_takes_it_too(tiny, images, tmp_path, capsys):
    config = tiny(**make(tmp_path, images, tiny_kl()))
    with pytest.raises(ConfigError, match="train\\(\\) was given no latents"):
        train(config)
    plan(config, CachedLatents(tmp_path / "cache"))
    assert "images/s" in capsys.readouterr().out


@pytest.fixture
def arguments_of(images):
    from conftest import arguments

    def line(output, **fields):
        made = arguments(output, images, **fields)
        parse_config(made)
        return made

    return line
