"""The page's table from the programme's results."""

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
    figures = {k: v for k, v in _flat(result) if k != "seconds"}
    return ", ".join(f"{k} {v}" for k, v in figures.items()).replace("|", "/")


_UNITS = {
    "images_per_second": lambda v: f"{v:,.1f} images/s",
    "peak_memory_bytes": lambda v: f"{v / 2**30:.2f} GiB",
    "share_of_floor": lambda v: f"{v:.0%} of the floor",
    "share_of_encoder": lambda v: f"{v:.0%} of the encoder alone",
    "share": lambda v: f"{v:.1%} of a step",
    "ours_is_times": lambda v: f"ours is {v:.2f} times as fast",
    "times": lambda v: f"{v:.2f} times one",
}


def _flat(result: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names of nested results and what they say; large tables stay in the JSON."""
    said: list[tuple[str, str]] = []
    for name, value in result.items():
        if name in ("table", "parts", "steps", "seconds_until_it_ran", "matrix_flops_per_second"):
            continue
        if isinstance(value, dict):
            said += _flat(value, f"{prefix}{name}: ")
        elif name in _UNITS:
            said.append((f"{prefix}{_UNITS[name](value)}", ""))
        elif isinstance(value, float):
            said.append((f"{prefix}{name.replace('_', ' ')}", f"{value:.3g}"))
        else:
            said.append((f"{prefix}{name.replace('_', ' ')}", str(value)))
    return said
