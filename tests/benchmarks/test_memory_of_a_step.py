"""Counting a step's memory on paper against the same step with values."""

from unittest import mock

import pytest
import torch
from stepping import batch_of, make_trainer

from benchmarks.memory import Allocated, step_bytes
from first_stage.training import step as training

STARTED = {"critic__start_step": 0, "train__micro_batch_size": None}


def test_what_stands_between_steps_is_weights_moments_average_and_critic(tiny):
    config = tiny(train__parts="[decoder]", **STARTED)
    trainer = make_trainer(config)
    stage, critic = trainer.first_stage, trainer.critic
    weights = sum(p.numel() for p in stage.network.parameters())
    learned = sum(p.numel() for p in stage.parameters)
    judges = sum(p.numel() for p in critic.network.parameters())
    expected = 4 * (2 * weights + 2 * learned + 3 * judges)  # with the average, two moments each
    assert step_bytes(config).standing == pytest.approx(expected, rel=0.02)


def test_the_peak_is_that_of_a_step_with_values(tiny):
    config = tiny(**STARTED, train__max_steps=6)
    with mock.patch.object(training, "lay_out", return_value=None), Allocated() as allocated:
        trainer = make_trainer(config)
        for step in range(3):
            allocated.peak = allocated.now
            batch = batch_of(trainer, 4, step)
            trainer.training_step(step, [batch])
    assert step_bytes(config).peak == pytest.approx(allocated.peak, rel=0.03)


def test_an_image_takes_less_with_checkpointing_and_in_half_precision(tiny):
    def image(**fields: object) -> int:
        fields = {**STARTED, "data__resolution": 32, **fields}
        counted = [step_bytes(tiny(train__batch_size=n, **fields)).peak for n in (4, 8)]
        return (counted[1] - counted[0]) // 4

    plain = image()
    assert plain > 32 * 32 * 3 * 4
    assert image(model__gradient_checkpointing=True) < plain
    assert image(train__precision="bf16") < plain


def test_a_storage_counts_once_and_until_it_is_freed():
    with Allocated() as allocated:
        x = torch.zeros(1000)
        y = x.view(10, 100)
        assert allocated.now == 4000
        z = y * 2
        assert allocated.now == 8000
        del x, y
        assert allocated.now == 4000
        del z
    assert (allocated.now, allocated.peak) == (0, 8000)
