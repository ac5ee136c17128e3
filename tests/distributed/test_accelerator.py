"""Somebody's accelerate config changes nothing that the recipe says."""

import pytest
import torch
from stepping import batch_of, gradients_of

from first_stage.distributed.processes import Processes
from first_stage.errors import ConfigError
from first_stage.training.data import make_accelerator
from first_stage.training.step import Trainer

VARIABLES = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "EAGER",
    "ACCELERATE_DYNAMO_MODE": "reduce-overhead",
    "ACCELERATE_DOWNCAST_BF16": "true",
    "ACCELERATE_DEBUG_MODE": "false",
}


def gradients(config):
    trainer = Trainer(config, make_accelerator(config.train, config.output_dir), Processes())
    found = gradients_of(trainer, 0, [batch_of(trainer, 2, seed) for seed in (0, 1)])
    return found, trainer


@pytest.fixture
def config(tiny):
    return tiny(train__micro_batch_size=2)


@pytest.mark.parametrize("variable", [*VARIABLES, "all"])
def test_the_gradient_of_a_step_is_what_the_recipe_says(config, variable, monkeypatch):
    from accelerate.state import AcceleratorState, GradientState, PartialState

    expected, _ = gradients(config)
    for state in (AcceleratorState, PartialState):
        state._reset_state()
    GradientState._reset_state()
    for name in VARIABLES if variable == "all" else [variable]:
        monkeypatch.setenv(name, VARIABLES[name])
    found, trainer = gradients(config)
    for player, values in expected.items():
        assert all(torch.equal(a, b) for a, b in zip(values, found[player], strict=True))
    assert trainer.first_stage.module is trainer.first_stage.network  # not compiled
    assert trainer.accelerator.mixed_precision == "no"


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_another_way_of_training_is_refused_in_words(config, name, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ConfigError, match=f"your accelerate config asks for .*{name}=true"):
        make_accelerator(config.train, config.output_dir)
