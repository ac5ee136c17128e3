"""What a decoder adds of its own: patterns on flat colors, and seams between tiles."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from first_stage.evaluation import flat, seams
from first_stage.evaluation.files import stage_picture
from first_stage.report.page import Section, file_uri

_FLAT = (
    "Constant images, black to white and bright in one channel, go through the first stage. Above: "
    f"what comes back. Below: its difference from its own mean, {flat.AMPLIFIED} times, around "
    "gray. A grid there is a checkerboard, which will lie under every image; frames are borders, "
    "dots are spots."
)
_SEAMS = (
    "Large images are decoded in tiles, which diffusers blends where they meet. The picture is the "
    f"difference from decoding whole, {seams.AMPLIFIED} times, around gray: lines in it are seams, "
    "areas of one color are tiles whose colors shifted."
)


def artifacts_section(stages: Sequence[dict[str, Any]], folder: Path) -> Section | None:
    """Both tests for each first stage; nothing of an evaluation that made none."""
    body = ""
    for name, about, in_words in (
        ("flat", _FLAT, flat.flat_in_words),
        ("seams", _SEAMS, seams.seams_in_words),
    ):
        parts = ""
        for place, stage in enumerate(stages):
            if (figures := stage.get(name)) is None:
                continue
            label = f"<b>{escape(stage['name'])}</b>: " if len(stages) > 1 else ""
            text = escape(in_words(figures))
            parts += f"<p>{label}{text if label else text[0].upper() + text[1:]}.</p>"
            picture = stage_picture(folder, name, place)
            if picture.is_file():
                parts += (
                    f'<figure class="sheet codes {name}"><img src="{file_uri(picture)}" '
                    f'alt="{_TITLES[name]} of {escape(stage["name"])}"></figure>'
                )
        if parts:
            body += f'<h3>{_TITLES[name]}</h3><p class="about">{about}</p>{parts}'
    return Section("artifacts", "What the decoder makes up", body) if body else None


_TITLES = {"flat": "Flat colors", "seams": "Seams between tiles"}
