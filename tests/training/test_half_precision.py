"""Runs in float16 whose gradients overflow: steps are skipped, the scale falls, no more.

On a CPU accelerate computes in float32 instead, so the tests switch autocast and scaler on.
"""

from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import arguments

from first_stage.config import parse_config
from first_stage.errors import ConfigError
from first_stage.files import read_log
from first_stage.losses import balance
from first_stage.training import data, loop
from first_stage.training.checkpoint import list_checkpoints
from first_stage.training.loop import train
from first_stage.training.step import Trainer

SCALE = 2.0**22
"""The loss's scale at the start: in float16 the gradients of the tiny networks overflow."""
FIELDS = {
    "train.precision": "fp16",
    "critic.start_step": 0,
    "loss.balance.kind": "adaptive",
    "train.max_steps": 14,
}


@pytest.fixture
def float16(monkeypatch):
    """Autocast to float16 on the CPU, and a scaler that begins far too high."""
    plain = data.make_plain_accelerator

    def make(precision, **options):
        AcceleratorState._reset_state(True)  # it refuses another precision in one process
        accelerator = plain("no", **options)
        accelerator.state._mixed_precision = precision
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
        return accelerator

    monkeypatch.setattr(data, "make_plain_accelerator", make)


@pytest.fixture
def steps(monkeypatch):
    """What each step did: whether the weights moved, the scale after it, and the lagged means."""
    seen, original = [], Trainer.training_step

    def training_step(trainer, done, batches):
        before = [p.detach().clone() for p in trainer.first_stage.parameters]
        original(trainer, done, batches)
        after = trainer.first_stage.parameters
        moved = not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        scale = trainer.accelerator.scaler.get_scale()
        seen.append((moved, scale, trainer.objective.state_dict()))

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return seen


@pytest.mark.parametrize("place", ["last_layer", "reconstruction"])
def test_a_run_recovers_from_gradients_that_overflow(tmp_path, images, float16, steps, place):
    fields = {**FIELDS, "loss.balance.at": place}
    assert train(parse_config(arguments(tmp_path / "run", images, **fields))).finished
    moved = [step[0] for step in steps]
    skipped = moved.index(True)
    assert skipped >= 3
    assert all(moved[skipped:])
    scales = [step[1] for step in steps]
    assert scales[:skipped] == [SCALE / 2**k for k in range(1, skipped + 1)]
    assert scales[-1] <= scales[skipped - 1]
    assert all(mean.isfinite().all() for *_, means in steps for mean in means.values())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_an_overflow_in_what_the_balance_measures_is_forgotten(
    tmp_path, images, float16, steps, bad
):
    measure = balance.last_layer_gradient

    def overflow(*given):
        return measure(*given) * (bad if len(steps) == 11 else 1.0)

    fields = {**FIELDS, "loss.balance.at": "last_layer", "train.max_steps": 13}
    with mock.patch.object(balance, "last_layer_gradient", overflow):
        assert train(parse_config(arguments(tmp_path / "run", images, **fields))).finished
    before, at, after = (step[2] for step in steps[10:])
    for name in ("last_layer/others", "last_layer/adversarial"):
        assert torch.equal(at[name], before[name])
        assert not torch.equal(after[name], before[name])
        assert after[name].isfinite().all()
    lines = [line for line in read_log(tmp_path / "run/log.jsonl") if "loss/pixel" in line]
    assert all(line["balance/adversarial"] is not None for line in lines)


def test_a_run_killed_among_skipped_steps_goes_on_bit_for_bit(tmp_path, images, float16):
    fields = {**FIELDS, "train.checkpoint_every": 1, "train.keep_checkpoints": 99}
    line = arguments(tmp_path / "straight", images, **fields)
    assert train(parse_config(line)).finished

    def give_up(*_):
        raise KeyboardInterrupt

    stopped = arguments(tmp_path / "stopped", images, **fields)
    original = loop.save_checkpoint
    with (
        mock.patch.object(loop, "save_checkpoint", lambda f, s, *r: original(f, s, *r)
                          if s.step < 4 else give_up()),
        pytest.raises(KeyboardInterrupt),
    ):  # fmt: skip
        train(parse_config(stopped))
    assert list_checkpoints(tmp_path / "stopped")[-1][0] == 3
    assert train(parse_config([*stopped, "--resume", "latest"])).finished
    for name in ("first_stage.safetensors", "critic.safetensors", "optimizers.safetensors"):
        files = [list_checkpoints(tmp_path / run)[-1][1] / name for run in ("straight", "stopped")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_float16_without_a_gpu_is_refused(tmp_path, images):
    fields = {"train.precision": "fp16"}
    with pytest.raises(ConfigError, match=r"train\.precision 'fp16' cannot be used: .*bf16") as e:
        train(parse_config(arguments(tmp_path / "run", images, **fields)))
    assert "\n" not in str(e.value)
