"""Pages of the documentation as programs: their files, written out and run as they stand."""

import re
from pathlib import Path

from conftest import ROOT


def files_of(page: str) -> dict[str, str]:
    """The Python files that a page shows: blocks whose first line is a comment with their name."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", text, re.DOTALL)
    return dict(blocks)


def blocks_of(page: str) -> list[str]:
    """The other Python blocks of a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return [block for block in blocks if not re.match(r"# \S+\.py\n", block)]


def write_files(page: str, folder: Path) -> None:
    """Write a page's files into a folder."""
    for name, content in files_of(page).items():
        (folder / name).write_text(content, encoding="utf-8")
