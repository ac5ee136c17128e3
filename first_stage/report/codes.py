"""The codes of discrete first stages: how they are used, what they look like, where they stand."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from first_stage.evaluation.code_pictures import MOST_CODES
from first_stage.evaluation.files import stage_picture
from first_stage.report.charts import Series, line_chart
from first_stage.report.page import Section, file_uri


def codes_section(
    stages: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]], folder: Path
) -> Section | None:
    """The codes of each first stage that has some; nothing where none has."""
    body = ""
    for place, stage in enumerate(stages):
        if not (codes := stage.get("codes")) or "by_use" not in codes:
            continue
        if len(stages) > 1:
            body += f"<h3>{escape(stage['name'])}</h3>"
        body += f"<p>{escape(in_words(codes))}</p>"
        body += _pictures(codes, stage_picture(folder, "codes", place)) + _maps(
            place, pairs, folder
        )
    return Section("codes", "Codes", body) if body else None


def in_words(codes: dict[str, Any]) -> str:
    """How codes are used, in a sentence."""
    count = codes["count"]
    dead = round((1 - codes["used"]) * count)
    return (
        f"These images use {codes['used']:.1%} of the {count:,} codes ({dead:,} are not used), as "
        f"many as {codes['perplexity']:,.0f} equally frequent ones would be (perplexity); the most "
        f"frequent one has {codes['most_frequent']:.1%} of the tokens."
    )


def _pictures(codes: dict[str, Any], sheet: Path) -> str:
    points = [(rank, share or None) for rank, share in codes["by_use"]]
    series = [Series("share of the tokens", points)]
    body = line_chart(
        "Share of the tokens", series, "codes, from the most used to the least", log=True,
        note="The dotted line: all equally often.", marks=[1 / codes["count"]],
    )  # fmt: skip
    if sheet.is_file():
        used = round(codes["used"] * codes["count"])
        which = (
            f"The {MOST_CODES} most used codes" if used > MOST_CODES else f"The {used} used codes"
        )
        text = f"{which} as the decoder draws them, row by row from the most used to the least."
        body += (
            f'<figure class="sheet codes"><img src="{file_uri(sheet)}" alt="{text}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    return f'<div class="charts">{body}</div>'


def _maps(place: int, pairs: Sequence[dict[str, Any]], folder: Path) -> str:
    rows = []
    for pair in pairs:
        tokens = pair.get("tokens", [None] * (place + 1))[place]
        if tokens is None:
            continue
        name = escape(pair["id"])
        pictures = "".join(
            f'<img{of} src="{file_uri(folder / file)}" alt="{words} of {name}" title="{words}">'
            for of, file, words in (
                (' class="of"', pair["original"], "original"),
                ("", tokens, "tokens"),
                (' class="of"', pair["reconstructions"][place], "reconstruction"),
            )
        )
        rows.append(f'<div class="strip"><div>{pictures}</div></div>')
    if not rows:
        return ""
    about = (
        "An image, its tokens, and what is decoded from them. Each code has a color of its own; "
        "codes that lie close look alike."
    )
    return f'<h4>Token maps</h4><p class="about">{about}</p><div class="maps">{"".join(rows)}</div>'
