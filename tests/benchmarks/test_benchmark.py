import json
from unittest import mock

import pytest
import torch
from conftest import arguments, run_script
from stepping import assert_close, batch_of, gradients_of, make_trainer

from benchmarks import steps as benchmark_steps
from first_stage.data import images_from_pixels


@pytest.mark.parametrize("pixels", [{}, {"loss__pixel": "l2", "loss__pixel_cutoff": 0.2}])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_the_usual_step_has_our_gradient_where_it_should(tiny, weight, pixels):
    """With a fixed balance both forms minimise the same: only the way there differs."""
    config = tiny(
        loss__balance__kind="fixed",
        loss__adversarial__weight=weight,
        loss__kl_weight=1e-2,
        **pixels,
    )
    trainer = make_trainer(config)
    trainer.training_step(0, [batch_of(trainer, 4, 0)])  # now the layers' sizes are known
    batch = batch_of(trainer, 4, 1)
    one = torch.ones(())
    with mock.patch.object(benchmark_steps, "_adaptive_weight", return_value=one):
        loss, _ = benchmark_steps.first_stage_loss(
            trainer, images_from_pixels(batch.pixels), trainer.noise(batch)
        )
    parameters = trainer.first_stage.parameters
    expected = {"first_stage": list(torch.autograd.grad(loss, parameters))}
    found = gradients_of(trainer, 1, [batch])
    assert_close({"first_stage": found["first_stage"]}, expected)


@pytest.mark.parametrize("step", [benchmark_steps.one_pass_step, benchmark_steps.two_pass_step])
def test_the_usual_steps_train_both_players(tiny, step):
    trainer = make_trainer(tiny())
    before = [
        [p.detach().clone() for p in player.parameters]
        for player in (trainer.first_stage, trainer.critic)
    ]
    step(trainer, batch_of(trainer, 4, 0))
    for player, old in zip((trainer.first_stage, trainer.critic), before, strict=True):
        pairs = zip(player.parameters, old, strict=True)
        assert all(not torch.equal(p, o) for p, o in pairs if o.numel() > 1)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["train", "cache", "read", "scale", "disturb"])
def test_every_benchmark_runs(tmp_path, images, what):
    recipe = [] if what == "read" else arguments(tmp_path / "run", images, data__workers=None)
    result = run_script(
        *("-m", "benchmarks", what, "--repeats", 1, "--seconds", 0.1, "--images", 20),
        *("--side", 16, "--latents", 100, "--counts", 10, 20, "--json", tmp_path / "out.json"),
        *recipe,
        timeout=580,  # a dozen processes, each of which imports torch, on a machine that is shared
    )
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["machine"]["torch"] == torch.__version__
    assert found[what]
