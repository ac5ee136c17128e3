"""Compiled blocks compute what plain ones do; what cannot be compiled is refused in words."""

import copy
from unittest import mock

import pytest
import torch
from stepping import assert_close, batch_of, gradients_of, make_trainer
from torch import nn

from first_stage.errors import ConfigError
from first_stage.training import compiling
from first_stage.training.players import make_optimizer

SMALL = {"model__block_out_channels": "[8]", "critic__layers": 1, "data__resolution": 16}


def compiled(network: nn.Module) -> int:
    return sum(m._compiled_call_impl is not None for m in network.modules())


@pytest.mark.parametrize(
    "backend",
    ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)],
)
def test_compiled_blocks_have_the_gradients_of_plain_ones(tiny, backend):
    with mock.patch.object(compiling, "BACKEND", backend):
        plain, fast = make_trainer(tiny(**SMALL)), make_trainer(tiny(train__compile=True, **SMALL))
    assert compiled(fast.first_stage.network) > 3
    assert compiled(fast.critic.network) == 2
    assert list(fast.first_stage.network.state_dict()) == list(
        plain.first_stage.network.state_dict()
    )
    for step in range(2):
        batches = [batch_of(plain, 2, 2 * step + n) for n in range(2)]
        expected = gradients_of(plain, step, batches)
        assert_close(gradients_of(fast, step, copy.deepcopy(batches)), expected, rtol=1e-3)


def test_however_many_shapes_there_are_all_blocks_are_compiled(tiny):
    """Torch lets what has had eight shapes run as it is, with a warning."""
    shapes = {**SMALL, "model__block_out_channels": "[8, 16, 24, 32]", "data__resolution": 32}
    torch.compiler.reset()
    with mock.patch.object(compiling, "BACKEND", "aot_eager"):
        trainer = make_trainer(tiny(train__compile=True, train__precision="bf16", **shapes))
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            trainer.training_step(0, [batch_of(trainer, 2, 0)])


def test_a_critic_whose_slope_is_penalized_is_not_compiled(tiny):
    with mock.patch.object(compiling, "BACKEND", "aot_eager"):
        trainer = make_trainer(tiny(train__compile=True, loss__adversarial__r1=0.1, **SMALL))
    assert compiled(trainer.first_stage.network)
    assert not compiled(trainer.critic.network)
    trainer.training_step(0, [batch_of(trainer, 2, 0)])


def test_blocks_are_residual_blocks_and_not_their_levels(tiny):
    trainer = make_trainer(tiny(model__mid_block_attention=True))
    kinds = {type(b).__name__ for b in compiling.blocks_of(trainer.first_stage.network)}
    assert kinds == {"ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D"}


def test_where_nothing_can_be_compiled_a_sentence_says_so(tiny):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found\nand much more")

    with (
        mock.patch.object(torch, "compile", broken),
        pytest.raises(ConfigError, match=r"train\.compile is true.*C\+\+ compiler found\. Install"),
    ):
        make_trainer(tiny(train__compile=True, **SMALL))


def test_eight_bit_states_are_refused_where_they_cannot_be(tiny):
    with pytest.raises(ConfigError, match=r"train\.optimizer is adamw_8bit.*on cpu: use adamw"):
        make_trainer(tiny(train__optimizer="adamw_8bit"))
    train, weight = tiny(train__optimizer="adamw_8bit").train, mock.Mock()
    weight.device = torch.device("cuda")
    with (
        mock.patch.dict("sys.modules", {"bitsandbytes.optim": None}),
        pytest.raises(ConfigError, match="pip install bitsandbytes"),
    ):
        make_optimizer([weight], 1e-3, train)
