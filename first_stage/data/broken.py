"""Files that could not be decoded: counted, listed with their reason, and bounded."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

from first_stage.errors import DataError
from first_stage.files import write_text

_CHANCE = 1e-3
"""Probability that data with just the allowed share of broken files are ever refused."""


class BrokenImage(Exception):
    """A file that cannot be decoded; the message is the reason."""


class MachineFault(BrokenImage):
    """A file that the machine, its disk or its network failed to read, several times over.

    Training goes on without it; what wants each sample just once, as a latent cache does, ends.
    """


def too_many(broken: int, drawn: int, max_share: float) -> bool:
    """Whether more than a share of all samples is broken, seen from those drawn so far.

    A test that may be made after every step: samples whose true share is `max_share` fail it at
    any time with a probability of at most 1 in 1000 (a mixture of likelihood ratios is a
    martingale; Ville 1939, Robbins 1970). Shares well above are found soon: of 5% allowed, 3
    samples when all are broken, about 650 when 10% are.

    Args:
        broken: Of those drawn.
        drawn: Samples looked at.
        max_share: The share that may be broken, in [0, 1].
    """
    if drawn == 0 or broken <= max_share * drawn:
        return False
    if max_share == 0:
        return True
    share = broken / drawn
    divergence = share * math.log(share / max_share)
    if share < 1:
        divergence += (1 - share) * math.log((1 - share) / (1 - max_share))
    return drawn * divergence > math.log((drawn + 1) / _CHANCE)


class BrokenFiles:
    """Keeps count over a run.

    Args:
        path: The list, JSON lines of id and reason.
        max_share: Share of the samples drawn that may be broken; see `too_many`.
    """

    def __init__(self, path: Path, max_share: float):
        self.path, self.max_share = path, max_share
        self.drawn = 0
        self.skipped = 0
        self.reasons: dict[str, str] = {}

    def add(self, drawn: int, skipped: Iterable[tuple[str, str]], write: bool) -> None:
        """Count samples, at a cost that does not grow with the list.

        Args:
            drawn: Samples drawn for batches.
            skipped: Id and reason of those that could not be decoded.
            write: Append those not listed before to the file.

        Raises:
            DataError: When they are more than the share allows.
        """
        skipped = list(skipped)
        new = {name: reason for name, reason in skipped if name not in self.reasons}
        if new and write:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.writelines(_line(*entry) for entry in new.items())
        total, broken = self.drawn + drawn, self.skipped + len(skipped)
        if skipped and too_many(broken, total, self.max_share):
            # The counts stay as they were: the step that these samples were for is not done.
            name, reason = next(iter((self.reasons or new).items()))
            raise DataError(
                f"{broken} of {total} samples could not be decoded, more than "
                f"data.max_broken ({self.max_share}) allows: mend or remove them, or raise it. "
                f"First: {name}: {reason}; all are listed in {self.path}"
            )
        self.drawn, self.skipped = total, broken
        self.reasons |= new

    def summary(self) -> str:
        """One line for the end of a run; empty when nothing was skipped."""
        if not self.skipped:
            return ""
        name, reason = next(iter(self.reasons.items()))
        count = len(self.reasons)
        return (
            f"{count:,} sample{'s' if count > 1 else ''} could not be decoded and "
            f"{'were' if count > 1 else 'was'} skipped ({self.skipped / max(self.drawn, 1):.2%} of "
            f"what was drawn), such as {name}: {reason}; {self.path} lists them"
        )

    def state_dict(self) -> dict[str, object]:
        """Counts and reasons, for a checkpoint."""
        return {"drawn": self.drawn, "skipped": self.skipped, "reasons": dict(self.reasons)}

    def load_state_dict(self, state: dict[str, object], write: bool) -> None:
        """Take back what `state_dict` gave.

        Args:
            state: Counts and reasons.
            write: Write the list anew, without what a run that was cut off had added.
        """
        self.drawn, self.skipped = int(str(state["drawn"])), int(str(state["skipped"]))
        reasons = state["reasons"]
        self.reasons = dict(reasons) if isinstance(reasons, dict) else {}
        if write and self.reasons:
            write_text(self.path, "".join(_line(*entry) for entry in self.reasons.items()))
        elif write:
            self.path.unlink(missing_ok=True)


def _line(name: str, reason: str) -> str:
    return json.dumps({"id": name, "reason": reason}) + "\n"
