import json
from unittest import mock

import pytest
import torch
from conftest import arguments, run_script
from stepping import assert_close, batch_of, gradients_of, make_trainer

from benchmarks import gpu, training
from benchmarks import steps as benchmark_steps
from benchmarks.gpu_table import BEGIN, END
from first_stage.data import images_from_pixels
from first_stage.errors import UserError


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
@pytest.mark.parametrize(
    "what", ["train", "cache", "read", "scale", "quantize", "disturb", "latents", "memory"]
)
def test_every_benchmark_runs(tmp_path, images, what):
    recipe = [] if what == "read" else arguments(tmp_path / "run", images, data__workers=None)
    if what == "quantize":
        recipe += ["--model.family", "vq"]
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


@pytest.mark.slow
def test_the_gpu_programme_runs_on_tiny_networks_anywhere(tmp_path):
    """Every part of it, so that a machine with a GPU does not end on a typo; then it goes on."""
    page = tmp_path / "gpu.md"
    page.write_text(f"# GPU\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    line = ("-m", "benchmarks", "gpu", "--rehearse", "--json", tmp_path / "gpu.json")
    result = run_script(*line, "--page", page, timeout=580)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    expected = set(gpu.programme(gpu.Setting(True, 0.0, 0, 0)))
    assert set(found["parts"]) == expected
    assert not any("error" in part for part in found["parts"].values())
    written = page.read_text()
    assert all(f"| {name} |" in written for name in expected)
    assert "old" not in written
    assert written.endswith("after\n")
    assert found["parts"]["out of memory"]["batch_that_fits"] == 4
    assert "lower train.micro_batch_size" in found["parts"]["out of memory"]["training_says"]


def test_the_gpu_programme_goes_on_where_it_was(tmp_path, monkeypatch):
    ran, file = [], tmp_path / "gpu.json"

    def part(name, fails=False):
        def run(_setting):
            ran.append(name)
            assert not fails, "not this time"
            return {"share": 0.5}

        return run

    parts = {"a": (part("a"), 1), "b": (part("b", fails=True), 1), "c": (part("c"), 10_000)}
    monkeypatch.setattr(gpu, "programme", lambda _setting: parts)
    assert not gpu.benchmark_gpu(file, None, None, rehearsal=True)
    assert ran == ["a", "b"]  # there was no time for c
    found = json.loads(file.read_text())["parts"]
    assert "not this time" in found["b"]["error"]
    parts |= {"b": (part("b"), 1), "c": (part("c"), 1)}
    assert gpu.benchmark_gpu(file, None, None, rehearsal=True)
    assert ran == ["a", "b", "b", "c"]
    assert gpu.benchmark_gpu(file, None, "a", rehearsal=True)
    assert ran == ["a", "b", "b", "c", "a"]


def test_without_a_gpu_the_programme_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(UserError, match="no CUDA GPU is here; --rehearse"):
        gpu.benchmark_gpu(tmp_path / "gpu.json", None, None, rehearsal=False)


def test_with_all_else_equal_the_one_pass_form_has_our_layout(tiny):
    equal = training.Variant(training.EQUAL, tiny())
    written = training.Variant(training.ONE, tiny())
    layouts = [
        v.trainer.first_stage.network.last_layer.is_contiguous(memory_format=torch.channels_last)
        for v in (equal, written)
    ]
    assert layouts == [True, False]
    assert equal.trainer.first_stage.optimizer.defaults["fused"]
    assert not written.trainer.first_stage.optimizer.defaults["fused"]


def test_counted_operations_bound_what_the_form_can_gain(tiny):
    config = training.started(tiny())
    ours = training.step_flops(config)
    steps = [training.FORMS[name].step for name in (training.ONE, training.TWO)]
    one, two = (training.step_flops(config, step) for step in steps)
    assert ours < one < two
