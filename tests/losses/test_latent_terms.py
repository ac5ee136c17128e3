"""Terms of the latents against isolated references in float64."""

import math

import numpy as np
import pytest
import torch

from first_stage.config.losses import AdversarialConfig, LearnedConfig, LossConfig
from first_stage.config.parsing import parse_config
from first_stage.config.schema import Config
from first_stage.config.sections import with_sections
from first_stage.errors import ConfigError
from first_stage.losses.latent_terms import (
    Spectrum,
    Variance,
    inverse_variance,
    moments,
    spectrum_distance,
)
from first_stage.losses.objective import Objective
from first_stage.losses.terms import Inputs, Surroundings
from first_stage.models.bottlenecks import Code, Gaussian
from first_stage.models.disturb import scaled


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def code(latents: torch.Tensor) -> Code:
    return Code(latents, {}, {})


# -- variance ---------------------------------------------------------------------------------


def test_inverse_variance_and_its_gradient_are_those_of_the_whole():
    """Against 1 / (var + d) differentiated whole, with the moments of the same latents."""
    z = (values(5, 3, 4, 4) * torch.tensor([0.1, 1.0, 4.0]).view(3, 1, 1) + 2).requires_grad_()
    expected = (1 / (z.var((0, 2, 3), unbiased=False) + 0.25)).mean()
    found = inverse_variance(z, *moments(z.detach()), 0.25)
    assert found.item() == pytest.approx(expected.item())
    torch.testing.assert_close(*(torch.autograd.grad(v, z)[0] for v in (found, expected)))
    by_hand = np.mean([1 / (np.var(z.detach()[:, c].numpy()) + 0.25) for c in range(3)])
    assert expected.item() == pytest.approx(by_hand)


def test_the_variance_term_learns_from_earlier_steps_and_does_not_mind_the_split():
    z = values(4, 3, 4, 4).float()

    def gradients(parts: int) -> torch.Tensor:
        surroundings = Surroundings()
        term = Variance(LossConfig(), surroundings)
        term.latent_value(code(z), z)  # the first step only measures
        surroundings.means.finish_step(lambda t: t)
        leaf = z.clone().requires_grad_()
        for part in leaf.chunk(parts):
            (term.latent_value(code(part), part) / parts).backward()
        return leaf.grad

    expected = torch.autograd.grad(
        (1 / (leaf := z.clone().requires_grad_()).var((0, 2, 3), unbiased=False).add(0.1)).mean(),
        leaf,
    )[0]
    for parts in (1, 2, 4):
        torch.testing.assert_close(gradients(parts), expected, rtol=1e-4, atol=1e-7)


def test_in_the_first_step_the_variance_is_only_measured():
    z, surroundings = values(2, 3, 4, 4).float().requires_grad_(), Surroundings()
    assert Variance(LossConfig(), surroundings).latent_value(code(z), z) is None
    surroundings.means.finish_step(lambda t: t)
    torch.testing.assert_close(surroundings.means.get("variance/mean"), z.detach().mean((0, 2, 3)))


# -- spectrum ---------------------------------------------------------------------------------


def reference(z: np.ndarray, x: np.ndarray, bins: int, flattening: float) -> float:
    """By sums over cosines and loops over rings, in numpy."""

    def shares(images: np.ndarray, power: float) -> np.ndarray:
        h, w = images.shape[-2:]
        waves = [
            np.array([
                math.sqrt((1 if k == 0 else 2) / n) * np.cos(math.pi * (np.arange(n) + 0.5) * k / n)
                for k in range(n)
            ])
            for n in (h, w)
        ]  # fmt: skip
        energy = np.einsum("uh,bchw,vw->bcuv", waves[0], images, waves[1]) ** 2
        frequency = np.hypot(np.arange(h)[:, None] / (2 * h), np.arange(w)[None] / (2 * w))
        energy = (energy * frequency**power).mean(1)
        result = []
        for sample in energy:
            every = sample.flatten()[1:].mean()
            heights = []
            for ring in range(bins):
                low, high = (math.sqrt(0.5) * k / bins for k in (ring, ring + 1))
                inside = (frequency >= low) & (frequency < high)
                inside[0, 0] = False
                if inside.any():
                    heights.append(math.log1p(sample[inside].mean() / every))
            result.append(np.array(heights) / sum(heights))
        return np.array(result)

    p, q = shares(x, flattening), shares(z, 0.0)
    return float((p * np.log(p / q)).sum(1).mean())


@pytest.mark.parametrize("size", [(4, 4), (8, 6)])
def test_the_spectrum_against_sums_over_cosines(size):
    z, x = values(3, 2, *size), values(3, 3, 4 * size[0], 4 * size[1], seed=1)
    small = scaled(x, size)
    found = spectrum_distance(z, x, 16, 1.0).item()
    assert found == pytest.approx(reference(z.numpy(), small.numpy(), 16, 1.0), rel=1e-5)
    assert found > 0


def test_the_spectrums_gradient_by_finite_differences():
    x = values(2, 3, 16, 16, seed=1)
    z = values(2, 2, 4, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: spectrum_distance(z, x, 16, 1.0), (z,))


def test_a_small_image_has_its_own_spectrum_whatever_its_size():
    x = values(2, 3, 16, 16)
    latents = 7.0 * scaled(x, (8, 8))
    assert spectrum_distance(latents, x, 16, 0.0).item() == pytest.approx(0, abs=1e-6)
    assert spectrum_distance(latents, x, 16, 2.0).item() > 0.01


def test_flat_images_have_a_spectrum_too():
    z = torch.zeros(1, 2, 4, 4, requires_grad=True)
    found = spectrum_distance(z, torch.zeros(1, 3, 16, 16), 16, 1.0)
    found.backward()
    assert found.item() == pytest.approx(0, abs=1e-6)
    assert z.grad.isfinite().all()


# -- in the objective -------------------------------------------------------------------------


def objective(**weights: float) -> Objective:
    sections = {"variance": Variance.section, "spectrum": Spectrum.section}
    made = {name: sections[name](weight=weight) for name, weight in weights.items()}
    kind = type(with_sections(Config)().loss)
    off = {"learned": LearnedConfig(weight=0), "adversarial": AdversarialConfig(weight=0)}
    return Objective(kind(kl_weight=0.0, **off, **made))


def test_terms_of_the_latents_reach_the_encoder_and_the_log():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 16, 16)
    output = torch.randn(2, 8, 4, 4, requires_grad=True)
    found = objective(variance=0.5, spectrum=2.0)
    for step in range(2):
        encoded = Gaussian()(output, torch.randn(2, 4, 4, 4))
        loss, log = found.latent_loss(Inputs(step, images, images), encoded)
        found.finish_step(lambda t: t)
    mean = output[:, :4]
    expected = 0.5 * inverse_variance(mean, *moments(mean.detach()), 0.1)
    expected = expected + 2.0 * spectrum_distance(mean, images, 16, 1.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(*(torch.autograd.grad(v, output, retain_graph=True)[0]
                                 for v in (loss, expected)))  # fmt: skip
    assert {"loss/variance", "loss/spectrum", "latent_square_norm/variance"} <= set(log)
    assert log["latent_square_norm/penalties"] == 0  # the KL weighs nothing here
    # What stops at the pixels knows nothing of them.
    assert list(found.terms) == ["pixel"]


def test_terms_of_the_latents_do_not_relieve_the_pixel_term(tmp_path):
    line = ["--data.path", str(tmp_path), "--loss.learned.weight", "0"]
    line += ["--loss.adversarial.weight", "0", "--loss.spectrum.weight", "1"]
    with pytest.raises(ConfigError, match=r"loss\.pixel_cutoff"):
        parse_config([*line, "--loss.pixel_cutoff", "0.2"])
    shares = ["--loss.balance.kind", "shares", "--loss.balance.shares", "{pixel: 1.0}"]
    assert parse_config([*line, *shares]).loss.balance.shares == {"pixel": 1.0}
