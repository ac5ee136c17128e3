"""The tables of the comparison of quantizers."""

import statistics
from collections.abc import Callable, Mapping, Sequence

from experiments.objectives.experiment import Photos, Result
from experiments.objectives.measures import Scores
from experiments.objectives.results import cell, line, verdicts
from experiments.quantizers.rows import BASELINE, OBJECTIVE, WANTED

DOWNSAMPLE = 4
"""Pixels per token along a side."""
_COLUMNS: list[tuple[str, str, Callable[[Scores], float | None]]] = [
    ("PSNR (dB)", ".2f", lambda s: s.psnr),
    ("local Frechet distance", ".1f", lambda s: s.local_frechet),
    ("high frequencies kept", ".3f", lambda s: s.high_frequencies),
    ("codes used, held out", ".1%", lambda s: s.codes_used),
    ("perplexity", ",.0f", lambda s: s.codes_perplexity),
]

Results = Mapping[str, Mapping[str, Sequence[Result]]]
"""By first stage, then by objective, one for each seed."""


def as_text(results: Results, photos: Photos) -> str:
    """Both tables, and whether what was wanted is there, as Markdown."""
    tokens = len(photos.held_out) * (photos.held_out.shape[-1] // DOWNSAMPLE) ** 2
    every = {name: each[BASELINE] for name, each in results.items()}
    parts = [table(every), "", f"{tokens:,} held-out tokens.", "", *usage_verdicts(every, tokens)]
    for name, each in results.items():
        if each.get(OBJECTIVE):
            count = len(each[OBJECTIVE])
            rows = {BASELINE: each[BASELINE][:count], OBJECTIVE: each[OBJECTIVE]}
            parts += ["", f"{name}, {OBJECTIVE} against {BASELINE}:", "", table(rows), ""]
            parts += verdicts(rows, OBJECTIVE, BASELINE)
    return "\n".join([*parts, ""])


def table(rows: Mapping[str, Sequence[Result]]) -> str:
    """A Markdown table: mean over the seeds, and from the least to the greatest."""
    seeds = max(len(found) for found in rows.values())
    lines = [line(["first stage", *(name for name, _, _ in _COLUMNS)])]
    lines.append(line(["---"] + ["---:"] * len(_COLUMNS)))
    for name, found in rows.items():
        many = "" if len(found) == seeds else f" ({len(found)} of {seeds} seeds)"
        cells = [name + many]
        for _, form, value in _COLUMNS:
            numbers = [v for result in found if (v := value(result.scores)) is not None]
            cells.append(cell(numbers, form) if numbers else "")
        lines.append(line(cells))
    return "\n".join(lines)


def usage_verdicts(rows: Mapping[str, Sequence[Result]], tokens: int) -> list[str]:
    """Whether the held-out photos use as many codes as wanted, on average over the seeds.

    Args:
        rows: By first stage.
        tokens: Held-out tokens; even codes that are all as frequent do not all appear in them.
    """
    found = []
    for name, wanted in WANTED.items():
        used = [r.scores.codes_used for r in rows.get(name, ()) if r.scores.codes_used is not None]
        if used:
            mean, best = statistics.fmean(used), 1 - (1 - 1 / codes_of(name)) ** tokens
            found.append(
                f"{'met' if mean >= wanted else 'NOT MET'}: {name} uses {mean:.1%} of its codes on "
                f"held-out photos, wanted: at least {wanted:.0%} (all equally frequent: {best:.1%})"
            )
    return found


def codes_of(name: str) -> int:
    """How many codes a first stage has, by its name: about as many for a grid."""
    return int(name.rpartition("-")[2])
