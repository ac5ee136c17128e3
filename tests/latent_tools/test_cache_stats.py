import json

import numpy as np
import pytest
import torch

from first_stage.metrics.moments import ChannelMoments, merged
from latent_tools.format.statistics import summary


def moments_of(mean, logvar=None):
    found = ChannelMoments(mean.shape[1])
    found.update(torch.from_numpy(mean), None if logvar is None else torch.from_numpy(logvar))
    return found


def reference(mean, logvar):
    """One shot in float64."""
    axes = (0, 2, 3)
    mean = mean.astype(np.float64)
    variance = np.exp(logvar.astype(np.float64))
    return {
        "mean": mean.mean(axes),
        "mean_std": mean.std(axes),
        "posterior_std": np.sqrt(variance.mean(axes)),
        "std": np.sqrt(mean.var(axes) + variance.mean(axes)),
    }


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("cuts", [[], [1], [5, 5, 9], list(range(1, 23))])
def test_merged_sums_equal_one_shot(offset, cuts):
    rng = np.random.default_rng(0)
    mean = (rng.standard_normal((23, 3, 4, 5)) + offset).astype(np.float32)
    logvar = rng.standard_normal((23, 3, 4, 5)).astype(np.float32)
    parts = [
        moments_of(m, v) for m, v in zip(np.split(mean, cuts), np.split(logvar, cuts), strict=True)
    ]
    parts = [ChannelMoments.from_json(json.loads(json.dumps(p.to_json()))) for p in parts]
    found = summary(merged(parts, 3), has_posterior=True)
    assert found["images"] == 23
    for name, values in reference(mean, logvar).items():
        np.testing.assert_allclose(found[name], values, rtol=1e-11)


def test_scaling_and_shift_are_of_all_channels():
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((7, 2, 3, 3)) * [[[[2.0]], [[0.5]]]] + [[[[3.0]], [[-1.0]]]]
    found = summary(moments_of(latents), has_posterior=False)
    np.testing.assert_allclose(1 / found["scaling_factor"], latents.std(), rtol=1e-12)
    np.testing.assert_allclose(found["shift_factor"], latents.mean(), rtol=1e-12)
    assert "posterior_std" not in found


def test_no_samples_no_statistics():
    assert summary(ChannelMoments(4), has_posterior=True) == {}
