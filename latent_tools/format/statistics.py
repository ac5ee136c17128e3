"""A cache's statistics per channel, as the manifest has them.

Each unit's commit holds the moments over its samples as they are *stored*, flips left out; merging
them in the order of the units gives the same numbers for any number of processes and any resumes.
"""

from typing import Any

import numpy as np

from first_stage.metrics.moments import ChannelMoments


def summary(moments: ChannelMoments, has_posterior: bool) -> dict[str, Any]:
    """The statistics as the manifest has them.

    Args:
        moments: Over all samples.
        has_posterior: Whether the latents are moments.

    Returns:
        `images`; per channel `mean` and `std` of the latents (population, ddof 0); for moments
        also `mean_std`, the spread of the posteriors' means, and `posterior_std`, the root of the
        mean posterior variance; over all channels `scaling_factor` = 1 / std and `shift_factor` =
        mean. Empty when there are no samples.
    """
    if moments.count == 0:
        return {}
    mean, std = moments.overall
    result: dict[str, Any] = {
        "images": moments.images,
        "mean": moments.mean.tolist(),
        "std": moments.std.tolist(),
    }
    if has_posterior:
        result["mean_std"] = np.sqrt(moments.signal_variance).tolist()
        result["posterior_std"] = np.sqrt(moments.noise_variance).tolist()
    result["scaling_factor"] = 1.0 / std if std > 0 else 1.0
    result["shift_factor"] = mean
    return result
