"""Nothing in a step waits for the device, comes from the host, or needs float64 there."""

from dataclasses import fields as fields_of

import numpy as np
import pytest
import torch
from autoencoders import tiny_kl
from safetensors.torch import save_file
from second_device import DEVICE, SecondDevice, Seen, second_device
from stepping import batch_of, make_trainer

from first_stage.data import Batch, Reading, View, fixed_images, images_from_pixels, open_source
from first_stage.distributed.processes import Processes
from first_stage.evaluation import HeldImages, Options, evaluate
from first_stage.handover.statistics import measure_latents
from first_stage.losses.terms import TERMS
from first_stage.metrics.feature_networks import FeatureNetwork
from first_stage.models.vgg import VGG16Features
from first_stage.training import players
from first_stage.training.loop import Run, train
from first_stage.training.step import Trainer
from first_stage.training.validation import draw_pictures, validate

# Between them every term, penalty, draw and kind of latents that a recipe can ask for.
EVERYTHING = {
    "gaussian": {
        "loss__learned_logvar": True,
        "loss__pixel": "huber",
        "loss__pixel_cutoff": 0.3,
        "loss__free_bits": 0.1,
        "loss__learned__layer_weights": "[1,2]",
        "loss__learned__ema_decay": 0.9,
        "loss__learned__distance": "cosine",
        "loss__adversarial__prior_samples": True,
        "loss__adversarial__reaches_encoder": False,
        "loss__adversarial__gradient_penalty": 1.0,
        "loss__adversarial__r1": 0.1,
        "loss__adversarial__r2": 0.1,
        "loss__adversarial__lecam": 0.1,
        "loss__balance__at": "last_layer",
        "critic__norm": "spectral",
        "critic__antialias": True,
        "train__warmup_steps": 3,
    },
    "shares": {
        "loss__balance__kind": "shares",
        "loss__balance__shares": "{pixel: 0.4, learned: 0.3, adversarial: 0.3}",
        "loss__adversarial__kind": "relativistic",
        "loss__adversarial__r1": 0.1,
        "loss__adversarial__clip_weights": 0.5,
        "data__resolution": 32,
        "critic__scales": 2,
    },
    "codes": {"model__family": "vq", "model__vq__codes": 24, "model__vq__restart_after": 1,
              "model__vq__gradient": "rotation"},
    "cosine codes": {"model__family": "vq", "model__vq__codes": 24, "model__vq__rule": "cosine"},
    "frozen codes": {"model__family": "vq", "model__vq__codes": 24, "model__vq__rule": "linear"},
    "grid": {"model__family": "fsq", "model__fsq__levels": "[5,4,3]"},
    "decoder alone": {"train__encoder_steps": 0},
    "disturbed": {
        "disturb__equivariance__probability": 1,
        "disturb__equivariance__transforms": "[scale,flip,turn]",
        "disturb__equivariance__least_scale": 0.75,
        "disturb__noise__probability": 0.5,
        "disturb__prefix__probability": 0.5,
        "disturb__prefix__channels": 2,
    },
    "terms of the latents": {"loss__variance__weight": 0.01, "loss__spectrum__weight": 0.1},
    "original": {"loss__original__weight": 0.5, "loss__kl_weight": 0},
}  # fmt: skip

PRETRAINED = ("vgg", "lpips", "gram")
SMALL_OPERATIONS = 160
STEADY = 3
"""Steps after which names, indices and means are known: what follows is every further step."""


def pair(trainer: Trainer, step: int, device: torch.device) -> list[Batch]:
    """The two micro-batches of a step."""
    times = trainer.config.data.resolution // 16
    found = [batch_of(trainer, 2, 2 * step + number) for number in range(2)]
    return [
        Batch(b.pixels.repeat(1, times, times, 1), b.positions, b.ids).to(device) for b in found
    ]


def trained(config, device: torch.device, scaler: bool = False) -> Trainer:
    """A trainer after its first steps."""
    trainer = make_trainer(config)
    if scaler:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(STEADY):
        trainer.training_step(step, pair(trainer, step, device))
    return trainer


def one_more(trainer: Trainer, there: SecondDevice) -> Seen:
    """What is seen of one more step."""
    batches = pair(trainer, STEADY, DEVICE)
    there.forget()
    trainer.training_step(STEADY, batches)
    return there.seen


def assert_flows(seen) -> None:
    assert not seen.waits
    assert not seen.wide
    waiting = [shape for shape, waited in seen.copies if waited]
    assert not waiting


@pytest.mark.parametrize("kind", EVERYTHING)
def test_a_step_never_waits(tiny, kind, tmp_path, monkeypatch):
    fields = {"train__max_steps": 9, **EVERYTHING[kind]}
    if kind == "original":
        tiny_kl().save_pretrained(tmp_path / "before")
        fields["model__pretrained"] = tmp_path / "before"
        before = players.load_autoencoder(str(tmp_path / "before"))  # diffusers cannot load there
        monkeypatch.setattr(players, "load_autoencoder", lambda *_, **__: before)
    with second_device() as there:
        seen = one_more(trained(tiny(**fields), DEVICE), there)
    assert seen.operations["_fused_adamw_"] == 2  # it was seen to the end
    assert_flows(seen)
    # What comes from the host was drawn there: noise, prior samples, mixes, vectors for dead codes;
    # how strong the noise is, and how many channels are kept.
    assert len(seen.copies) <= 2 * 4


def test_between_them_the_recipes_have_every_term(tiny):
    """Those that need weights have a test of their own."""
    pretrained = {"model__pretrained": "some/where"}
    configs = [
        tiny(**fields, **(pretrained if kind == "original" else {}))
        for kind, fields in EVERYTHING.items()
    ]
    for name in set(TERMS) - set(PRETRAINED):
        assert any(config.loss.weight_of(name) > 0 for config in configs), name
    for section in fields_of(configs[0].disturb):
        assert any(getattr(c.disturb, section.name).probability > 0 for c in configs), section.name


def test_a_batch_is_sent_without_waiting():
    batch = Batch(torch.zeros(2, 4, 4, 3), [0, 1], ["a", "b"], encoded=torch.zeros(2, 8, 2, 2))
    with second_device() as there:
        batch.to(DEVICE)
        assert there.seen.copies == [((2, 8, 2, 2), False), ((2, 4, 4, 3), False)]


def test_between_two_steps_no_value_is_read_until_a_line_of_the_log_is_due(tiny, monkeypatch):
    read, since, done = [], [], []
    train_step, log = Trainer.training_step, Run._log

    def training_step(trainer, step, batches):
        since.clear()
        train_step(trainer, step, batches)
        since.append(step)

    def watched(name):
        original = getattr(torch.Tensor, name)

        def call(tensor):
            read.extend((name, step) for step in since)
            return original(tensor)

        return call

    def write_line(run, step, progress):
        since.clear()
        done.append(step)
        log(run, step, progress)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    monkeypatch.setattr(Run, "_log", write_line)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, watched(name))
    train(tiny(train__max_steps=3, train__log_every=2))
    assert done == [2, 3]
    assert read == []


def test_a_step_with_pretrained_terms_and_a_loss_scaler_never_waits(tiny, tmp_path):
    torch.manual_seed(0)
    weights, heads = tmp_path / "vgg.safetensors", tmp_path / "heads.safetensors"
    save_file(VGG16Features().state_dict(), weights)
    sizes = (64, 128, 256, 512, 512)
    save_file(
        {f"lin{n}.model.1.weight": torch.rand(1, c, 1, 1) for n, c in enumerate(sizes)}, heads
    )
    config = tiny(
        train__max_steps=9,
        loss__adversarial__reaches_encoder=False,
        loss__pretrained__weights=weights,
        loss__pretrained__heads=heads,
        loss__pretrained__channels="[2,1,0]",
        **{f"loss__pretrained__{name}_weight": 0.1 for name in PRETRAINED},
    )
    with second_device() as there:
        seen = one_more(trained(config, DEVICE, scaler=True), there)
    assert seen.operations["_amp_foreach_non_finite_check_and_unscale_"] == 2
    # Torch's own scaler inverts its scale in float64; Apple's GPUs, where it is none, need it not.
    seen.wide = [name for name in seen.wide if name not in ("_to_copy", "reciprocal")]
    assert_flows(seen)


def test_a_step_adds_few_small_operations_to_its_networks(tiny):
    """The meter, the balance, the losses and both updates, however many values are logged."""
    with second_device() as there:
        trainer = trained(tiny(train__max_steps=9), DEVICE)
        whole = sum(one_more(trainer, there).operations.values())
        images = images_from_pixels(pair(trainer, 0, DEVICE)[0].pixels)
        there.forget()
        output = trainer.first_stage.module(images, trainer.noise(pair(trainer, 0, DEVICE)[0]))
        reals = trainer.critic.module(images.detach())
        fakes = trainer.critic.module(output.images.detach().requires_grad_())
        (output.images.sum() + output.code.penalties["kl"].sum()).backward()
        (reals.logits.sum() + sum(f.sum() for f in fakes.features) + fakes.logits.sum()).backward()
        networks = sum(there.seen.operations.values())
        # There each parameter is clipped and averaged by itself; a GPU takes all of them at once.
        parameters = len(trainer.first_stage.parameters) + len(trainer.critic.parameters)
    per_micro_batch = (whole - 2 * networks - 4 * parameters) / 2
    assert per_micro_batch < SMALL_OPERATIONS


def test_validation_export_and_evaluation_need_no_float64_there(tiny, images):
    view = View(16, 16)
    shown = fixed_images(open_source(str(images)), view, Reading(3), 3, 0)
    weights = torch.rand(3 * 4 * 4, 5)

    def project(images: torch.Tensor) -> torch.Tensor:
        return images[:, :, ::4, ::4].flatten(1) @ weights.to(images.device)

    network = FeatureNetwork("mine:net", "FD-mine:net", project)
    for family in ({}, EVERYTHING["grid"]):
        with second_device() as there:
            trainer = make_trainer(tiny(**family))
            there.forget()
            with trainer.ema_weights() as stage:
                found = validate(stage, shown, Processes(), 2)
                draw_pictures(stage, shown, 2)
                batch = images_from_pixels(shown.pixels.to(DEVICE))
                statistics = measure_latents(stage, [batch], Processes())
                options = Options(batch_size=2, networks=(network,))
                result = evaluate([("it", stage)], HeldImages(shown, "held"), options)
            assert there.seen.operations["convolution"]
            assert not there.seen.wide
        assert found["psnr"] > 0
        assert statistics.images == 3
        assert result.first_stages[0]["metrics"]["psnr"]["mean"] == pytest.approx(found["psnr"])


def test_the_watch_sees_what_must_not_be_in_a_step():
    """Each of these once stood in a step."""
    with second_device() as there:
        x = torch.rand(3, 2, device=DEVICE)
        for act, what in {
            "number": (lambda: x.sum().item(), "waits"),
            "truth": (lambda: bool((x > 0).all()), "waits"),
            "mask": (lambda: x[x > 0.5], "waits"),
            "list": (lambda: x.tolist(), "waits"),
            "numbers of the host": (lambda: x.new_tensor([1.0, 2.0]), "copies"),
            "array of the host": (lambda: torch.from_numpy(np.ones(2)).to(DEVICE), "copies"),
            "wide": (lambda: x.double(), "wide"),
            "wide sum": (lambda: x.sum(dtype=torch.float64), "wide"),
        }.values():
            there.forget()
            act()
            assert getattr(there.seen, what)
            with pytest.raises(AssertionError):
                assert_flows(there.seen)
