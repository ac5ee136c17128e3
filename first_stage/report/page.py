"""The page around a report's sections, and the small pieces of HTML they are made of."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path

# Nothing may be loaded from anywhere: a report is one file, today and in ten years.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_TYPES = {".png": "image/png", ".gif": "image/gif"}


@dataclass(frozen=True)
class Section:
    """A section of the report.

    Attributes:
        id: Its anchor.
        title: Its heading.
        body: HTML.
    """

    id: str
    title: str
    body: str


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole file.

    Args:
        title: Plain text.
        sections: In order.

    Returns:
        HTML that loads nothing.
    """
    assets = resources.files("first_stage.report") / "assets"
    css = (assets / "page.css").read_text(encoding="utf-8")
    js = (assets / "page.js").read_text(encoding="utf-8")
    links = "".join(f'<a href="#{s.id}">{escape(s.title)}</a>' for s in sections)
    bodies = "\n".join(
        f'<section id="{s.id}"><h2>{escape(s.title)}</h2>\n{s.body}\n</section>' for s in sections
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{css}
</style>
<script>document.documentElement.classList.add("js")</script>
</head>
<body>
<header><h1>{escape(title)}</h1></header>
<nav aria-label="Sections">{links}</nav>
<main>
{bodies}
</main>
<footer>first-stage</footer>
<script>
{js}
</script>
</body>
</html>
"""


def data_uri(content: bytes, suffix: str = ".png") -> str:
    """A picture as part of the page."""
    return f"data:{_TYPES[suffix]};base64,{base64.b64encode(content).decode()}"


def file_uri(path: Path) -> str:
    """A picture file as part of the page."""
    return data_uri(path.read_bytes(), path.suffix)


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numeric_from: int = 1, kind: str = ""
) -> str:
    """A table that scrolls sideways where it does not fit.

    Args:
        head: HTML of the titles.
        rows: HTML of the cells.
        numeric_from: First column to be set flush right.
        kind: A class of the table.
    """

    def row(cells: Sequence[str], tag: str) -> str:
        parts = []
        for k, cell in enumerate(cells):
            number = ' class="n"' if k >= numeric_from else ""
            parts.append(f"<{tag}{number}>{cell}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(row(r, "td") for r in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead>{row(head, "th")}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def details(summary: str, body: str) -> str:
    """A part that is folded until it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
