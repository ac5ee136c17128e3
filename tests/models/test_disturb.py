"""Latents changed between bottleneck and decoder: by hand, and by what they must not touch."""

import pytest
import torch
from torch.nn import functional as F

from first_stage.config.disturb import (
    DisturbConfig,
    EquivarianceConfig,
    LatentNoiseConfig,
    PrefixConfig,
)
from first_stage.errors import ConfigError
from first_stage.models.bottlenecks import Gaussian, Plain
from first_stage.models.codebooks import Codebook
from first_stage.models.disturb import (
    Disturbance,
    Geometry,
    check_disturb,
    disturb,
    like,
    mixed,
    moved,
    prefix,
    scaled,
)
from first_stage.models.grids import FiniteGrid
from first_stage.training.draws import disturbance

ALL = DisturbConfig(
    EquivarianceConfig(0.5, ("scale", "flip", "turn")), LatentNoiseConfig(0.5, 2.0),
    PrefixConfig(0.5, 2),
)  # fmt: skip


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_nothing_drawn_gives_the_very_tensors():
    z, x = values(2, 4, 4, 4), values(2, 3, 16, 16)
    latents, images = disturb(z, x, Disturbance())
    assert latents is z
    assert images is x


@pytest.mark.parametrize("size", [(4, 6), (3, 5), (8, 12), (16, 24)])
def test_scaled_is_antialiased_bilinear_interpolation(size):
    x = values(2, 3, 8, 12)
    expected = F.interpolate(x, size, mode="bilinear", antialias=True)
    torch.testing.assert_close(scaled(x, size), expected)


def test_images_are_scaled_as_their_latents_are():
    """An image that repeats its latents pixel by pixel still does when both were moved."""
    z = torch.stack([torch.linspace(-1, 1, 8)[:, None].expand(8, 8), torch.ones(8, 8)])[None]
    x = z.repeat_interleave(4, -1).repeat_interleave(4, -2)
    for kind, amount, size in (("scale", 4, 4), ("flip", 0, 8), ("turn", 1, 8)):
        geometry = Geometry(kind, amount)
        small, image = disturb(z, x, Disturbance(geometry))
        assert small.shape[-2:] == (size, size)
        assert image.shape[-2:] == (4 * size, 4 * size)
        inside = (..., slice(1, -1), slice(1, -1))  # at the borders filters of two sizes differ
        torch.testing.assert_close(F.avg_pool2d(image, 4)[inside], small[inside])


def test_turns_and_flips_only_move_values():
    z, x = values(1, 2, 3, 4), values(1, 1, 6, 8)
    for amount in (1, 2, 3):
        turned, image = disturb(z, x, Disturbance(Geometry("turn", amount)))
        assert torch.equal(turned, z.rot90(amount, (-2, -1)))
        assert torch.equal(image, x.rot90(amount, (-2, -1)))
    flipped, image = disturb(z, x, Disturbance(Geometry("flip")))
    assert torch.equal(flipped, z.flip(-1))
    assert torch.equal(image, x.flip(-1))


def test_gradients_by_finite_differences():
    z, noise = values(2, 3, 4, 4).requires_grad_(), values(2, 3, 4, 4, seed=1)
    amounts = torch.tensor([[1.5, 2.0], [0.3, 0.0]], dtype=torch.float64)
    kept = torch.tensor([2, 3])
    for geometry in (None, Geometry("scale", 2), Geometry("flip"), Geometry("turn", 1)):
        draw = Disturbance(geometry, noise, amounts, kept)
        assert torch.autograd.gradcheck(lambda z, d=draw: disturb(z, z, d)[0], (z,))


def test_noise_by_hand():
    z, noise = values(3, 2, 4, 4), values(3, 2, 4, 4, seed=1)
    strength, share = torch.full((3,), 2.0), torch.tensor([0.0, 0.25, 1.0])
    found = mixed(z, noise, strength, share)
    torch.testing.assert_close(found[0], z[0])
    spread = z.flatten(1).std(1, unbiased=False)
    torch.testing.assert_close(found[1], 0.75 * z[1] + 0.25 * 2.0 * spread[1] * noise[1])
    torch.testing.assert_close(found[2], 2.0 * spread[2] * noise[2])


def test_an_encoder_gains_nothing_by_larger_latents():
    """Noise grows with the latents: along their scale the loss has no slope."""
    z, noise = values(2, 3, 4, 4), values(2, 3, 4, 4, seed=1)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    found = mixed(scale * z, noise, torch.full((2,), 3.0), torch.full((2,), 0.5))
    # What a decoder sees once it divides by the size.
    relative = found / found.flatten(1).norm(dim=1)[:, None, None, None]
    (slope,) = torch.autograd.grad((relative * values(2, 3, 4, 4, seed=2)).sum(), scale)
    assert abs(slope.item()) < 1e-6


def test_a_prefix_keeps_the_first_channels_of_each_sample():
    z = torch.ones(3, 4, 2, 2)
    found = prefix(z, torch.tensor([1, 4, 3]))
    assert found.mean((2, 3)).tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]


def test_noise_of_moved_latents_stays_white():
    noise = values(64, 4, 8, 12)
    small = like(values(64, 4, 4, 6), noise)
    assert small.shape == (64, 4, 4, 6)
    assert small.std().item() == pytest.approx(1, abs=0.05)
    assert like(values(64, 4, 12, 8), noise).shape == (64, 4, 12, 8)


def test_a_steps_geometry_is_a_function_of_the_step_alone():
    steps = range(400)
    whole = [disturbance(0, ALL, step, range(4), (3, 8, 8)) for step in steps]
    for step in steps[:50]:
        part = disturbance(0, ALL, step, [2, 3], (3, 8, 8))
        assert part.geometry == whole[step].geometry
        assert torch.equal(part.noise, whole[step].noise[2:])
        assert torch.equal(part.amounts, whole[step].amounts[:, 2:])
        assert torch.equal(part.kept, whole[step].kept[2:])
    found = [draw.geometry for draw in whole]
    assert 0.4 < sum(g is not None for g in found) / len(found) < 0.6
    kinds = {(g.kind, g.amount) for g in found if g is not None}
    turns = {("turn", n) for n in (1, 2, 3)}
    assert kinds == {("flip", 0)} | turns | {("scale", n) for n in range(2, 8)}
    other = [disturbance(1, ALL, step, range(4), (3, 8, 8)).geometry for step in steps]
    assert other != found


def test_samples_are_drawn_with_their_probabilities():
    draw = disturbance(0, ALL, 0, range(2000), (4, 1, 1))
    strength, share = draw.amounts
    assert (strength == 2.0).all()
    assert 0.45 < (share == 0).float().mean() < 0.55
    assert share[share > 0].mean().item() == pytest.approx(0.5, abs=0.03)
    counts = torch.bincount(draw.kept, minlength=5) / 2000
    assert counts[:2].sum() == 0
    assert counts[2:4].tolist() == pytest.approx([1 / 6, 1 / 6], abs=0.03)
    assert draw.geometry is None  # one row of latents cannot be made smaller


def test_what_is_off_is_not_drawn():
    off = DisturbConfig(EquivarianceConfig(1.0), LatentNoiseConfig(0.0), PrefixConfig(0.0))
    draw = disturbance(0, off, 0, range(3), (4, 8, 8))
    assert draw[1:] == (None, None, None)
    assert draw.geometry is not None
    assert not DisturbConfig().in_use


def codebook() -> Codebook:
    return Codebook(8, 4)


@pytest.mark.parametrize(("config", "bottleneck", "words"), [
    (DisturbConfig(EquivarianceConfig(0.5)), codebook, "transforms has scale"),
    (DisturbConfig(noise=LatentNoiseConfig(0.5)), codebook, "disturb.noise.probability is 0.5"),
    (DisturbConfig(prefix=PrefixConfig(0.5, 2)), lambda: FiniteGrid((4, 4, 4, 4)),
     "disturb.prefix.probability"),
    (DisturbConfig(prefix=PrefixConfig(0.5, 4)), Gaussian, "the latents have 4"),
])  # fmt: skip
def test_what_a_first_stage_cannot_do_is_refused(config, bottleneck, words):
    with pytest.raises(ConfigError, match=words):
        check_disturb(config, bottleneck(), 4)


def test_what_it_can_do_is_not_refused():
    moves = DisturbConfig(EquivarianceConfig(0.5, ("flip", "turn")))
    check_disturb(moves, codebook(), 4)
    check_disturb(ALL, Plain(), 4)


def test_scaled_stays_exact_under_autocast():
    x = torch.randn(1, 2, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scaled(x, (5, 5)), moved(x, Geometry("scale", 5)))
        assert scaled(x, (5, 5)).dtype == torch.float32
