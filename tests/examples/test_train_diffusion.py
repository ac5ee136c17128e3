"""The diffusion example: resumes to the same weights, and leaves a pipeline for stock diffusers."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from autoencoders import build_autoencoder
from conftest import ROOT, picture
from diffusers import DiTPipeline, DiTTransformer2DModel
from safetensors.torch import load_file

from first_stage.data import open_source
from first_stage.errors import UserError
from latent_tools import CacheOptions, LatentDataset, precompute

SCRIPT = ROOT / "examples" / "digits" / "train_diffusion.py"
STEPS = 6


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("train_diffusion", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_diffusion"] = module  # where its dataclass looks its annotations up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A first stage and the cache of ten pictures in two classes: three steps an epoch."""
    folder = tmp_path_factory.mktemp("diffusion")
    torch.manual_seed(0)
    vae = build_autoencoder(3, 4, (8, 16), 1, 4, False, True, 16).eval()
    vae.save_pretrained(folder / "stage")
    for number in range(10):
        path = folder / f"images/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number, 16, 16).save(path)
    source = open_source(str(folder / "images"))
    precompute(vae, str(folder / "stage"), source, folder / "cache", CacheOptions(16, 16))
    return folder


def line(made: Path, output: Path, *more: object) -> list[str]:
    fields = {
        "latents": made / "cache", "output_dir": output, "steps": STEPS, "batch_size": 3,
        "layers": 1, "heads": 1, "checkpoint_every": 2, "warmup_steps": 2,
    }  # fmt: skip
    flags = [str(part) for name, value in fields.items() for part in (f"--{name}", value)]
    return [*flags, *map(str, more)]


@pytest.fixture
def run(script, made, monkeypatch):
    """Trains in this process."""

    def start(output: Path, *more: object) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *line(made, output, *more)])
        AcceleratorState._reset_state(True)  # its precision may be another one
        script.main()

    return start


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "pipeline/transformer/diffusion_pytorch_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_stopped_between_epochs_and_resumed_ends_with_the_same_weights(
    script, run, tmp_path, monkeypatch
):
    run(tmp_path / "whole")
    save = script.save

    def save_and_stop(output, step, *parts):
        save(output, step, *parts)
        if step == 4:  # in the middle of the second epoch
            raise KeyboardInterrupt

    monkeypatch.setattr(script, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    monkeypatch.setattr(script, "save", save)
    run(tmp_path / "stopped", "--resume")
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    # And the training moved them: the paper's start puts out zeros.
    assert weights(tmp_path / "whole")["proj_out_2.weight"].abs().max() > 0


def test_resumed_steps_draw_what_they_would_have_drawn(script, made):
    from accelerate import Accelerator

    options = script.Options(latents=str(made / "cache"), batch_size=3)
    dataset = LatentDataset(made / "cache", normalize="channel")
    stream = script.batches(dataset, options, Accelerator(), 0)
    whole = [next(stream) for _ in range(8)]
    for start in (2, 3, 7):
        resumed = script.batches(dataset, options, Accelerator(), start)
        latents, labels = next(resumed)
        assert torch.equal(latents, whole[start][0])
        assert torch.equal(labels, whole[start][1])
    epochs = [whole[step][0].mean() for step in range(6)]
    assert len(set(map(float, epochs))) == 6  # another draw in every epoch


def test_a_process_draws_its_own_part_of_what_one_would_draw(script):
    options = script.Options(batch_size=12)

    def drawn(rank, world):
        place = SimpleNamespace(process_index=rank, num_processes=world, device="cpu")
        return script.draws(options, 5, (2, 3, 3), place)

    whole = drawn(0, 1)
    for world in (2, 3):
        parts = [drawn(rank, world) for rank in range(world)]
        assert all(len(part[0]) == 12 // world for part in parts)
        for number in range(3):
            together = torch.cat([part[number] for part in parts])
            assert torch.equal(together, whole[number])
    many = script.draws(
        script.Options(batch_size=4000), 0, (4,),
        SimpleNamespace(process_index=0, num_processes=1, device="cpu"),
    )  # fmt: skip
    assert abs(float(many[0].std()) - 1) < 0.02
    assert len(set(many[1].tolist())) > 950


@pytest.mark.parametrize("change", [("--learning_rate", "0.1"), ("--precision", "bf16")])
def test_a_run_goes_on_with_its_own_options_alone(run, tmp_path, change):
    run(tmp_path / "run")
    with pytest.raises(UserError, match=rf"{change[0][2:]} is .* was started with"):
        run(tmp_path / "run", "--resume", *change)
    run(tmp_path / "run", "--resume", "--checkpoint_every", "3")


def test_a_cache_that_has_grown_does_not_change_a_run(run, script, made, tmp_path, monkeypatch):
    run(tmp_path / "run")
    original = script.LatentDataset

    class Grown(original):
        def __len__(self):
            return super().__len__() + 1

    monkeypatch.setattr(script, "LatentDataset", Grown)
    with pytest.raises(UserError, match=r"latents has another samples .* has grown"):
        run(tmp_path / "run", "--resume")


def test_bf16_trains_float32_weights(run, tmp_path):
    run(tmp_path / "run", "--precision", "bf16")
    found = weights(tmp_path / "run")
    assert all(value.dtype == torch.float32 for value in found.values())
    assert found["proj_out_2.weight"].abs().max() > 0


def test_labels_are_hidden_once_a_sample_and_by_nobody_else(script, made):
    from accelerate import Accelerator

    options = script.Options(batch_size=4000, label_dropout=0.1)
    _, times, hidden = script.draws(options, 5, (1, 1, 1), Accelerator())
    assert 0.08 < hidden.float().mean() < 0.12
    assert (times.min(), times.max()) == (0, 999)
    dataset = LatentDataset(made / "cache", normalize="channel")
    transformer = script.make_transformer(script.Options(layers=2, heads=1), dataset)
    with torch.no_grad():  # not the start, where the label has no effect yet
        for parameter in transformer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, times, labels = torch.randn(8, 4, 8, 8), torch.zeros(8).long(), torch.arange(8)
    outputs = [transformer(x, times, class_labels=labels).sample for _ in range(3)]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    null = transformer(x, times, class_labels=torch.full((8,), script.NULL_CLASS)).sample
    assert (outputs[0] - null).abs().max() > 0


def test_the_pipeline_samples_in_a_process_with_diffusers_alone(run, made, tmp_path):
    run(tmp_path / "out")
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests/helpers/stock_dit.py"), str(tmp_path / "out")],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr + result.stdout
    images = load_file(tmp_path / "out/images.safetensors")["images"]
    assert images.shape == (3, 16, 16, 3)
    assert images.isfinite().all()
    assert images.std() > 0
    assert not torch.equal(images[0], images[2])


def test_the_pipeline_decodes_what_the_transformer_was_trained_on(run, made, tmp_path):
    """A cached latent, normalised as in training, decodes to the first stage's reconstruction."""
    run(tmp_path / "out")
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out/pipeline")
    assert isinstance(pipeline.transformer, DiTTransformer2DModel)
    assert pipeline.get_label_ids(["b", "a"]) == [1, 0]
    dataset = LatentDataset(made / "cache", normalize="channel")
    names = dataset.ids[:2]
    mean, std = (torch.tensor(dataset.stats[name])[:, None, None] for name in ("mean", "std"))
    latents = torch.stack([(dataset.stored(n)[:4] - mean) / std for n in range(2)])
    with torch.no_grad():
        images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    expected = torch.stack(dataset.decode_preview(names, str(made / "stage")))
    torch.testing.assert_close(images, expected, atol=1e-5, rtol=0)
    # The pipeline has the average of the weights, not the weights.
    newest = load_file(tmp_path / f"out/checkpoints/step-{STEPS:06d}/transformer.safetensors")
    name = "proj_out_2.weight"
    assert not torch.equal(newest[name], weights(tmp_path / "out")[name])


def test_mistakes_are_told_in_one_line(run, script, made, tmp_path):
    run(tmp_path / "out", "--steps", "1")
    with pytest.raises(UserError, match="--resume"):
        run(tmp_path / "out")
    with pytest.raises(UserError, match="label is 'kind'"):
        run(tmp_path / "other", "--label", "kind")
    with pytest.raises(UserError, match="patch_size 3"):
        run(tmp_path / "other", "--patch_size", "3")
    with pytest.raises(UserError, match="batch_size 64"):
        run(tmp_path / "other", "--batch_size", "64")
    with pytest.raises(UserError, match="--latents is missing"):
        run(tmp_path / "other", "--latents", "")
    torch.manual_seed(1)
    build_autoencoder(3, 4, (8, 16), 1, 4, False, True, 16).save_pretrained(tmp_path / "stage")
    with pytest.raises(UserError, match="another first stage"):
        run(tmp_path / "other", "--first_stage", tmp_path / "stage")
    assert not (tmp_path / "other").exists()


def launch(*line: str, processes: int = 1) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher += ["--num_processes", str(processes)]
    if processes > 1:
        launcher += ["--multi_gpu", "--main_process_port", "0"]
    return subprocess.Popen(
        [*launcher, str(SCRIPT), *line],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_killed_and_resumed_ends_with_the_same_weights(made, tmp_path):
    more = ("--steps", "40", "--checkpoint_every", "4")
    whole = launch(*line(made, tmp_path / "whole", *more))
    output = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, output
    killed = launch(*line(made, tmp_path / "killed", *more))
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed").glob("checkpoints/step-*")):
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed/pipeline").exists()
    resumed = launch(*line(made, tmp_path / "killed", *more, "--resume"))
    output = resumed.communicate(timeout=300)[0]
    assert resumed.returncode == 0, output
    assert_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_two_processes_train_what_one_trains(made, tmp_path):
    for processes in (1, 2):
        more = ("--batch_size", "4", "--steps", "4")
        started = launch(*line(made, tmp_path / str(processes), *more), processes=processes)
        output = started.communicate(timeout=300)[0]
        assert started.returncode == 0, output
        assert f"{processes} process" in output
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-5, rtol=1e-4)
