"""Averages of what is logged, kept on the device until a log line asks for them.

Nothing here waits for the device but `averages` and `first_bad`, once a log line.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from first_stage.losses.lagged_means import Average


class Meter:
    """Averages of named scalars between two log lines, and the first value that was not finite."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, float] = {}
        self._bad: dict[str, Tensor] = {}

    def add(self, step: int, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Add scalars; they stay on the device.

        Args:
            step: The step they belong to.
            values: Name to scalar.
            share: Weight in the average: one over the number of a step's micro-batches, so that
                all steps count alike however they are split.
        """
        for name, value in values.items():
            value = value.detach().float()
            if name in self._sums:
                self._sums[name] = self._sums[name] + value * share
                self._counts[name] += share
            else:
                self._sums[name] = value * share
                self._counts[name] = share
                self._bad.setdefault(name, torch.full_like(value, torch.inf))
            now = torch.where(value.isfinite(), torch.inf, float(step))
            self._bad[name] = torch.minimum(self._bad[name], now)

    def first_bad(self, least: Average) -> tuple[int, list[str]] | None:
        """The first step with a value that was not finite, and the names of those values.

        Args:
            least: The elementwise minimum of a tensor over processes.
        """
        if not self._bad:
            return None
        names = sorted(self._bad)
        steps = least(torch.stack([self._bad[n] for n in names])).tolist()
        first = min(steps)
        if first == float("inf"):
            return None
        return int(first), [n for n, step in zip(names, steps, strict=True) if step == first]

    def averages(self, average: Average) -> dict[str, float]:
        """The averages since the last call; starts anew. The one place that waits for the device.

        Args:
            average: Averages a tensor over processes.
        """
        if not self._sums:
            return {}
        names = sorted(self._sums)
        stacked = torch.stack([self._sums[n] / self._counts[n] for n in names])
        values = average(stacked).tolist()
        self._sums, self._counts = {}, {}
        return dict(zip(names, values, strict=True))

    def state_dict(self, stack: Average) -> dict[str, Tensor]:
        """Sums and counts since the last log line, one row per process: any number may go on.

        Args:
            stack: Every process's tensor, `(world, *shape)`, by rank.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        sums = stack(torch.stack([self._sums[n] for n in names])).double()
        return {
            name: torch.stack([column, torch.full_like(column, self._counts[name])], dim=1)
            for name, column in zip(names, sums.unbind(1), strict=True)
        }

    def load_state_dict(self, state: Mapping[str, Tensor], rank: int = 0, world: int = 1) -> None:
        """Take back what `state_dict` gave.

        The same number of processes goes on exactly; on another one each takes an equal part of
        what all had seen, which gives the same averages up to rounding.

        Args:
            state: `(processes then, 2)` per name: sums and counts.
            rank: This process.
            world: Number of processes now.
        """
        rows = {
            name: value[rank] if value.shape[0] == world else value.mean(0)
            for name, value in state.items()
        }
        self._counts = {name: float(row[1]) for name, row in rows.items()}
        self._sums = {name: row[0].float() for name, row in rows.items()}
        self._bad = {name: torch.full_like(s, torch.inf) for name, s in self._sums.items()}
