"""Averages kept on the device: what a step may rely on.

Nothing here waits for the device. Sums are gathered while micro-batches run, averaged over
micro-batches and processes once a step or once a log line, and read by the host only then.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Average = Callable[[Tensor], Tensor]
"""Averages a tensor over all processes."""


class LaggedMeans:
    """Exponential means of what earlier steps measured.

    A weight that depends on the batch at hand would depend on how the batch is split into
    micro-batches and processes, and would need a reduction before the backward pass can begin. So
    what decides a weight at step k comes from the steps before k: the same number for every
    process, every micro-batch and every split.

    Args:
        decay: Decay of the exponential mean, in [0, 1).
        decays: Other decays, by name.
    """

    def __init__(self, decay: float, decays: Mapping[str, float] | None = None):
        self.decay, self._decays = decay, dict(decays or {})
        self._means: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def observe(self, name: str, value: Tensor) -> None:
        """Add a micro-batch's value, of any shape; all micro-batches count alike."""
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def get(self, name: str) -> Tensor | None:
        """The mean over earlier steps, or `None` when no step has measured it yet."""
        return self._means.get(name)

    def finish_step(
        self, average: Average, finish: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> None:
        """Average this step's values over micro-batches and processes and take them in.

        Args:
            average: Averages a tensor over processes.
            finish: What to make of a value after it was averaged, by name: a norm, say, which must
                be taken of the averaged gradient.
        """
        if not self._sums:
            return
        names = sorted(self._sums)
        parts = [self._sums[n].flatten() / self._counts[n] for n in names]
        averaged = average(torch.cat(parts)).split([p.numel() for p in parts])
        new: dict[str, Tensor] = {}
        for name, flat in zip(names, averaged, strict=True):
            value = flat.view(self._sums[name].shape)
            if finish is not None and name in finish:
                value = finish[name](value)
            mean = self._means.get(name)
            if mean is None:
                new[name] = value.clone()
                continue
            # A value that overflowed says nothing of the steps to come, and a mean never forgets
            # an infinity: float16's scaler skips such a step, and so does the mean.
            moved = torch.lerp(value, mean, self._decays.get(name, self.decay))
            self._means[name] = torch.where(value.isfinite().all(), moved, mean)
        if new:  # waits for the device once, in the step that first measures something
            finite = torch.stack([value.isfinite().all() for value in new.values()]).tolist()
            self._means |= {name: new[name] for name, fine in zip(new, finite, strict=True) if fine}
        self._sums, self._counts = {}, {}

    def state_dict(self) -> dict[str, Tensor]:
        """The means, for a checkpoint between two steps."""
        return dict(self._means)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        self._means = {name: value.clone() for name, value in state.items()}
