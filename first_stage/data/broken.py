"""Files that could not be decoded: counted, listed with their reason, and bounded."""

import json
from collections.abc import Iterable
from pathlib import Path

from first_stage.errors import DataError

_ENOUGH_SEEN = 100


class BrokenFiles:
    """Keeps count over a run.

    Args:
        path: The list, JSON lines of id and reason.
        max_share: Share of the samples drawn that may be broken.
    """

    def __init__(self, path: Path, max_share: float):
        self.path, self.max_share = path, max_share
        self.drawn = 0
        self.skipped = 0
        self.reasons: dict[str, str] = {}

    def add(self, drawn: int, skipped: Iterable[tuple[str, str]], write: bool) -> None:
        """Count samples.

        Args:
            drawn: Samples drawn for batches.
            skipped: Id and reason of those that could not be decoded.
            write: Append those not listed before to the file.

        Raises:
            DataError: When they are more than the share allows of what was drawn (of 100, while
                fewer were drawn).
        """
        self.drawn += drawn
        new = []
        for name, reason in skipped:
            self.skipped += 1
            if name not in self.reasons:
                self.reasons[name] = reason
                new.append(json.dumps({"id": name, "reason": reason}) + "\n")
        if new and write:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.writelines(new)
        if self.skipped > self.max_share * max(self.drawn, _ENOUGH_SEEN):
            name, reason = next(iter(self.reasons.items()))
            raise DataError(
                f"{self.skipped} of {self.drawn} samples could not be decoded, more than "
                f"data.max_broken ({self.max_share}) allows; first: {name}: {reason}. All are "
                f"listed in {self.path}"
            )

    def state_dict(self) -> dict[str, object]:
        """Counts and reasons, for a checkpoint."""
        return {"drawn": self.drawn, "skipped": self.skipped, "reasons": self.reasons}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Take back what `state_dict` gave, and write the list anew."""
        self.drawn, self.skipped = int(str(state["drawn"])), int(str(state["skipped"]))
        reasons = state["reasons"]
        self.reasons = dict(reasons) if isinstance(reasons, dict) else {}
