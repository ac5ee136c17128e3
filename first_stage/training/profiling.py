"""Where a step's time goes: a trace of some steps, with named spans.

`train.profile_steps: [50, 55]` records steps 50 to 54. `docs/guides/why-is-my-step-slow.md` says
how to read what comes of it.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from first_stage.files import write_atomic, write_text
from first_stage.spans import PREFIX

_ROWS = 40


class StepProfiler:
    """Records a range of steps and writes trace and table when it is over.

    Args:
        steps: First step and the one to end before; `None` records nothing.
        folder: Where `trace.json` (for chrome://tracing or ui.perfetto.dev) and `table.txt` go.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self.steps, self.folder = steps, folder
        self._profile: profile | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator["StepProfiler"]:
        """Ends a recording that is under way when the run ends, and writes it."""
        try:
            yield self
        finally:
            self._finish()

    def begin_step(self, step: int) -> Path | None:
        """Called before each step; returns the trace when its last step is over."""
        if self.steps is None:
            return None
        if step == self.steps[0]:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.__enter__()
        return self._finish() if step == self.steps[1] else None

    def _finish(self) -> Path | None:
        if self._profile is None:
            return None
        recorded, self._profile = self._profile, None
        recorded.__exit__(None, None, None)
        trace = self.folder / "trace.json"
        write_atomic(trace, lambda path: recorded.export_chrome_trace(str(path)))
        averages = recorded.key_averages()
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        spans = sorted(
            (a for a in averages if a.key.startswith(PREFIX)),
            key=lambda a: -a.cpu_time_total,
        )
        lines = [f"{a.key:<34}{a.count:>6} times{a.cpu_time_total / 1e3:>12.1f} ms" for a in spans]
        table = averages.table(sort_by=order, row_limit=_ROWS, max_name_column_width=50)
        write_text(self.folder / "table.txt", "\n".join([*lines, "", table, ""]))
        return trace
