"""Files that could not be decoded: counted, listed with their reason, and bounded."""

import json
from collections.abc import Iterable
from pathlib import Path

from first_stage.errors import DataError
from first_stage.files import write_text

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
        skipped = list(skipped)
        reasons = dict(self.reasons)
        for name, reason in skipped:
            reasons.setdefault(name, reason)
        new = list(reasons.items())[len(self.reasons) :]
        if new and write:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.writelines(_line(*entry) for entry in new)
        total, broken = self.drawn + drawn, self.skipped + len(skipped)
        if broken > self.max_share * max(total, _ENOUGH_SEEN):
            # The counts stay as they were: the step that these samples were for is not done.
            name, reason = next(iter(reasons.items()))
            raise DataError(
                f"{broken} of {total} samples could not be decoded, more than "
                f"data.max_broken ({self.max_share}) allows; first: {name}: {reason}. All are "
                f"listed in {self.path}"
            )
        self.drawn, self.skipped, self.reasons = total, broken, reasons

    def state_dict(self) -> dict[str, object]:
        """Counts and reasons, for a checkpoint."""
        return {"drawn": self.drawn, "skipped": self.skipped, "reasons": self.reasons}

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
