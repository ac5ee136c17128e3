"""Named parts of a run, for a profiler's trace (see `train.profile_steps`)."""

from torch.profiler import record_function

PREFIX = "first-stage: "


def span(name: str) -> record_function:
    """A named part of the run; costs a microsecond while nothing is recorded."""
    return record_function(PREFIX + name)
