"""The page's table from the programme's results."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from first_stage.files import write_text

BEGIN, END = "<!-- results: written by `python -m benchmarks gpu` -->", "<!-- end of results -->"


def write_table(page: Path, found: dict[str, Any]) -> None:
    """Replace what stands between the page's two marks."""
    text = page.read_text()
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    write_text(page, f"{head}{BEGIN}\n\n{table(found)}\n\n{END}{tail}")


def table(found: dict[str, Any]) -> str:
    """Machine, then one row a part, in Markdown."""
    machine = found["machine"]
    where = (
        ", ".join(str(machine[k]) for k in ("device", "date") if k in machine)
        + f", torch {machine['torch']}, Python {machine['python']}, {machine['first_stage']}"
    )
    rows = [f"{where}.", "", "| part | result |", "| --- | --- |"]
    rows += [f"| {name} | {_words(result)} |" for name, result in found["parts"].items()]
    return "\n".join(rows)


def _words(result: dict[str, Any]) -> str:
    """A part's figures in a line."""
    if "error" in result:
        return f"failed: {result['error']}"
    if "skipped" in result:
        return f"not run: {result['skipped']}"
    return "; ".join(_said(result)).replace("|", "/")


_FORMS: dict[str, Callable[[float], str]] = {
    "images_per_second": lambda v: f"{v:,.1f} images/s",
    "peak_memory_bytes": lambda v: f"{v / 2**30:.2f} GiB",
    "share_of_floor": lambda v: f"{v:.0%} of the floor",
    "share_of_encoder": lambda v: f"{v:.0%} of the encoder alone",
    "share": lambda v: f"{v:.1%} of a step",
    "ours_is_times": lambda v: f"ours is {v:.2f} times as fast",
    "times": lambda v: f"{v:.2f} times one",
    "per_second": lambda v: f"{v:,.0f} a second",
}
_JSON_ALONE = (
    "parts", "steps", "seconds", "seconds_until_it_ran", "matrix_flops_per_second", "processes",
    "open_files", "resident_bytes", "images", "side", "batch_size",
)  # fmt: skip


def _said(result: dict[str, Any]) -> Iterator[str]:
    """What a part found, innermost names first told; the JSON alone has the rest."""
    for name, value in result.items():
        if name in _JSON_ALONE:
            continue
        if name in _FORMS:
            # Of several turns the median, of one what it found.
            found = value["median"] if isinstance(value, dict) else value
            yield _FORMS[name](found)
        elif isinstance(value, dict) and all(isinstance(v, dict) for v in value.values()):
            yield from _said(value)
        elif isinstance(value, dict):
            yield f"{name}: {', '.join(_said(value))}"
        else:
            shown = f"{value:.3g}" if isinstance(value, float) else str(value)
            yield f"{name.replace('_', ' ')} {shown}"
