"""Averages of what is logged, kept on the device until a log line asks for them.

All values of a step lie in one tensor, so a step adds a handful of small operations and not some
for every value. Nothing waits for the device but `averages` and `first_bad`, once a log line.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from first_stage.losses.lagged_means import Average


class Meter:
    """Averages of named values between two log lines, and the first that was not finite."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._counts: list[float] = []
        self._sums = self._bad = torch.zeros(0)
        self._indices: dict[tuple[tuple[str, int], ...], tuple[list[int], Tensor]] = {}

    def add(self, step: int, values: Mapping[str, Tensor], share: float = 1.0) -> None:
        """Add values; they stay on the device.

        Args:
            step: The step they belong to.
            values: Name to scalar, or to a vector whose entries are named `name/0`, `name/1`, ...
            share: Weight in the average: one over the number of a step's micro-batches, so that
                all steps count alike however they are split.
        """
        if not values:
            return
        flat = torch.cat([value.detach().float().reshape(-1) for value in values.values()])
        shape = tuple((name, value.numel() if value.ndim else 0) for name, value in values.items())
        if shape not in self._indices:
            self._make_room(shape, flat.device)
        places, index = self._indices[shape]
        for place in places:
            self._counts[place] += share
        self._sums = self._sums.index_add(0, index, flat * share)
        now = torch.where(flat.isfinite(), torch.inf, float(step))
        self._bad = self._bad.index_copy(0, index, torch.minimum(self._bad[index], now))

    def _make_room(self, shape: tuple[tuple[str, int], ...], device: torch.device) -> None:
        names = [
            f"{name}/{number}" if size else name
            for name, size in shape
            for number in range(max(size, 1))
        ]
        for name in names:
            if name not in self._places:
                self._places[name] = len(self._places)
                self._counts.append(0.0)
        room = len(self._places) - len(self._sums)
        self._sums = torch.cat([self._sums.to(device), torch.zeros(room, device=device)])
        bad = torch.full((room,), torch.inf, device=device)
        self._bad = torch.cat([self._bad.to(device), bad])
        places = [self._places[name] for name in names]
        self._indices[shape] = (places, torch.tensor(places, device=device))

    def first_bad(self, least: Average) -> tuple[int, list[str]] | None:
        """The first step with a value that was not finite, and the names of those values.

        Args:
            least: The elementwise minimum of a tensor over processes.
        """
        if not self._places:
            return None
        names = sorted(self._places)
        steps = least(self._ordered(self._bad, names)).tolist()
        first = min(steps)
        if first == float("inf"):
            return None
        return int(first), [n for n, step in zip(names, steps, strict=True) if step == first]

    def averages(self, average: Average) -> dict[str, float]:
        """The averages since the last call; starts anew. The one place that waits for the device.

        Args:
            average: Averages a tensor over processes.
        """
        names = self._counted()
        if not names:
            return {}
        counts = torch.tensor([self._counts[self._places[n]] for n in names])
        sums = self._ordered(self._sums, names)
        values = average(sums / counts.to(sums.device)).tolist()
        self._sums = torch.zeros_like(self._sums)
        self._counts = [0.0] * len(self._counts)
        return dict(zip(names, values, strict=True))

    def state_dict(self, stack: Average) -> dict[str, Tensor]:
        """Sums and counts since the last log line, one row per process: any number may go on.

        Args:
            stack: Every process's tensor, `(world, *shape)`, by rank.
        """
        names = self._counted()
        if not names:
            return {}
        sums = stack(self._ordered(self._sums, names)).cpu().double()
        return {
            name: torch.stack(
                [column, torch.full_like(column, self._counts[self._places[name]])], dim=1
            )
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
        self._places = {name: place for place, name in enumerate(rows)}
        self._counts = [float(row[1]) for row in rows.values()]
        device = next(iter(rows.values())).device if rows else torch.device("cpu")
        self._sums = torch.tensor([float(row[0]) for row in rows.values()], device=device)
        self._bad = torch.full_like(self._sums, torch.inf)
        self._indices = {}

    def _counted(self) -> list[str]:
        """The names with a value since the last log line, sorted."""
        return sorted(name for name, place in self._places.items() if self._counts[place] > 0)

    def _ordered(self, values: Tensor, names: list[str]) -> Tensor:
        places = torch.tensor([self._places[name] for name in names], device=values.device)
        return values[places]
