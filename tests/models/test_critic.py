"""Critics: what their feature maps are, their norms, scales and tolerance of shifts."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from first_stage.config.schema import CriticConfig
from first_stage.models.critic import (
    BlurPool,
    MultiScaleCritic,
    PatchCritic,
    advance_spectral_norm,
    make_critic,
    update_average,
)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("antialias", [False, True])
def test_feature_maps_halve_and_the_logits_come_last(layers, antialias):
    critic = PatchCritic(3, width=4, layers=layers, antialias=antialias)
    side = 128
    verdict = critic(torch.randn(1, 3, side, side))
    sides = [side >> n for n in range(1, layers + 1)]
    assert [f.shape[-1] for f in verdict.features] == [*sides, sides[-1] - 1]
    widths = [4, 8, 16, 32, 32, 32]
    assert [f.shape[1] for f in verdict.features] == widths[: layers + 1]
    assert verdict.logits.shape == (1, 1, sides[-1] - 2, sides[-1] - 2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "none"},
        {"norm": "spectral"},
        {"antialias": True},
        {"scales": 2},
    ],
)
def test_the_feature_path_is_the_one_that_the_logits_are_computed_from(options):
    torch.manual_seed(0)
    settings = {"norm": "group", "antialias": False, "scales": 1} | options
    critic = make_critic(3, 4, 2, **settings)
    verdict = critic(torch.randn(2, 3, 32, 32))
    first = critic.critics[0] if isinstance(critic, MultiScaleCritic) else critic
    # Continued by hand from each feature map, norm and activation included, come the same logits.
    per_scale = len(first.blocks)
    for number, features in enumerate(verdict.features[:per_scale]):
        hidden = features
        for block in first.blocks[number + 1 :]:
            hidden = block(hidden)
        torch.testing.assert_close(first.to_logits(hidden), verdict.logits[:, :1])


def test_logits_are_not_bounded():
    critic = PatchCritic(1, width=4, layers=1, norm="none")
    small, large = (critic(x * torch.ones(1, 1, 16, 16)).logits.abs().max() for x in (1, 1e6))
    assert large > 1e5 * small


def test_no_norm_mixes_samples():
    for norm in ("group", "spectral", "none"):
        critic = PatchCritic(3, width=8, layers=2, norm=norm)
        x = torch.randn(3, 3, 16, 16)
        torch.testing.assert_close(critic(x).logits[1:2], critic(x[1:2]).logits)


def test_several_scales_count_alike():
    torch.manual_seed(0)
    critic = make_critic(3, 4, 1, norm="group", antialias=False, scales=3)
    x = torch.randn(2, 3, 48, 48)
    verdict = critic(x)
    assert len(verdict.features) == 3 * 2
    assert verdict.logits.shape == (2, 3, 22, 22)
    halved = F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
    alone = critic.critics[1](halved)
    torch.testing.assert_close(verdict.features[2], alone.features[0])
    # 10 x 10 logits on a grid of 22 x 22: each is there, and their mean is nearly their own
    torch.testing.assert_close(
        verdict.logits[:, 1:2], F.interpolate(alone.logits, (22, 22), mode="nearest")
    )
    assert set(alone.logits.flatten().tolist()) == set(verdict.logits[:, 1].flatten().tolist())


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("scales", [1, 2])
def test_the_smallest_image_is_the_smallest(layers, scales):
    config = CriticConfig(layers=layers, scales=scales)
    critic = make_critic(1, 4, layers, "group", False, scales)
    side = config.smallest_image
    assert critic(torch.randn(1, 1, side, side)).logits.numel() > 0
    with pytest.raises(RuntimeError):
        critic(torch.randn(1, 1, side - 2 ** (layers + scales - 1), side))


# -- spectral norm ----------------------------------------------------------------------------


def largest_singular_values(critic: nn.Module) -> list[float]:
    return [
        torch.linalg.matrix_norm(m.weight.detach().flatten(1), 2).item()
        for m in critic.modules()
        if isinstance(m, nn.Conv2d)
    ]


def test_spectral_norm_bounds_every_weight_and_follows_it():
    torch.manual_seed(0)
    critic = PatchCritic(3, width=8, layers=2, norm="spectral")
    for value in largest_singular_values(critic):
        assert value == pytest.approx(1.0, rel=0.05)
    with torch.no_grad():
        for p in critic.parameters():
            p.copy_(torch.randn_like(p))
    for _ in range(200):
        advance_spectral_norm(critic)
    for value in largest_singular_values(critic):
        assert value == pytest.approx(1.0, rel=0.01)


def test_spectral_norm_moves_once_a_step_and_not_by_forward_passes():
    torch.manual_seed(0)
    critic = PatchCritic(3, width=8, layers=1, norm="spectral")
    critic.train()
    with torch.no_grad():
        critic.blocks[0][0].parametrizations.weight.original.copy_(torch.randn(8, 3, 4, 4))
    before = copy.deepcopy(critic.state_dict())
    x = torch.randn(1, 3, 16, 16)
    first, second = critic(x).logits, critic(x).logits
    assert torch.equal(first, second)
    assert all(torch.equal(v, before[k]) for k, v in critic.state_dict().items())
    advance_spectral_norm(critic)
    assert any(not torch.equal(v, before[k]) for k, v in critic.state_dict().items())


def test_spectral_norm_is_restored_from_its_state():
    critics = [PatchCritic(3, width=8, layers=1, norm="spectral") for _ in range(2)]
    critics[1].load_state_dict(critics[0].state_dict())
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(critics[0](x).logits, critics[1](x).logits)


# -- antialiasing -----------------------------------------------------------------------------


def test_the_blur_keeps_flat_images_and_removes_stripes():
    pool = BlurPool(2)
    flat = torch.full((1, 2, 8, 8), 3.0)
    torch.testing.assert_close(pool(flat), torch.full((1, 2, 4, 4), 3.0))
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 2, 8, 8)
    # (1, 3, 3, 1) / 8 against (1, -1, 1, -1) is 0, away from the mirrored border
    assert pool(stripes)[..., 1:-1].abs().max() < 1e-6


def test_antialiasing_makes_features_tolerate_a_shift():
    changes = []
    for antialias in (False, True):
        torch.manual_seed(0)
        critic = PatchCritic(1, width=32, layers=2, antialias=antialias)
        stripes = torch.tensor([1.0, -1.0]).repeat(32).expand(1, 1, 64, 64)
        with torch.no_grad():
            a, b, gray = (critic(x).features[0] for x in (stripes, -stripes, 0 * stripes))
        inner = slice(2, -2)
        a, b, gray = (f[..., inner, inner] for f in (a, b, gray))
        changes.append(((a - b).square().mean() / (a - gray).square().mean()).item())
    strided, blurred = changes
    assert strided > 1.0
    assert blurred < 0.05


# -- the average ------------------------------------------------------------------------------


def test_the_average_moves_by_its_decay():
    critic, average = (PatchCritic(1, width=4, layers=1, norm="spectral") for _ in range(2))
    before = [p.detach().clone() for p in average.parameters()]
    update_average(average, critic, 0.75)
    for mean, old, value in zip(average.parameters(), before, critic.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.75 * old + 0.25 * value)
    for mean, value in zip(average.buffers(), critic.buffers(), strict=True):
        assert torch.equal(mean, value)
