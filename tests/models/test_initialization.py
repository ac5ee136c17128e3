"""A quiet start: blocks that are their shortcuts, little noise, and nothing else changed."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D

from first_stage.config.schema import ModelConfig
from first_stage.errors import ConfigError
from first_stage.models.families import family_named
from first_stage.models.initialization import QUIET_LOGVAR, quiet_posterior, silence_branches
from first_stage.training.players import make_first_stage

LAYOUT = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def made(**options):
    torch.manual_seed(0)
    return make_first_stage(ModelConfig(**LAYOUT, **options), 16).model


@pytest.mark.parametrize("family", ["kl", "vq", "fsq"])
def test_each_block_begins_as_its_shortcut(family):
    model = made(family=family, initialization="quiet", latent_channels=4)
    seen = []

    def block(module, given, output):
        shortcut = module.conv_shortcut or (lambda x: x)
        seen.append(torch.equal(output, shortcut(given[0])))

    def attention(module, given, output):
        seen.append(torch.equal(output, given[0]))

    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            module.register_forward_hook(block)
        if isinstance(module, Attention):
            module.register_forward_hook(attention)
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16))
    assert len(seen) == silence_branches(copy.deepcopy(model)) > 8
    assert all(seen)


def test_every_weight_still_learns():
    model = made(initialization="quiet")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 16, 16, generator=draw)
    for _ in range(2):  # behind a zero layer gradients begin with the second step
        optimizer.zero_grad()
        output = model(images, sample_posterior=True, generator=draw).sample
        (output - images).square().mean().backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if not p.grad.any()]
    # The bias of a key shifts all of a row's logits alike, and softmax does not see it.
    assert [name for name in still if not name.endswith("to_k.bias")] == []


@pytest.mark.parametrize("quant_conv", [True, False])
def test_a_posterior_begins_with_little_noise(quant_conv):
    quiet = made(initialization="quiet", quant_conv=quant_conv)
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        posterior = quiet.encode(images).latent_dist
    assert abs(float(posterior.logvar.mean()) - QUIET_LOGVAR) < 0.5
    assert float(posterior.std.max()) < 0.2 < float(posterior.mean.std()) * 2


def test_means_are_left_alone():
    convolution = torch.nn.Conv2d(6, 8, 1)
    before = copy.deepcopy(convolution)
    quiet_posterior(convolution, -3.0)
    given = torch.randn(1, 6, 2, 2)
    after, expected = convolution(given), before(given)
    assert torch.equal(after[:, :4], expected[:, :4])
    torch.testing.assert_close(
        after[:, 4:] + 3.0, expected[:, 4:] - before.bias[4:, None, None], atol=1e-6, rtol=0
    )


def test_what_is_pretrained_stays_as_it_is(tmp_path):
    made().save_pretrained(tmp_path)
    loaded = make_first_stage(
        ModelConfig(pretrained=str(tmp_path), initialization="quiet"), 16
    ).model.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in made().state_dict().items())


def test_blocks_that_are_not_known_are_refused():
    family = family_named("kl")
    with pytest.raises(ConfigError, match=r"initialization is quiet.*set it to diffusers"):
        super(type(family), family).begin_quietly(torch.nn.Linear(1, 1))
